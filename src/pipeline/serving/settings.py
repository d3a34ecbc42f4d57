"""What `tuneserve serve` tells the plugin inside vLLM: one JSON file, its path in an environment variable."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.serving.routing import DisabledAnswers

SETTINGS_VARIABLE = "TUNESERVE_FOLLOWER"
SYNC_SECONDS = 10.0
"""How long POST /adapters/sync may hold its answer back for the sync that it asked for."""
KEEP_ALIVE_SECONDS = 2.0
"""How long a connection of ours may lie idle and be used again: less than the 5 s after which uvicorn, which MLflow and vLLM are served by, closes it."""


class SamplingSettings(BaseModel):
    """What is kept, where and for how long; the recipe's `sampling`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    """This server's alone."""
    share: float
    keep_days: int
    keep_images: bool
    max_bytes: int
    redact: str | None = None


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
    base_folder: Path | None = None
    """The served base's files: with them an adapter's shapes are checked before it is loaded."""
    state_dir: Path
    """Fetched adapters (a folder per digest) and `live.json`, what was served last."""
    token_file: Path
    """The bearer token that the /adapters routes ask for, and the secret that hints are signed with; mode 0600."""
    follow_tag: str | None = None
    """`key=value`: every registered model with that tag is followed too."""
    poll_seconds: float = 1.0
    first_sync_seconds: float = 20.0
    """How long the first sync may hold back the server's readiness."""
    forget_after_seconds: float = 60.0
    """How long a version that nothing wants any more stays loaded, unless its place is needed."""
    cache_bytes: int = 8 * 2**30
    """Disk for fetched adapters."""
    max_adapter_bytes: int = 4 * 2**30
    sticky_header: str | None = "X-User-Id"
    """During a canary, the header that names the caller where the request has no `user`."""
    disabled_answers: DisabledAnswers = "error"
    float32: bool = False
    """Whether the server computes in float32: log-probabilities are then compared more strictly."""
    max_rank: int = 16
    max_loras: int = 4
    max_cpu_loras: int = 16
    target_modules: tuple[str, ...] = ("qkv_proj", "o_proj")
    """vLLM's modules that take adapters."""
    wraps_experts: bool = False
    sampling: SamplingSettings | None = None
    """None: no request is kept."""
