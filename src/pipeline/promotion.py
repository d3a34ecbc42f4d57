"""Changing what is served: `promote`, `rollback` and the canary move an alias, `disable` sets a switch; each returns once every ready replica shows it.

A replica that cannot be reached or is not ready is reported: it looks at the registry before it is ready. Where an alias moved and a ready replica does not
follow, the alias goes back.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.convergence import WAIT_SECONDS, Change, Reach, Shows, look_first, spread, why_not
from pipeline.errors import Fault, InvalidInput, RegistryError, ServingError
from pipeline.fleet import Fleet
from pipeline.history import Action, Grounds, history, note, recorded, settle
from pipeline.journal import failure_fields
from pipeline.lock import Check, Lock
from pipeline.registry import Deployment, Registry, Version, label_of
from pipeline.serving.client import ServedModel
from pipeline.switch import Disabled, switched_off_now, user_at_host
from pipeline.version import CANDIDATE, CHAMPION, DISABLED_TAG, disabled_tag

logger = logging.getLogger(__name__)
ANY = "any"


@dataclass(frozen=True)
class Promotion:
    """What was done: the version now under the alias, the number of the one before it, when MLflow had set it (unix time), and how far it came.

    `percent` is the share of a canary, None for a champion; `ended_canary` the number of the candidate whose canary this ended.
    """

    version: Version
    previous: str | None
    alias_set_at: float
    reach: Reach
    ended_canary: str | None = None
    percent: float | None = None


@dataclass(frozen=True)
class Ended:
    """A canary that was ended: its number, None if none ran."""

    candidate: str | None
    reach: Reach


@dataclass(frozen=True)
class Switched:
    """A name or a version that was switched off, or on where `record` is None. `changed`: it was not so before."""

    label: str
    record: Disabled | None
    changed: bool
    reach: Reach


def promote(
    registry: Registry,
    version: Version,
    fleet: Fleet | None,
    lock: Lock,
    wait_seconds: float = WAIT_SECONDS,
    *,
    grounds: Grounds | None = None,
    rolls_back: bool = False,
    instead_of: str | None = ANY,
) -> Promotion:
    """Makes `version` the champion, waits until every ready replica serves it, and ends the model's canary. No fleet: nobody is waited for.

    One change of a model's aliases at a time holds the `lock`. Raises ServingError if a ready replica does not follow within `wait_seconds`: the message
    has its reason, and the alias is back where it was (unless someone has moved it on meanwhile). What came of it stands in the model's history, with `grounds`.
    `rolls_back` leaves the version's own predecessor on record, and takes a name that is switched off.
    `instead_of`: the champion (number, or None) that the version was found better than; raises ServingError if it is another one by now.
    """
    grounds = grounds or Grounds(user_at_host())
    with lock.held() as check:
        before = registry.deployment(version.name)
        settle(registry, version.name, before.champion, grounds.by)
        refuse_switched_off(before, version, allow_name=rolls_back)
        action: Action = "rolled-back" if rolls_back else "promoted"
        with recorded(registry, version.name, action, (version.version, version.digest), before.champion, grounds):
            if instead_of not in (ANY, before.champion):
                now, then = (label_of(version.name, number) if number else "none" for number in (before.champion, instead_of))
                raise ServingError(f"{version.label} was compared with the champion {then}, which is {now} by now; promote it again, to compare it with that")
            return _make_champion(registry, version, before, fleet, wait_seconds, check, record=not rolls_back)


@contextlib.contextmanager
def swapping(
    registry: Registry, others: Sequence[Version], fleet: Fleet, lock: Lock, grounds: Grounds, wait_seconds: float = WAIT_SECONDS, *, tell: bool = True
) -> Iterator[tuple[Version, Callable[[Version], tuple[float, float | None]]]]:
    """The champion of the model of `others`, and a function that points its alias to it or to one of them, for measuring. However the block ends, that champion is champion again, and live.

    The function returns when the alias was set (`time.perf_counter` seconds), and the seconds until every ready replica showed it; unless `tell`, no replica is told nor waited for.
    The model's lock is held throughout; nothing is written on versions, and the history gets one entry, with `grounds`. Raises ServingError if there is no champion, a canary runs, one of the
    versions is switched off, a ready replica does not follow, or someone moves the alias meanwhile; then it stays where they moved it.
    """
    name = others[0].name
    with lock.held() as check:
        before, champion = registry.deployment(name), registry.champion(name)
        settle(registry, name, before.champion, grounds.by)
        if champion is None:
            raise ServingError(f"{name} has no champion to go back to; make one: tuneserve promote {name}/VERSION")
        if before.candidate is not None:
            raise ServingError(f"the canary {label_of(name, before.candidate)} runs, and would be asked too; end it first: tuneserve canary {name} end")
        for version in (champion, *others):
            refuse_switched_off(before, version)
        look_first(fleet, name)
        now = champion.version

        def move(version: Version) -> tuple[float, float | None]:
            nonlocal now
            looks = look_first(fleet, name)
            check()
            _refuse_moved(name, CHAMPION, now, registry.champion_number(name))
            registry.move_champion(name, version.version)
            set_at = time.perf_counter()
            now = version.version
            reach = spread(fleet, looks, _answers_with(version), wait_seconds) if tell else Reach()
            return set_at, reach.seconds if reach.replicas else None

        with recorded(registry, name, "kept", (champion.version, champion.digest), champion.version, grounds):
            try:
                yield champion, move
            finally:
                _make_champion_again(registry, champion, {version.version for version in others}, fleet, wait_seconds)


def _make_champion_again(registry: Registry, champion: Version, moved_to: Collection[str], fleet: Fleet, wait_seconds: float) -> None:
    """Only if the alias points to one of `moved_to`: else it is there already, or someone else moved it."""
    try:
        now = registry.champion_number(champion.name)
        if now not in moved_to or now == champion.version:
            return
        registry.move_champion(champion.name, champion.version)
    except BaseException as error:
        raise ServingError(
            f"the alias may not be back at {champion.label} ({error or type(error).__name__}); put it there: tuneserve promote {champion.label} --force"
        ) from error
    logger.info("alias moved back", extra={"model": champion.name, "version": champion.version, "digest": champion.digest, "alias": CHAMPION})
    with _stays(f"{champion.label} is champion again in the registry"):
        spread(fleet, None, _answers_with(champion), wait_seconds)


def _answers_with(version: Version) -> Change:
    return Change(version.name, CHAMPION, version.version, version.digest, _serves(version), f"does not serve {version.label}")


def decline(registry: Registry, version: Version, lock: Lock, action: Literal["kept", "refused", "failed"], grounds: Grounds) -> None:
    """Writes down that a version was examined, or could not be, and does not become champion."""
    with lock.held():
        now = registry.champion_number(version.name)
        settle(registry, version.name, now, grounds.by)
        note(registry, version.name, action, (version.version, version.digest), now, grounds)


def rollback_target(registry: Registry, name: str, to: str | None) -> Version:
    """The version that a rollback of `name` makes champion: `to`, else the champion before the one of now, so that rolling back twice goes further back.

    Raises ServingError if there is none. `promote` goes there, with `rolls_back`.
    """
    champion = registry.champion(name)
    if champion is None:
        raise ServingError(f"{name} has no champion to roll back from; make one: tuneserve promote {name}/VERSION")
    newest = next(iter(history(registry, name)), None)
    if to is None and newest and newest.open and newest.action == "rolled-back" and newest.version == champion.version:
        return champion  # a rollback that was killed once the alias had moved: it is seen through, not done twice
    number = to or champion.previous
    if number in (None, "none"):
        raise ServingError(f"{champion.label}: no champion before it is on record; name the version: tuneserve rollback {name} --to VERSION")
    if number == champion.version:
        raise ServingError(f"{champion.label} is the champion already; name another version: tuneserve rollback {name} --to VERSION")
    try:
        return registry.version(name, number)
    except RegistryError as error:
        raise ServingError(f"{name}/{number}, to go back to, cannot be had ({error}); name another: tuneserve rollback {name} --to VERSION") from error


def start_canary(registry: Registry, version: Version, percent: float, fleet: Fleet, lock: Lock, wait_seconds: float = WAIT_SECONDS) -> Promotion:
    """Gives `version` a share of its model's requests as the candidate, and waits until every ready replica has it so.

    Raises ServingError if one does not: the alias and the share are back as they were.
    """
    share = share_tag(percent)
    with lock.held() as check:
        before = registry.deployment(version.name)
        return _make_candidate(registry, version, share, before, fleet, wait_seconds, check)


def set_canary(registry: Registry, name: str, percent: float, fleet: Fleet, lock: Lock, wait_seconds: float = WAIT_SECONDS) -> Promotion:
    """Changes the share of the canary that runs; as `start_canary`."""
    share = share_tag(percent)
    with lock.held() as check:
        before = registry.deployment(name)
        if before.candidate is None:
            raise ServingError(f"{name}: no canary runs; start one: tuneserve promote {name}/VERSION --canary {percent:g}%")
        return _make_candidate(registry, registry.version(name, before.candidate), share, before, fleet, wait_seconds, check)


def end_canary(registry: Registry, name: str, fleet: Fleet, lock: Lock, wait_seconds: float = WAIT_SECONDS, *, only: str | None = None) -> Ended:
    """Takes the candidate's alias and share away and waits until no ready replica gives it requests. It is so afterwards also if a replica does not follow.

    `only`: the number of the candidate that is meant; another one is left.
    """
    with lock.held():
        candidate = registry.deployment(name).candidate
        if candidate is None or only not in (None, candidate):
            return Ended(None, Reach())
        _take_candidate_away(registry, name, candidate)
        change = Change(name, CANDIDATE, candidate, None, _gives_no_share, f"does not end the canary of {name}")
        with _stays(f"The canary of {name} is ended in the registry"):
            reach = spread(fleet, None, change, wait_seconds)
    return Ended(candidate, reach)


def disable(registry: Registry, name: str, version: str | None, reason: str, fleet: Fleet, wait_seconds: float = WAIT_SECONDS) -> Switched:
    """Switches a served name, or one version of it, off, on record; waits until every ready replica shows it.

    It stays switched off also if this raises ServingError, because a replica does not show it. Waits for no promotion, and looks at no replica first.
    """
    record = switched_off_now(reason)
    tag = DISABLED_TAG if version is None else disabled_tag(version, registry.version(name, version).digest)
    before = registry.deployment(name)
    registry.switch_off(name, tag, record)
    label = label_of(name, version)
    logger.warning("switched off", extra={"model": name, "version": version, "by": record.by, "reason": record.reason})

    change = Change(name, CHAMPION, version or before.champion or "0", None, _switched(version, record), f"does not switch {label} off")
    with _stays(f"{label} is switched off in the registry"):
        reach = spread(fleet, None, change, wait_seconds)
    return Switched(label, record, tag not in before.switched_off, reach)


def enable(registry: Registry, name: str, version: str | None, fleet: Fleet, wait_seconds: float = WAIT_SECONDS) -> Switched:
    """Takes `disable` back; as that. Leaves a version off whose name is switched on, and the other way round."""
    before = registry.deployment(name)
    tags = before.tags_of(version) if version else [DISABLED_TAG] if before.name_off else []
    registry.switch_on(name, tags)
    label = label_of(name, version)
    logger.warning("switched on", extra={"model": name, "version": version})

    change = Change(name, CHAMPION, version or before.champion or "0", None, _switched(version, None), f"does not switch {label} on")
    with _stays(f"{label} is switched on in the registry"):
        reach = spread(fleet, None, change, wait_seconds)
    return Switched(label, None, bool(tags), reach)


def share_tag(percent: float) -> str:
    """A canary's share as its tag says it. Raises InvalidInput unless it is 0 to 100."""
    if not (math.isfinite(percent) and 0 <= percent <= 100):
        raise InvalidInput([Fault(f"{percent:g}%", "", "a canary's share is 0% to 100%; for example 10% or 2.5%")])
    return f"{percent:.10g}"


def _make_champion(
    registry: Registry, version: Version, before: Deployment, fleet: Fleet | None, wait_seconds: float, check: Check, *, record: bool
) -> Promotion:
    name, previous = version.name, before.champion
    fields = {"model": name, "version": version.version, "digest": version.digest}
    change = _answers_with(version)
    looks = look_first(fleet, name) if fleet is not None else []
    if record and previous != version.version:
        registry.record_previous(version, previous)  # before the alias: whoever is killed after it leaves nothing unsaid
    check()
    _refuse_moved(name, CHAMPION, previous, registry.champion_number(name))
    try:
        registry.move_champion(name, version.version)
        set_at = time.time()
        logger.info("alias moved", extra={**fields, "alias": CHAMPION, "previous": previous})
        reach = spread(fleet, looks, change, wait_seconds) if fleet is not None else Reach()
    except BaseException as error:
        logger.warning("promotion failed", extra={**fields, **failure_fields(error)})
        raise _undone(error, lambda: _move_champion_back(registry, version, previous), fleet, change) from error
    if before.candidate is not None:
        _take_candidate_away(registry, name, before.candidate)
        if fleet is not None:
            fleet.hint(name, CANDIDATE, before.candidate)
    logger.info("version live", extra={**fields, "replicas": list(reach.replicas), "seconds": round(reach.seconds, 3)})
    return Promotion(version, previous, set_at, reach, before.candidate)


def _make_candidate(registry: Registry, version: Version, share: str, before: Deployment, fleet: Fleet, wait_seconds: float, check: Check) -> Promotion:
    name = version.name
    fields = {"model": name, "version": version.version, "digest": version.digest, "alias": CANDIDATE, "percent": float(share)}
    change = Change(name, CANDIDATE, version.version, version.digest, _shares(version, float(share)), f"does not serve {version.label} as candidate")
    refuse_switched_off(before, version)
    if before.champion == version.version:
        raise ServingError(f"{version.label} is the champion, so it cannot be its own canary; name another version")
    if before.champion is None and float(share) > 0:
        raise ServingError(f"{name} has no champion to share its requests with; promote one first: tuneserve promote {version.label}")
    looks = look_first(fleet, name)
    check()
    _refuse_moved(name, CANDIDATE, before.candidate, registry.deployment(name).candidate)
    try:
        registry.write_share(name, version.version, share)
        if before.candidate != version.version:
            registry.move_candidate(name, version.version)
        set_at = time.time()
        reach = spread(fleet, looks, change, wait_seconds)
    except BaseException as error:
        logger.warning("canary failed", extra={**fields, **failure_fields(error)})
        raise _undone(error, lambda: _move_candidate_back(registry, version, before.candidate), fleet, change) from error
    if before.candidate not in (None, version.version):
        registry.write_share(name, str(before.candidate), None)
    logger.info("canary set", extra={**fields, "previous": before.candidate, "replicas": list(reach.replicas), "seconds": round(reach.seconds, 3)})
    return Promotion(version, before.candidate, set_at, reach, percent=float(share))


def _refuse_moved(name: str, alias: str, before: str | None, now: str | None) -> None:
    """Raises ServingError if someone has moved the alias outside tuneserve, which no lock holds back, since it was read."""
    if now != before:
        there = label_of(name, now) if now else "nothing"
        raise ServingError(f"the alias {alias} of {name} was moved outside tuneserve meanwhile, to {there}; nothing was changed: look, and try again")


def _take_candidate_away(registry: Registry, name: str, candidate: str) -> None:
    """The share first: whoever is killed between the two leaves a candidate at 0 %, which the next change finds and takes away."""
    with contextlib.suppress(RegistryError):  # the version may have been deleted
        registry.write_share(name, candidate, None)
    registry.move_candidate(name, None)
    logger.info("canary ended", extra={"model": name, "version": candidate, "alias": CANDIDATE})


def _undone(error: BaseException, put_back: Callable[[], str], fleet: Fleet | None, change: Change) -> ServingError:
    """The error to raise once a move that failed with `error` is undone, with what became of the alias; raises `error` itself if it is not for a person to read."""
    try:
        outcome = put_back()
    except RegistryError as away:
        outcome = f"The alias could not be put back ({away}); see how it stands: tuneserve status"
    if not isinstance(error, ServingError):
        raise error
    if fleet is not None:
        fleet.hint(change.name, change.alias, change.version)
    return ServingError(f"{error}. {outcome}")


def _move_champion_back(registry: Registry, version: Version, previous: str | None) -> str:
    now = registry.champion_number(version.name)
    if now != version.version:
        return f"Someone has moved the alias meanwhile, to {label_of(version.name, now) if now else 'nothing'}; it is left so."
    if previous == version.version:
        return "The alias is left as it was."
    registry.move_champion(version.name, previous)
    fields = {"model": version.name, "version": previous, "digest": None, "refused": version.version}
    logger.warning("alias moved back", extra={**fields, "alias": CHAMPION})
    return "The alias is back where it was."


def _move_candidate_back(registry: Registry, version: Version, previous: str | None) -> str:
    """`version` is as it was read before its share was written."""
    now = registry.deployment(version.name).candidate
    if now == version.version != previous:
        registry.move_candidate(version.name, previous)
    registry.write_share(version.name, version.version, version.canary_percent)
    if now not in (version.version, previous):
        return f"Someone has moved the candidate meanwhile, to {label_of(version.name, now) if now else 'nothing'}; it is left so."
    logger.warning("alias moved back", extra={"model": version.name, "version": previous, "alias": CANDIDATE, "refused": version.version})
    return "The candidate and its share are back as they were."


@contextlib.contextmanager
def _stays(what: str) -> Iterator[None]:
    """Says in an error that what was asked for stays so in the registry."""
    try:
        yield
    except ServingError as error:
        raise ServingError(f"{error}. {what} all the same; see who does not follow: tuneserve status") from error


def refuse_switched_off(before: Deployment, version: Version, *, allow_name: bool = False) -> None:
    """Raises ServingError if the version, or (unless `allow_name`) its name, is switched off."""
    if before.name_off and not allow_name:
        raise ServingError(f"{version.name} is switched off: {before.name_off}; switch it on first: tuneserve enable {version.name}")
    if off := before.version_off(version.version, version.digest):
        raise ServingError(f"{version.label} is switched off: {off}; switch it on first: tuneserve enable {version.label}")


def _serves(version: Version) -> Shows:
    """The name answers with `version`."""

    def shows(model: ServedModel | None) -> str | None:
        if model is None:
            return "it does not follow that model; add it to `follow:` in its serving recipe"
        if model.live and model.live.key == (version.version, version.digest):
            return None
        return why_not(model, version, model.wanted)

    return shows


def _shares(version: Version, percent: float) -> Shows:
    """`version` is the live candidate, with that share."""

    def shows(model: ServedModel | None) -> str | None:
        if model is None:
            return "it does not follow that model; add it to `follow:` in its serving recipe"
        live = model.live_candidate
        if live and live.key == (version.version, version.digest):
            same = math.isclose(live.percent or 0.0, percent, abs_tol=1e-6)
            return None if same else f"its share there is {live.percent or 0.0:g} %, not {percent:g} %"
        return why_not(model, version, model.candidate.wanted if model.candidate else None)

    return shows


def _gives_no_share(model: ServedModel | None) -> str | None:
    live = model.live_candidate if model else None
    return f"it still gives {live.percent:g} % to the candidate" if live and live.percent else None


def _switched(version: str | None, record: Disabled | None) -> Shows:
    """The name (`version` None) or that version is off by `record`, or on without one; a replica that does not serve it has nothing to switch."""

    def shows(model: ServedModel | None) -> str | None:
        if model is None or (version is not None and not any(entry.version == version for entry in model.versions)):
            return None
        found = model.off.model if version is None else model.off.versions.get(version)
        return None if found == record else model.error or "it gives no reason; look at its log"

    return shows
