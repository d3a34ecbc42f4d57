"""A version on trial: callable as name/version on every ready replica, without a share of the name's requests, while it is evaluated."""

import contextlib
from collections.abc import Iterator

from pipeline.convergence import WAIT_SECONDS, Change, Reach, look_first, spread, why_not
from pipeline.fleet import Fleet
from pipeline.lock import Lock
from pipeline.registry import Registry, Version
from pipeline.serving.client import ServedModel
from pipeline.version import TRIAL


@contextlib.contextmanager
def on_trial(registry: Registry, version: Version, fleet: Fleet, lock: Lock, wait_seconds: float = WAIT_SECONDS) -> Iterator[Reach]:
    """Waits for other trials of the model, then until every ready replica serves `version`, verified. A killed trial leaves the alias; the next one moves it.

    Raises ServingError, with the replica's reason, if one does not.
    """

    def shows(model: ServedModel | None) -> str | None:
        if model is None:
            return "it does not follow that model; add it to `follow:` in its serving recipe"
        if any((entry.version, entry.digest) == (version.version, version.digest) and entry.verified for entry in model.versions):
            return None
        return why_not(model, version, None)

    with lock.held():
        looks = look_first(fleet, version.name)
        change = Change(version.name, TRIAL, version.version, version.digest, shows, f"does not serve {version.label}")
        try:
            registry.put_on_trial(version.name, version.version)
            yield spread(fleet, looks, change, wait_seconds)
        finally:
            registry.put_on_trial(version.name, None)
            fleet.hint(version.name, TRIAL, version.version)
