"""The kill switch's record: why a served name, or one version of it, is switched off, by whom and since when. It is a tag's value in MLflow."""

import getpass
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pipeline.errors import Fault, InvalidInput

MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Disabled:
    """`at`: ISO time in UTC. All three are empty where someone set the tag by hand to anything else: it is off all the same."""

    reason: str = ""
    by: str = ""
    at: str = ""

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.reason or 'no reason given'} ({self.by or 'unknown'}, {self.at or 'no time given'})"


def switched_off_now(reason: str) -> Disabled:
    """The record of this user switching something off now. Raises InvalidInput without a reason, or with one too long."""
    reason = " ".join(reason.split())
    if not 0 < len(reason) <= MAX_REASON_CHARACTERS:
        raise InvalidInput(
            [Fault("--reason", "", f"1 to {MAX_REASON_CHARACTERS} characters are needed (got {len(reason)}); say why, for whoever finds it off")]
        )
    return Disabled(reason, user_at_host(), datetime.now(UTC).isoformat(timespec="seconds"))


def read_disabled(value: str) -> Disabled:
    """What a tag's value says."""
    try:
        said = json.loads(value)
    except ValueError:
        return Disabled()
    return Disabled(*(str(said.get(key, ""))[:MAX_REASON_CHARACTERS] for key in ("reason", "by", "at"))) if isinstance(said, dict) else Disabled()


def user_at_host() -> str:
    """Who runs this, for the record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may know its user by number only
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"[:MAX_REASON_CHARACTERS]
