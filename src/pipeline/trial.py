"""A version on trial: callable as name/version on every replica that follows it, without a share of the name's requests, while it is evaluated."""

import contextlib
from collections.abc import Iterator

from pipeline.convergence import WAIT_SECONDS, Change, Reach, look_first, spread, why_not
from pipeline.errors import ServingError
from pipeline.fleet import Fleet, open_fleet
from pipeline.lock import Lock
from pipeline.project import Project
from pipeline.registry import Registry, Version
from pipeline.serving.client import ServedModel
from pipeline.version import TRIAL


@contextlib.contextmanager
def evaluation_fleet(project: Project, fleet: Fleet, address: str | None, name: str) -> Iterator[Fleet]:
    """The replicas of a trial: the evaluation replica at `address`, or without one `fleet`.

    Raises ServingError if that replica cannot be asked, or does not follow `name`.
    """
    if address is None:
        yield fleet
        return
    with open_fleet(project, [address]) as own:
        for each in own.looks():
            if each.state in ("unreachable", "refuses-us"):
                raise ServingError(f"{each.why}; it is the evaluation replica: name another (--evaluate-on URL), or none, and users' replicas are asked")
            if each.status and name not in each.status.models:
                raise ServingError(f"the evaluation replica {each.url} does not follow {name}; add it to `follow:` in its serving recipe, or name another")
        yield own


@contextlib.contextmanager
def on_trial(registry: Registry, version: Version, fleet: Fleet, lock: Lock, wait_seconds: float = WAIT_SECONDS) -> Iterator[Reach]:
    """Waits for other trials of the model, then until every ready replica of `fleet` serves `version`, verified. A killed trial leaves the alias; the next one moves it.

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
