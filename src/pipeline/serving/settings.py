"""What `tuneserve serve` tells the plugin inside vLLM: one JSON file, its path in an environment variable."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

SETTINGS_VARIABLE = "TUNESERVE_FOLLOWER"
SYNC_SECONDS = 10.0
"""How long POST /adapters/sync may hold its answer back for the sync that it asked for."""


class FollowerSettings(BaseModel):
    """The wanted state's source and where this replica keeps its own. Holds no secret: the token is in a file of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mlflow_uri: str
    models: tuple[str, ...]
    """Registered models whose alias `champion` is served under the model's name."""
    base_revision: str
    """Digest of the served base's files; a version trained on another base is refused."""
    template_digest: str
    """SHA-256 of the served chat template; a version trained with another is refused."""
    state_dir: Path
    """Fetched adapters (a folder per digest) and `live.json`, what was served last."""
    token_file: Path
    """The bearer token that every /adapters route asks for; mode 0600."""
    poll_seconds: float = 1.0
    first_sync_seconds: float = 20.0
    """How long the first sync may hold back the server's readiness."""
