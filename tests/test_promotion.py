"""Aliases and switches move only as ready replicas follow; else they are back where they were. Registry and replicas are stood in for at their boundary."""

import contextlib
import fcntl
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline import convergence, promotion
from pipeline.errors import InvalidInput, RegistryError, ServingError
from pipeline.fleet import Fleet
from pipeline.history import Grounds, history
from pipeline.lock import Lock
from pipeline.promotion import Promotion, disable, enable, end_canary, promote, rollback_target, set_canary, start_canary
from pipeline.registry import Deployment, Version
from pipeline.switch import Disabled
from pipeline.version import DISABLED_TAG, disabled_tag
from tests.replicas import FakeReplica, fleet_of, model, served

DIGESTS = {"1": "aa" * 32, "2": "bb" * 32, "3": "cc" * 32}
A, B = "http://a:1", "http://b:1"


@dataclass
class FakeRegistry:
    """One model, `shop`; tests/test_registry.py holds the same methods against MLflow's real store. `calls` are its changes."""

    uri = "http://mlflow"
    now: str | None = None
    canary: str | None = None
    shares: dict[str, str] = field(default_factory=dict)
    previous: dict[str, str] = field(default_factory=dict)
    off: dict[str, Disabled] = field(default_factory=dict)
    calls: list[tuple[str, object]] = field(default_factory=list)
    down: bool = False
    entries_: list[tuple[str, float, dict[str, str]]] = field(default_factory=list)

    def entries(self, name: str) -> list[tuple[str, float, dict[str, str]]]:
        return self.entries_[::-1]

    def open_entry(self, name: str, label: str, tags: dict[str, str]) -> str:
        self.entries_.append((str(len(self.entries_)), float(len(self.entries_)), dict(tags)))
        return self.entries_[-1][0]

    def close_entry(self, entry: str, tags: dict[str, str]) -> None:
        self.entries_[int(entry)][2].update(tags)

    def _record(self, *call: object) -> None:
        if self.down:
            raise RegistryError("MLflow is away")
        self.calls.append(call)  # type: ignore[arg-type]

    def version(self, name: str, version: str | None = None) -> Version:
        number = version or max(DIGESTS)
        if number not in DIGESTS:
            raise RegistryError(f"{name}/{number} not found")
        return Version(name, number, DIGESTS[number], "base", "template", "run", self.previous.get(number), self.shares.get(number))

    def champion(self, name: str) -> Version | None:
        return self.version(name, self.now) if self.now else None

    def champion_number(self, name: str) -> str | None:
        return self.now

    def deployment(self, name: str) -> Deployment:
        return Deployment(name, self.now, self.canary, dict(self.off))

    def move_champion(self, name: str, version: str | None) -> None:
        self._record("champion", version)
        self.now = version

    def move_candidate(self, name: str, version: str | None) -> None:
        self._record("candidate", version)
        self.canary = version

    def write_share(self, name: str, version: str, percent: str | None) -> None:
        self._record("share", version, percent)
        self.shares = {**self.shares, version: percent} if percent is not None else {key: share for key, share in self.shares.items() if key != version}

    def record_previous(self, version: Version, previous: str | None) -> None:
        self.previous[version.version] = previous or "none"

    def switch_off(self, name: str, tag: str, record: Disabled) -> None:
        self._record("off", tag)
        self.off[tag] = record

    def switch_on(self, name: str, tags: list[str]) -> None:
        self._record("on", tuple(tags))
        self.off = {tag: record for tag, record in self.off.items() if tag not in tags}


class World:
    """A registry and replicas that follow it; `refuses` are versions that a replica does not take."""

    def __init__(self, tmp_path: Path, champion: str | None = "1") -> None:
        self.registry: Any = FakeRegistry(champion)
        self.lock = Lock("promote/shop", tmp_path / "lock")
        self.replicas: dict[str, FakeReplica] = {}
        self.fleets: list[Fleet] = []

    def status(self, refuses: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        registry = self.registry

        def version(number: str | None, **more: Any) -> dict[str, Any] | None:
            return served(number, DIGESTS[number], **more) if number else None

        candidate = version(registry.canary, percent=float(registry.shares.get(registry.canary, 0))) if registry.canary else None
        live = registry.now if registry.now not in refuses else "1"
        refused = [{**served(number, DIGESTS[number]), "code": "rank-too-large", "message": "rank 64 > 16", "attempts": 1} for number in refuses]
        candidate_live = candidate if candidate and registry.canary not in refuses else None
        versions = {tag.split(".")[2]: json.loads(record.as_json()) for tag, record in registry.off.items() if tag != DISABLED_TAG}
        name_off = registry.off.get(DISABLED_TAG)
        off = {"model": json.loads(name_off.as_json()) if name_off else None, "versions": versions}
        said = model(version(registry.now), version(live), refused=refused, disabled=off, candidate={"wanted": candidate, "live": candidate_live})
        return {"shop": {**said, **more}}

    def add(self, url: str, refuses: tuple[str, ...] = (), **options: Any) -> FakeReplica:
        self.replicas[url] = FakeReplica(**{"models": lambda: self.status(refuses), **options})
        return self.replicas[url]

    def fleet(self, **options: Any) -> Fleet:
        self.fleets.append(fleet_of(self.replicas, **options))
        return self.fleets[-1]

    def promote(self, number: str = "2", wait_seconds: float = 5.0, rolls_back: bool = False, **options: Any) -> Promotion:
        return promote(self.registry, self.registry.version("shop", number), self.fleet(**options), self.lock, wait_seconds, rolls_back=rolls_back)

    def rollback(self, to: str | None = None) -> Promotion:
        return promote(self.registry, rollback_target(self.registry, "shop", to), self.fleet(), self.lock, 1.0, rolls_back=True)

    def canary(self, number: str = "2", percent: float = 10.0, wait_seconds: float = 1.0) -> Promotion:
        return start_canary(self.registry, self.registry.version("shop", number), percent, self.fleet(), self.lock, wait_seconds)


@pytest.fixture
def world(tmp_path: Path) -> Any:
    made = World(tmp_path)
    yield made
    for fleet in made.fleets:
        fleet.close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(convergence, "AWAY_SECONDS", 0.1)


def test_promotion_waits_for_every_replica_and_records_what_was_before(world: World) -> None:
    looks = iter(range(100))
    world.add(A)
    world.add(B, models=lambda: world.status() if next(looks) > 3 else world.status(live=served("1", DIGESTS["1"])))
    began = time.time()
    done = world.promote()
    assert (done.version.label, done.previous, world.registry.now) == ("shop/2", "1", "2")
    assert done.reach.replicas == (A, B) and not done.reach.unreachable
    assert began <= done.alias_set_at <= time.time() and 0 < done.reach.seconds < 5
    assert world.replicas[A].hints == [{"name": "shop", "alias": "champion", "version": "2"}] and len(world.replicas[B].hints) >= 3
    assert world.promote().previous == "2"
    assert world.registry.previous == {"2": "1"}


def test_all_replicas_are_hinted_at_once_and_nothing_comes_between(world: World) -> None:
    together = threading.Barrier(2, timeout=5)
    calls: list[int] = []

    def wait() -> None:
        calls.append(len(world.registry.calls))
        together.wait()

    for url in (A, B):
        world.add(url, on_hint=wait)
    world.promote()
    assert calls == [1, 1]


@pytest.mark.parametrize("before", ["1", None])
def test_the_alias_goes_back_if_a_replica_refuses(before: str | None, world: World) -> None:
    world.registry.now = before
    world.add(A)
    refusing = world.add(B, refuses=("2",))
    with pytest.raises(ServingError, match=r"http://b:1 does not serve shop/2: rank 64 > 16 \(rank-too-large\)\. The alias is back where it was"):
        world.promote(wait_seconds=0.1)
    assert world.registry.now == before
    assert refusing.hints[-1] == {"name": "shop", "alias": "champion", "version": "2"}


def test_a_version_refused_again_and_again_is_not_waited_for(world: World) -> None:
    tries = iter(range(1, 1000))

    def status() -> dict[str, Any]:
        said = world.status(refuses=("2",))
        said["shop"]["refused"][0]["attempts"] = next(tries) // 2
        return said

    world.add(A, models=status)
    began = time.monotonic()
    with pytest.raises(ServingError, match="rank-too-large"):
        world.promote(wait_seconds=30)
    assert time.monotonic() - began < 5


def test_a_recreated_version_with_the_same_number_is_not_taken_for_it(world: World) -> None:
    world.add(A, models=lambda: world.status(live=served("2", "dd" * 32)))
    with pytest.raises(ServingError, match="does not serve shop/2"):
        world.promote(wait_seconds=0.1)


def test_a_move_that_someone_else_made_meanwhile_is_not_undone(world: World) -> None:
    world.add(A, on_hint=lambda: setattr(world.registry, "now", "3"))
    with pytest.raises(ServingError, match=r"its registry says shop/3.*Someone has moved the alias meanwhile, to shop/3; it is left so"):
        world.promote(wait_seconds=0.1)
    assert world.registry.now == "3"


def test_an_alias_that_cannot_be_put_back_is_said(world: World) -> None:
    world.add(A, refuses=("2",), on_hint=lambda: setattr(world.registry, "down", True))
    with pytest.raises(ServingError, match=r"rank-too-large.*could not be put back \(MLflow is away\); see how it stands"):
        world.promote(wait_seconds=0.1)


def test_an_interrupted_promotion_is_undone_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add(A)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(promotion, "spread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.promote()
    assert world.registry.now == "1"


def test_a_replica_that_is_away_for_a_moment_does_not_undo_a_promotion(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "AWAY_SECONDS", 30.0)
    replica = world.add(A)
    world.add(B, on_hint=lambda: threading.Timer(0.05, setattr, (replica, "away", False)).start())
    fleet = world.fleet()
    asked = fleet.looks

    def looks() -> Any:
        found = asked()
        replica.away = True
        return found

    fleet.looks = looks  # type: ignore[method-assign]
    done = promote(world.registry, world.registry.version("shop", "2"), fleet, world.lock, 30.0)
    assert done.reach.replicas == (A, B)


def test_an_unreachable_replica_is_reported_or_fails_as_the_recipe_says(world: World) -> None:
    world.add(A)
    world.add(B, away=True)
    done = world.promote()
    assert done.reach.replicas == (A,)
    assert [(seen.url, seen.state) for seen in done.reach.unreachable] == [(B, "unreachable")] and "Connection refused" in done.reach.unreachable[0].why
    moves = len(world.registry.calls)
    with pytest.raises(ServingError, match="http://b:1 cannot be reached.*unreachable_replicas: fail"):
        world.promote("3", unreachable_fails=True)
    assert len(world.registry.calls) == moves


@pytest.mark.parametrize("fails", [False, True])
def test_a_replica_that_goes_away_meanwhile_is_reported_or_undoes_it(fails: bool, world: World) -> None:
    gone = world.add(A)
    gone.on_hint = lambda: setattr(gone, "answers", 503)
    world.add(B)
    if not fails:
        assert [seen.state for seen in world.promote().reach.unreachable] == ["not-ready"]
        return
    with pytest.raises(ServingError, match=r"unreachable_replicas: fail`\. The alias is back"):
        world.promote(unreachable_fails=True)
    assert world.registry.now == "1"


def test_one_that_is_not_ready_is_reported_and_the_first_one_ever_is_waited_for(world: World) -> None:
    starting = world.add(A, ready=False)
    world.add(B)
    assert [seen.why for seen in world.promote().reach.unreachable] == ["replica http://a:1 is not ready: shop: no champion yet"]
    del world.replicas[B]
    starting.on_hint = lambda: setattr(starting, "ready", True)
    assert world.promote("3").reach.replicas == (A,)


def test_nothing_moves_if_no_replica_could_show_it(world: World) -> None:
    world.add(A, away=True)
    with pytest.raises(ServingError, match="no replica can be reached.*--no-wait"):
        world.promote()
    assert world.registry.calls == []
    assert promote(world.registry, world.registry.version("shop", "2"), None, world.lock).reach.replicas == ()
    assert world.registry.now == "2"


def test_without_any_replica_the_alias_moves(world: World) -> None:
    assert world.promote().reach.replicas == () and world.registry.now == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": dict}, "does not follow shop; add it to `follow:`"),
        ({"token": "other"}, "refuses our token"),
        ({"answers": 404}, "without the tuneserve plugin"),
    ],
)
def test_a_listed_replica_that_is_none_of_ours_stops_it_before_the_alias_moves(options: dict[str, Any], message: str, world: World) -> None:
    world.add(A)
    world.add(B, **options)
    with pytest.raises(ServingError, match=message):
        world.promote()
    assert world.registry.calls == []


def test_a_server_here_that_follows_something_else_does_not_count(world: World) -> None:
    world.add(A)
    world.add(B, models=dict)
    assert world.promote(listed=False).reach.replicas == (A,)
    assert world.replicas[B].hints == []


def test_promotions_of_one_model_wait_for_one_another(world: World) -> None:
    world.add(A)
    with world.lock.file.open("wb") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(world.promote)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        assert world.registry.calls == []
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(timeout=5).version.version == "2"


def test_a_promotion_ends_the_canary_once_the_champion_is_live(world: World) -> None:
    replica = world.add(A)
    world.canary("2")
    done = world.promote("3")
    assert done.ended_canary == "2" and world.registry.canary is None and world.registry.shares == {}
    assert world.registry.calls[-3:] == [("champion", "3"), ("share", "2", None), ("candidate", None)]
    assert [hint["alias"] for hint in replica.hints] == ["candidate", "champion", "candidate"]
    world.canary("1")
    assert world.promote("1").ended_canary == "1"


def test_a_promotion_that_fails_leaves_the_canary(world: World) -> None:
    world.add(A, refuses=("3",))
    world.canary("2")
    with pytest.raises(ServingError):
        world.promote("3", wait_seconds=0.05)
    assert (world.registry.canary, world.registry.shares) == ("2", {"2": "10"})


@pytest.mark.parametrize("tag", [DISABLED_TAG, disabled_tag("2", DIGESTS["2"])])
def test_what_is_switched_off_is_not_promoted(tag: str, world: World) -> None:
    world.add(A)
    world.registry.off[tag] = Disabled("wrong prices", "me@here", "now")
    label = "shop" if tag == DISABLED_TAG else "shop/2"
    for refused in (world.promote, world.canary):
        with pytest.raises(ServingError, match=rf"{label} is switched off: wrong prices \(me@here, now\); switch it on first: tuneserve enable {label}$"):
            refused("2")
    assert world.registry.calls == []


def test_a_canary_writes_its_share_first_and_waits_for_it(world: World) -> None:
    world.add(A)
    done = world.canary("2", 2.5)
    assert world.registry.calls == [("share", "2", "2.5"), ("candidate", "2")]
    assert (done.version.version, done.previous, done.percent, done.reach.replicas) == ("2", None, 2.5, (A,))
    changed = set_canary(world.registry, "shop", 100 / 3, world.fleet(), world.lock, 1.0)
    assert world.registry.calls[2:] == [("share", "2", "33.33333333")] and changed.percent == 33.33333333
    other = world.canary("3", 1)
    assert other.previous == "2" and world.registry.shares == {"3": "1"} and world.registry.canary == "3"


@pytest.mark.parametrize("running", [None, "3", "2"])
def test_a_canary_that_a_replica_refuses_is_undone(running: str | None, world: World) -> None:
    world.add(A, refuses=("2",))
    world.registry.canary, world.registry.shares = running, {running: "5"} if running else {}
    with pytest.raises(ServingError, match=r"does not serve shop/2 as candidate: rank 64.*The candidate and its share are back as they were"):
        world.canary("2", wait_seconds=0.05)
    assert (world.registry.canary, world.registry.shares) == (running, {running: "5"} if running else {})


def test_a_share_that_a_replica_does_not_take_over_is_undone(world: World) -> None:
    world.registry.canary, world.registry.shares = "2", {"2": "5"}
    stuck = served("2", DIGESTS["2"], percent=5.0)
    world.add(A, models=lambda: world.status(candidate={"wanted": stuck, "live": stuck}))
    with pytest.raises(ServingError, match="its share there is 5 %, not 20 %"):
        set_canary(world.registry, "shop", 20, world.fleet(), world.lock, 0.05)
    assert world.registry.shares == {"2": "5"}


@pytest.mark.parametrize("percent", [float("nan"), float("inf"), -1, 101])
def test_a_share_is_a_percentage(percent: float, world: World) -> None:
    world.registry.canary = "2"
    for change in (lambda: world.canary("2", percent), lambda: set_canary(world.registry, "shop", percent, world.fleet(), world.lock)):
        with pytest.raises(InvalidInput, match="0% to 100%"):
            change()
    assert world.registry.calls == []


def test_a_canary_needs_a_champion_that_is_another_version(world: World) -> None:
    with pytest.raises(ServingError, match="is the champion, so it cannot be its own canary"):
        world.canary("1")
    with pytest.raises(ServingError, match=r"no canary runs; start one: tuneserve promote shop/VERSION --canary 10%"):
        set_canary(world.registry, "shop", 10, world.fleet(), world.lock)
    world.registry.now = None
    with pytest.raises(ServingError, match="no champion to share its requests with"):
        world.canary("2")
    assert world.registry.calls == []
    assert world.canary("2", 0).percent == 0  # callable by its number: how a candidate is evaluated


def test_a_canary_is_ended(world: World) -> None:
    world.add(A)
    world.canary("2")
    done = end_canary(world.registry, "shop", world.fleet(), world.lock, 1.0)
    assert (done.candidate, done.reach.replicas) == ("2", (A,))
    assert world.registry.canary is None and world.registry.shares == {}
    assert end_canary(world.registry, "shop", world.fleet(), world.lock).candidate is None
    world.canary("2")
    stuck = served("2", DIGESTS["2"], percent=5.0)
    world.add(A, models=lambda: world.status(candidate={"wanted": None, "live": stuck}))
    with pytest.raises(ServingError, match="still gives 5 % to the candidate. The canary of shop is ended in the registry all the same"):
        end_canary(world.registry, "shop", world.fleet(), world.lock, 0.05)


def test_rolling_back_twice_goes_further_back(world: World) -> None:
    world.add(A)
    for number in ("2", "3"):
        world.promote(number)
    assert world.registry.previous == {"2": "1", "3": "2"}
    assert [world.rollback().version.version for _ in range(2)] == ["2", "1"]
    assert world.registry.previous == {"2": "1", "3": "2"}
    with pytest.raises(ServingError, match=r"shop/1: no champion before it is on record; name the version: tuneserve rollback shop --to VERSION"):
        world.rollback()
    assert world.rollback("3").previous == "1"


@pytest.mark.parametrize(
    ("now", "previous", "to", "message"),
    [
        (None, {}, None, "shop has no champion to roll back from"),
        ("1", {"1": "none"}, None, "no champion before it"),
        ("1", {"1": "2"}, "1", "is the champion already"),
        ("1", {"1": "9"}, None, "shop/9, to go back to, cannot be had"),
    ],
)
def test_a_rollback_without_a_way_back_says_so(now: str | None, previous: dict[str, str], to: str | None, message: str, world: World) -> None:
    world.registry.now, world.registry.previous = now, previous
    with pytest.raises(ServingError, match=message):
        world.rollback(to)
    assert world.registry.calls == []


def test_a_name_that_is_switched_off_is_rolled_back_but_not_to_a_version_that_is(world: World) -> None:
    world.add(A)
    world.registry.now, world.registry.previous = "2", {"2": "1"}
    world.registry.off = {DISABLED_TAG: Disabled("x")}
    assert world.rollback().version.version == "1"
    world.registry.off[disabled_tag("3", DIGESTS["3"])] = Disabled("x")
    with pytest.raises(ServingError, match="shop/3 is switched off"):
        world.rollback("3")


@pytest.mark.parametrize(("version", "tag"), [(None, DISABLED_TAG), ("2", disabled_tag("2", DIGESTS["2"]))])
def test_switching_off_and_on_waits_for_the_replicas(version: str | None, tag: str, world: World) -> None:
    replica = world.add(A)
    world.add(B, away=True)
    done = disable(world.registry, "shop", version, " wrong\nprices ", world.fleet(), 1.0)
    assert done.record and done.record.reason == "wrong prices" and "@" in done.record.by and done.record.at.endswith("+00:00")
    assert world.registry.off == {tag: done.record} and done.changed
    assert done.reach.replicas == (A,) and [seen.url for seen in done.reach.unreachable] == [B]
    assert not disable(world.registry, "shop", version, "again", world.fleet(), 1.0).changed
    assert world.registry.off[tag].reason == "again"
    back = enable(world.registry, "shop", version, world.fleet(), 1.0)
    assert (back.changed, back.record, back.reach.replicas, world.registry.off) == (True, None, (A,), {})
    assert not enable(world.registry, "shop", version, world.fleet(), 1.0).changed
    assert {hint["version"] for hint in replica.hints} == {version or "1"}


def test_what_a_replica_does_not_switch_off_stays_off_in_the_registry(world: World) -> None:
    world.add(A, models=lambda: world.status(disabled=None))
    with pytest.raises(ServingError, match="does not switch shop off: it gives no reason.*shop is switched off in the registry all the same"):
        disable(world.registry, "shop", None, "x", world.fleet(), 0.05)
    assert DISABLED_TAG in world.registry.off
    world.replicas[A].away = True
    with pytest.raises(ServingError, match="no replica shows it: .*Connection refused"):
        disable(world.registry, "shop", None, "x", world.fleet(), 0.05)


@pytest.mark.parametrize("reason", ["", "  ", "x" * 301])
def test_a_switch_needs_a_reason(reason: str, world: World) -> None:
    with pytest.raises(InvalidInput, match="--reason"):
        disable(world.registry, "shop", None, reason, world.fleet())
    assert world.registry.off == {}


def test_a_version_that_was_made_again_under_its_number_is_switched_on_with_it(world: World) -> None:
    tags = [disabled_tag("2", digest * 32) for digest in ("bb", "ee")]
    world.registry.off = {tag: Disabled("x") for tag in [*tags, disabled_tag("22", "ff" * 32), DISABLED_TAG]}
    enable(world.registry, "shop", "2", world.fleet())
    assert sorted(world.registry.off) == sorted([disabled_tag("22", "ff" * 32), DISABLED_TAG])


def test_what_became_of_each_version_is_on_record(world: Any) -> None:
    world.add(A)
    world.promote("2")
    world.rollback()
    world.registry.now = "3"
    promotion.decline(world.registry, world.registry.version("shop", "2"), world.lock, "kept", Grounds("me", "a tie"))
    world.add(B, refuses=("2",))
    with pytest.raises(ServingError, match="rank 64 > 16"):
        world.promote("2", wait_seconds=0.5)
    told = [(entry.action, entry.version, entry.before, entry.after) for entry in history(world.registry, "shop")[::-1]]
    assert told == [
        ("moved-outside", "1", None, "1"),
        ("promoted", "2", "1", "2"),
        ("rolled-back", "1", "2", "1"),
        ("moved-outside", "3", "1", "3"),
        ("kept", "2", "3", "3"),
        ("failed", "2", "3", "3"),
    ]


def test_a_version_that_was_compared_with_another_champion_is_not_promoted(world: Any) -> None:
    world.add(A)
    with pytest.raises(ServingError, match="compared with the champion none, which is shop/1 by now; promote it again"):
        promote(world.registry, world.registry.version("shop", "2"), world.fleet(), world.lock, 1.0, instead_of=None)
    assert world.registry.now == "1" and not world.registry.calls
    promote(world.registry, world.registry.version("shop", "2"), world.fleet(), world.lock, 1.0, instead_of="1")
    assert world.registry.now == "2"


def test_a_move_by_other_hands_while_replicas_are_looked_at_is_not_overwritten(world: Any) -> None:
    replica = world.add(A)
    said = replica.models

    def moved_when_asked() -> dict[str, Any]:
        world.registry.now = "3"
        found: dict[str, Any] = said()
        return found

    replica.models = moved_when_asked
    with pytest.raises(ServingError, match="champion of shop was moved outside tuneserve meanwhile, to shop/3; nothing was changed"):
        world.promote("2")
    assert world.registry.now == "3" and ("champion", "2") not in world.registry.calls
    assert [(entry.action, entry.before, entry.after) for entry in history(world.registry, "shop")[:2]] == [("moved-outside", "1", "3"), ("failed", "1", "1")]


def test_a_lost_lock_is_noticed_before_the_alias_moves(world: Any) -> None:
    @contextlib.contextmanager
    def lost() -> Iterator[Any]:
        def check() -> None:
            raise ServingError("the lock database does not answer")

        yield check

    world.add(A)
    world.lock = Mock(held=lost)
    for change in (world.promote, world.canary):
        with pytest.raises(ServingError, match="does not answer"):
            change("2")
    assert world.registry.calls == [] and world.registry.now == "1"


class Killed(BaseException):
    """The process is no more; nothing that it would still do happens."""


class Dying(FakeRegistry):
    """The registry as a process sees it that is killed at one of its calls, before or after it took effect."""

    lives: int | None = None
    after_effect = False

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(found):
            return found

        def call(*args: Any) -> Any:
            lives = object.__getattribute__(self, "lives")
            if lives is None:
                return found(*args)
            self.lives = lives - 1
            if lives < 0 or (lives == 0 and not self.after_effect):
                raise Killed
            result = found(*args)
            if lives == 0:
                raise Killed
            return result

        return call


@pytest.mark.parametrize("after_effect", [False, True])
@pytest.mark.parametrize("rolls_back", [False, True])
def test_killed_at_any_call_a_rerun_ends_in_one_consistent_state(tmp_path: Path, *, after_effect: bool, rolls_back: bool) -> None:
    kills = 0
    while True:
        world: Any = World(tmp_path)
        world.registry = Dying("1")
        world.add(A)
        world.promote("2")
        world.canary("3")
        wanted = "1" if rolls_back else "3"
        command = world.rollback if rolls_back else lambda world=world: world.promote("3")
        world.registry.lives, world.registry.after_effect = kills, after_effect
        try:
            command()
        except Killed:
            kills += 1
        else:
            break
        world.registry.lives = None
        newest = history(world.registry, "shop")[0]
        if not (rolls_back and newest.action == "rolled-back" and not newest.open):  # else it was killed when all was done: once more would go further back
            command()
        told = history(world.registry, "shop")
        assert world.registry.now == wanted == told[0].after, kills
        assert world.registry.canary is None and world.registry.shares == {} and not any(entry.open for entry in told)
        assert all(newer.before == older.after for newer, older in itertools.pairwise(told)), told
        assert world.registry.previous == ({"2": "1"} if rolls_back else {"2": "1", "3": "2"})
    assert kills >= 8


def swapping(world: World, *others: str, **options: Any) -> Any:
    versions = [world.registry.version("shop", number) for number in others or ("2",)]
    return promotion.swapping(world.registry, versions, world.fleet(), world.lock, Grounds("me", "bench"), 1.0, **options)


def test_a_swap_moves_to_and_fro_tells_replicas_and_ends_where_it_began(world: World) -> None:
    replica = world.add(A)
    registry = world.registry
    with swapping(world) as (champion, move):
        assert champion == registry.version("shop", "1")
        before = time.perf_counter()
        set_at, live_seconds = move(registry.version("shop", "2"))
        assert registry.now == "2" and before <= set_at <= time.perf_counter() and live_seconds is not None
        assert replica.hints[-1]["version"] == "2"
        move(champion)
        move(registry.version("shop", "2"))
    assert registry.calls == [("champion", number) for number in ("2", "1", "2", "1")] and registry.previous == {}
    (entry, known) = history(registry, "shop")
    assert (entry.action, entry.version, entry.before, entry.after, entry.open, entry.grounds.reasons) == ("kept", "1", "1", "1", False, "bench")
    assert known.action == "moved-outside"  # the champion that was there before a history was kept


def test_a_swap_that_tells_nobody_waits_for_nobody(world: World) -> None:
    replica = world.add(A)
    with swapping(world, tell=False) as (_, move):
        assert move(world.registry.version("shop", "2"))[1] is None and replica.hints == []
    assert world.registry.now == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ServingError])
def test_an_interrupted_swap_puts_the_champion_back(error: type[BaseException], world: World) -> None:
    world.add(A)
    with pytest.raises(error), swapping(world) as (_, move):
        move(world.registry.version("shop", "2"))
        raise error
    assert world.registry.now == "1" and history(world.registry, "shop")[0].action == "failed"


def test_a_swap_to_a_version_that_a_replica_refuses_puts_the_champion_back(world: World) -> None:
    world.add(A, refuses=("2",))
    with pytest.raises(ServingError, match="does not serve shop/2"), swapping(world) as (_, move):
        move(world.registry.version("shop", "2"))
    assert world.registry.now == "1"


def test_a_swap_leaves_what_other_hands_moved(world: World) -> None:
    world.add(A)
    with pytest.raises(ServingError, match="moved outside tuneserve meanwhile, to shop/3"), swapping(world) as (champion, move):
        move(world.registry.version("shop", "2"))
        world.registry.now = "3"
        move(champion)
    assert world.registry.now == "3"


def test_a_swap_says_if_the_champion_could_not_be_put_back(world: World) -> None:
    world.add(A)
    said = r"may not be back at shop/1 \(MLflow is away\); put it there: tuneserve promote shop/1 --force"
    with pytest.raises(ServingError, match=said), swapping(world) as (_, move):
        move(world.registry.version("shop", "2"))
        world.registry.down = True


def test_no_swap_without_a_champion_beside_a_canary_or_with_what_is_switched_off(world: World) -> None:
    world.add(A)
    registry = world.registry
    for setting, value, said in (
        ("now", None, "no champion to go back to"),
        ("canary", "3", "tuneserve canary shop end"),
        ("off", {DISABLED_TAG: Disabled("x")}, "switched off"),
    ):
        before = getattr(registry, setting)
        setattr(registry, setting, value)
        with pytest.raises(ServingError, match=said), swapping(world):
            raise AssertionError
        setattr(registry, setting, before)
    assert registry.calls == []
