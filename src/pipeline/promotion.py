"""Moving the alias: `promote` sets `champion` and returns once every replica serves that version, else puts the alias back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ServingError
from pipeline.registry import Registry, Version
from pipeline.serving.client import Replica

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Promotion:
    """What was done: the version now champion, the one before it, and the seconds until the last of `replicas` served it."""

    version: Version
    previous: Version | None
    replicas: tuple[str, ...]
    seconds: float


def promote(registry: Registry, version: Version, replicas: Sequence[Replica], wait_seconds: float = WAIT_SECONDS) -> Promotion:
    """Makes `version` the champion and waits until every replica serves it.

    Raises ServingError if a replica does not within `wait_seconds`: the alias is then back where it was, and the message has the replica's reason.
    """
    for replica in replicas:
        if version.name not in replica.status():
            raise ServingError(f"replica {replica.url} does not follow {version.name}; add it to `follow:` in its serving recipe")
    previous = registry.champion(version.name)
    began = time.monotonic()
    registry.set_champion(version, previous)
    try:
        for replica in replicas:
            _wait_live(replica, version, began + wait_seconds)
    except BaseException:
        if previous is None:
            registry.unset_champion(version.name)
        elif previous != version:
            registry.set_champion(previous, None)
        raise
    return Promotion(version, previous, tuple(replica.url for replica in replicas), time.monotonic() - began)


def _wait_live(replica: Replica, version: Version, deadline: float) -> None:
    while True:
        served = replica.sync()[version.name]
        if served.live == (version.version, version.digest):
            return
        if time.monotonic() > deadline:
            reason = served.error or "it gives no reason; look at its log"
            raise ServingError(f"replica {replica.url} does not serve {version.label}: {reason}. The alias is back where it was.")
        time.sleep(POLL_SECONDS)
