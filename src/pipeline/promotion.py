"""Moving the alias: `promote` sets `champion` and returns once every replica serves that version, else puts the alias back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ServingError
from pipeline.process import locked
from pipeline.registry import Registry, Version
from pipeline.serving.client import Replica

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Promotion:
    """What was done: the version now champion, the number of the one before it, and the seconds until the last of `replicas` served it."""

    version: Version
    previous: str | None
    replicas: tuple[str, ...]
    seconds: float


def promote(registry: Registry, version: Version, replicas: Sequence[Replica], lock: Path, wait_seconds: float = WAIT_SECONDS) -> Promotion:
    """Makes `version` the champion and waits until every replica serves it. One promotion at a time holds the file `lock`.

    Raises ServingError if a replica does not within `wait_seconds`: the message has its reason, and the alias is back where it was
    (unless someone has moved it on meanwhile).
    """
    for replica in replicas:
        if version.name not in replica.status():
            raise ServingError(f"replica {replica.url} does not follow {version.name}; add it to `follow:` in its serving recipe")
    with locked(lock):
        previous = registry.champion_number(version.name)
        began = time.monotonic()
        try:
            registry.move_champion(version.name, version.version)
            for replica in replicas:
                _wait_live(replica, version, began + wait_seconds)
        except BaseException:
            if previous != version.version and registry.champion_number(version.name) == version.version:
                registry.move_champion(version.name, previous)
            raise
        seconds = time.monotonic() - began
        if previous != version.version:
            registry.record_previous(version, previous)
    return Promotion(version, previous, tuple(replica.url for replica in replicas), seconds)


def _wait_live(replica: Replica, version: Version, deadline: float) -> None:
    while True:
        try:
            served = replica.sync()[version.name]
            if served.live == (version.version, version.digest):
                return
            reason = served.error or "it gives no reason; look at its log"
        except ServingError as error:  # it may be slow or restarting: that is its reason only if it stays so
            reason = str(error)
        if time.monotonic() > deadline:
            raise ServingError(f"replica {replica.url} does not serve {version.label}: {reason}. The alias is back where it was.")
        time.sleep(POLL_SECONDS)
