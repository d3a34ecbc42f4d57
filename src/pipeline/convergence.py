"""How a change in the registry reaches replicas: who is asked first, told, and waited for, and how far it came."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import ServingError
from pipeline.fleet import Fleet, Look, look
from pipeline.registry import Version, label_of
from pipeline.serving.client import Replica, ServedModel, ServedVersion

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
AWAY_SECONDS = 5.0
"""A replica that was ready and is not reached for so long has gone; until then it may only be busy."""
REFUSALS = 3
"""So often a replica must refuse a version, while we look, before we stop waiting for it."""

Shows = Callable[[ServedModel | None], str | None]
"""Why what a replica says of the model (None: it does not follow it) is not yet as it should be, or None if it is."""


@dataclass(frozen=True)
class Reach:
    """How far a change came: the replicas that show it, those that could not be asked with the reason, and the seconds until the last of the former did."""

    replicas: tuple[str, ...] = ()
    unreachable: tuple[Look, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Change:
    """What replicas are hinted at and asked for: `verb` is what one does that does not show it. `digest`: of the version that it is about, if of one."""

    name: str
    alias: str
    version: str
    digest: str | None
    shows: Shows
    verb: str


def look_first(fleet: Fleet, name: str) -> list[Look]:
    """What the replicas that count say before anything is changed. Raises ServingError if the change could not be seen through."""
    looks = [each for each in fleet.looks() if fleet.listed or each.status is None or name in each.status.models]
    for each in looks:
        if each.state == "refuses-us":
            raise ServingError(each.why)
        if each.status and name not in each.status.models:
            raise ServingError(f"replica {each.url} does not follow {name}; add it to `follow:` in its serving recipe, or name the replicas that do")
    away = [each for each in looks if each.state != "ready"]
    if away and fleet.unreachable_fails:
        raise ServingError(f"{_listing(away)}; the serving recipe says `unreachable_replicas: fail`: bring it up, or take it out of the list")
    if looks and all(each.state == "unreachable" for each in looks):
        raise ServingError(f"no replica can be reached, so none would show the change: {_listing(away)}; start one, or move the alias alone: --no-wait")
    return looks


def _listing(looks: Sequence[Look]) -> str:
    return "; ".join(each.why for each in looks)


def spread(fleet: Fleet, looks: Sequence[Look] | None, change: Change, wait_seconds: float) -> Reach:
    """Hints all replicas at once and waits until every ready one shows the change, and at least one does.

    `looks`: what those that count said before; None where nobody looked, and all are asked. Raises ServingError if a ready one does not follow in time.
    """
    began = time.monotonic()
    said = {each.url: each.state for each in looks or ()}
    asked = [replica for replica in fleet.replicas if looks is None or said.get(replica.url, "unreachable") != "unreachable"]
    patient = looks is not None and "ready" not in said.values()
    stop = threading.Event()
    showing: list[tuple[float, str]] = []
    away = [each for each in (fleet.unresolved if looks is None else looks) if each.state == "unreachable"]
    try:
        for outcome in fleet.each(lambda replica: _follow(replica, change, began + wait_seconds, stop, patient=patient), asked):
            if outcome.how == "fails":
                raise ServingError(outcome.seen.why)
            if outcome.how == "away":
                away.append(outcome.seen)
            else:
                showing.append((outcome.at - began, outcome.seen.url))
    finally:
        stop.set()
    if away and fleet.unreachable_fails:
        raise ServingError(f"{_listing(away)}; the serving recipe says `unreachable_replicas: fail`")
    if away and not showing:
        raise ServingError(f"no replica shows it: {_listing(away)}")
    return Reach(tuple(sorted(url for _, url in showing)), tuple(sorted(away, key=lambda each: each.url)), max(showing, default=(0.0, ""))[0])


@dataclass(frozen=True)
class Outcome:
    """How waiting for one replica ended, and when: it shows the change, cannot be asked, or does not follow."""

    how: Literal["shows", "away", "fails"]
    seen: Look
    at: float


def _follow(replica: Replica, change: Change, deadline: float, stop: threading.Event, *, patient: bool) -> Outcome:
    """Hints one replica until it shows the change, or it is clear that it does not, or `stop`. `patient`: one that is not ready is waited for."""
    reached_at = time.monotonic()
    refusals: set[int] = set()
    while True:
        seen = look(replica.url, lambda: replica.hint(change.name, change.alias, change.version))
        now = time.monotonic()
        reached_at = reached_at if seen.state == "unreachable" else now
        over = now > deadline or stop.is_set()
        if seen.state == "ready" and seen.status:
            model = seen.status.models.get(change.name)
            why = change.shows(model)
            if why is None:
                return Outcome("shows", seen, now)
            refusal = model.refusal(change.version, change.digest) if model else None
            refusals |= {refusal.attempts} if refusal else set()
            if over or len(refusals) >= REFUSALS:
                mlflow_error = f" (it says of MLflow: {seen.status.mlflow_error})" if seen.status.mlflow_error else ""
                return Outcome("fails", replace(seen, why=f"replica {replica.url} {change.verb}: {why}{mlflow_error}"), now)
        elif seen.state == "refuses-us":
            return Outcome("fails", seen, now)
        elif over or (seen.state == "not-ready" and not patient) or now - reached_at > AWAY_SECONDS:
            return Outcome("away", seen, now)
        stop.wait(POLL_SECONDS)


def why_not(model: ServedModel, version: Version, wanted: ServedVersion | None) -> str:
    """Why a replica that says this of the model does not serve `version` yet; `wanted`: what it says that the registry wants."""
    if refusal := model.refusal(version.version, version.digest):
        return f"{refusal.message or 'refused'} ({refusal.code or 'no code'})"
    if model.error:
        return model.error
    if wanted and wanted.key != (version.version, version.digest):
        return f"its registry says {label_of(version.name, wanted.version)}: someone moved the alias, or it follows another MLflow"
    return "it gives no reason; look at its log"
