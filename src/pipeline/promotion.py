"""Moving the alias: `promote` sets `champion` and returns once every replica serves that version, else puts the alias back."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ServingError
from pipeline.journal import failure_fields
from pipeline.process import locked
from pipeline.registry import Registry, Version
from pipeline.serving.client import Replica
from pipeline.version import CHAMPION

logger = logging.getLogger(__name__)
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
    fields = {"model": version.name, "version": version.version, "digest": version.digest}
    with locked(lock):
        previous = registry.champion_number(version.name)
        began = time.monotonic()
        try:
            registry.move_champion(version.name, version.version)
            logger.info("alias moved", extra={**fields, "alias": CHAMPION, "previous": previous})
            for replica in replicas:
                _wait_live(replica, version, began + wait_seconds)
        except BaseException as error:
            logger.warning("promotion failed", extra={**fields, **failure_fields(error)})
            if previous != version.version and registry.champion_number(version.name) == version.version:
                registry.move_champion(version.name, previous)
                logger.warning("alias moved back", extra={**fields, "alias": CHAMPION, "version": previous, "digest": None, "refused": version.version})
            raise
        seconds = time.monotonic() - began
        if previous != version.version:
            registry.record_previous(version, previous)
    logger.info("version live", extra={**fields, "replicas": [replica.url for replica in replicas], "seconds": round(seconds, 3)})
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
