"""A version that fails or slows down is taken out, one that merely shares an overload is not, and without requests nothing is decided."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pipeline import convergence, promotion, watch
from pipeline.errors import RegistryError, ServingError
from pipeline.history import Grounds, history
from pipeline.recipe import WatchRules
from pipeline.serving.metrics import Metrics
from pipeline.tally import Key, Tally, Timing
from pipeline.watch import Soak, Watched, judge_errors, judge_speed, overload, slowdowns, watch_canary, watch_champion
from tests.replicas import FakeReplica
from tests.test_promotion import A, B, World

RULES = WatchRules()
OLD, NEW, BASE, TOYS = ("shop", "1"), ("shop", "2"), ("glm-4.5v", "base"), ("toys", "4")
GROUNDS = Grounds("me@here", "watched")


def counted(answered: float, seconds: float = 0.1, errors: float = 0.0) -> Tally:
    """So many answers, each of whose times were `seconds`."""
    timing = Timing(answered * seconds, answered)
    return Tally(answered, errors, 0.0, timing, timing, timing)


class Clock:
    """Looks once a second; `rate` requests come to each version in one, with their seconds and failures."""

    def __init__(self, soak: Soak) -> None:
        self.soak, self.now, self.totals = soak, 0.0, dict[Key, Tally]()
        assert soak.look(0.0, {}) is None

    def run(self, seconds: int, **by_name: tuple[float, float, float]) -> Any:
        """(answers a second, seconds of each, failures a second) per version, for so long; the first breach, with its time."""
        keys = {"old": OLD, "new": NEW, "base": BASE, "toys": TOYS}
        for _ in range(seconds):
            self.now += 1.0
            for name, (answered, each, errors) in by_name.items():
                self.totals[keys[name]] = self.totals.get(keys[name], Tally()).plus(counted(answered, each, errors))
            if breach := self.soak.look(self.now, dict(self.totals)):
                return SimpleNamespace(at=self.now, code=breach.code, message=breach.message)
        return None


def soak(baseline: dict[Key, Tally] | None = None, seconds: float = 60, rules: WatchRules = RULES) -> Clock:
    return Clock(Soak(NEW, OLD, {OLD: counted(200)} if baseline is None else baseline, rules, seconds))


# The judgement


@pytest.mark.parametrize(
    ("answered", "errors", "breach"),
    [(100, 0, False), (98, 2, False), (97, 3, True), (19, 1, False), (18, 2, True), (10, 4, False), (0, 5, True), (1000, 6, False)],
)
def test_an_error_rate_needs_samples_or_many_failures(answered: float, errors: float, breach: bool) -> None:
    assert bool(judge_errors(counted(answered, errors=errors), counted(100), RULES)) is breach


def test_the_champions_own_failures_are_allowed_to_the_version() -> None:
    assert judge_errors(counted(90, errors=10), counted(91, errors=9), RULES) is None
    found = judge_errors(counted(50, errors=50), counted(90, errors=10), RULES)
    assert found and found.code == "failing" and "50 of 100 requests failed (50.0%); 12.0% is allowed" in found.message


def test_a_mean_that_is_slower_is_a_breach_where_both_have_samples() -> None:
    assert judge_speed(counted(20, 0.17), counted(20, 0.1), {}, RULES) is None
    found = judge_speed(counted(20, 0.2), counted(20, 0.1), {}, RULES)
    assert found and found.code == "slow" and "time to first token is 2.00 times the champion's (0.200 s against 0.100 s)" in found.message
    assert judge_speed(counted(19, 9.0), counted(20, 0.1), {}, RULES) is None
    assert judge_speed(counted(20, 9.0), counted(19, 0.1), {}, RULES) is None
    only_requests = counted(20, 0.1)._replace(request=Timing(20.0, 20))
    assert (found := judge_speed(only_requests, counted(20, 0.1), {}, RULES)) and found.message.startswith("time per request is 10.00")


def test_what_all_names_share_is_no_fault_of_one() -> None:
    before = {OLD: counted(100), BASE: counted(100), TOYS: counted(100, 0.2)}
    now = {NEW: counted(100, 0.3), BASE: counted(50, 0.25), TOYS: counted(50, 0.6)}
    shared = overload(now, before, "shop", 20)
    assert shared["time per request"] == pytest.approx(2.5)
    assert judge_speed(now[NEW], before[OLD], shared, RULES) is None
    found = judge_speed(counted(100, 0.5), before[OLD], shared, RULES)
    assert found and "5.00 times" in found.message and "2.50 of which everything on these replicas shares" in found.message
    assert overload({BASE: counted(50, 0.05)}, before, "shop", 20)["time per request"] == 1.0
    assert overload({BASE: counted(19, 9.0)}, before, "shop", 20) == {}


def test_nothing_is_compared_without_times() -> None:
    assert slowdowns(Tally(50), counted(50), 20) == {} and slowdowns(counted(50), Tally(50), 20) == {}


# A soak


def test_a_version_that_is_as_good_passes_after_the_time_asked() -> None:
    clock = soak(seconds=60)
    assert clock.run(66, new=(5, 0.1, 0)) is None
    assert clock.soak.ended(clock.now) == "passed" and clock.soak.soaked_seconds >= 60
    seen, ratios = clock.soak.seen()
    assert seen.finished == 330 and ratios["time per request"] == pytest.approx(1.0)


def test_half_of_the_requests_failing_is_seen_within_two_seconds() -> None:
    clock = soak()
    assert clock.run(15, new=(20, 0.1, 0)) is None
    found = clock.run(15, new=(10, 0.1, 10))
    assert found.code == "failing" and found.at <= 17


@pytest.mark.parametrize("slower", [2.0, 2.5, 4.0, 20.0, 100.0])
def test_a_slowdown_is_seen_within_ten_seconds_or_its_first_slow_answers(slower: float) -> None:
    """Eight clients ask again as soon as they are answered: a tenth of a second each, then `slower` times that."""
    clock = soak()
    assert clock.run(15, new=(80, 0.1, 0)) is None
    found = clock.run(10, new=(80 / slower, 0.1 * slower, 0))
    assert found.code == "slow" and found.at <= 25


def test_one_failure_and_a_slow_start_are_forgiven() -> None:
    clock = soak()
    assert clock.run(5, new=(10, 0.5, 0)) is None  # its first prompts are in no cache
    assert clock.run(1, new=(10, 0.1, 1)) is None
    assert clock.run(60, new=(10, 0.1, 0)) is None and clock.soak.ended(clock.now) == "passed"


def test_a_version_that_is_slow_from_the_start_is_found_after_the_warm_up() -> None:
    found = soak().run(15, new=(10, 0.3, 0))
    assert found.code == "slow" and found.at <= 8


def test_time_without_requests_does_not_count_and_ends_after_three_times_as_long() -> None:
    clock = soak(seconds=60)
    assert clock.run(30, new=(5, 0.1, 0)) is None
    soaked = clock.soak.soaked_seconds
    assert soaked < 30 and clock.run(100, new=(0, 0, 0)) is None
    assert clock.soak.soaked_seconds - soaked <= RULES.window_seconds and clock.soak.ended(clock.now) is None
    assert clock.run(50, new=(1, 0.1, 0)) is None and clock.soak.ended(clock.now) == "too-few-requests"


def test_few_slow_requests_are_judged_over_a_longer_window() -> None:
    found = soak().run(60, new=(0.5, 0.3, 0))
    assert found.code == "slow" and 40 <= found.at <= 55


def test_an_overload_of_all_takes_nothing_out() -> None:
    clock = soak({OLD: counted(200), BASE: counted(200)})
    assert clock.run(15, new=(20, 0.1, 0), base=(5, 0.1, 0)) is None
    assert clock.run(30, new=(10, 0.3, 0), base=(3, 0.3, 0)) is None


def test_a_canary_is_compared_with_what_comes_to_the_champion_meanwhile() -> None:
    def canary() -> Clock:
        return Clock(Soak(NEW, OLD, None, RULES, 60))

    assert canary().run(30, old=(50, 0.4, 0), new=(5, 0.4, 0)) is None
    clock = canary()
    assert clock.run(15, old=(50, 0.1, 0), new=(5, 0.1, 0)) is None
    assert clock.run(20, old=(50, 0.3, 0), new=(5, 0.3, 0)) is None  # both
    found = clock.run(15, old=(50, 0.1, 0), new=(5, 0.4, 0))
    assert found.code == "slow"
    assert canary().run(15, old=(50, 0.1, 10), new=(5, 0.1, 1)) is None
    assert canary().run(15, old=(50, 0.1, 0), new=(5, 0.1, 1)).code == "failing"


def test_without_a_champion_before_only_failures_are_judged() -> None:
    clock = Clock(Soak(NEW, None, {}, RULES, 60))
    assert clock.run(30, new=(20, 9.0, 0)) is None and clock.run(2, new=(10, 0.1, 10)).code == "failing"


# The loop, against a registry and replicas that are stood in for


class Users:
    """A replica's counters: at each look, `each` requests have come to the champion, or to what `asked` says, and ended as `faults` says of their version."""

    def __init__(self, world: World, each: int = 30) -> None:
        self.world, self.each, self.faults = world, each, dict[str, str]()
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.asked = lambda: (world.registry.now,)

    def look(self) -> bytes:
        for version in filter(None, self.asked()):
            fault = self.faults.get(version)
            for _ in range(self.each):
                self.metrics.finished("shop", version, "error" if fault == "fails" else "stop", 1, 1)
                if fault != "fails":
                    for timing in (self.metrics.first_token, self.metrics.per_token, self.metrics.request):
                        timing.labels("shop", version).observe(0.5 if fault == "slow" else 0.1)
        return generate_latest(self.registry)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(convergence, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "WARM_UP_SECONDS", 0.0)
    made = World(tmp_path)
    yield made
    for fleet in made.fleets:
        fleet.close()


def add(world: World, url: str = A, **options: Any) -> tuple[FakeReplica, Users]:
    users = Users(world)
    return world.add(url, counted=users.look, **options), users


def watched(world: World, seconds: float = 0.5, before: str | None = "1", **options: Any) -> Watched:
    """Promotes shop/2 over shop/`before` and watches it."""
    fleet = world.fleet(**options)
    watching = watch.begin(fleet, WatchRules(window_seconds=1, poll_seconds=0.02), seconds)
    second = world.registry.version("shop", "2")
    promotion.promote(world.registry, second, fleet, world.lock, 5.0)
    return watch_champion(world.registry, second, watching, world.lock, GROUNDS)


def test_a_good_version_stays_and_is_told_of(world: World) -> None:
    add(world)
    done = watched(world)
    assert (done.ended, done.version, done.against, world.registry.now, done.failed, done.breach) == ("passed", "shop/2", "shop/1", "2", 0, None)
    assert done.requests >= 60 and done.seconds >= 0.5
    assert "0 failed (0.0%); time to first token 1.00 times, time per token 1.00 times, time per request 1.00 times shop/1's" in done.text
    assert done.as_dict()["slowdowns"]["time per request"] == pytest.approx(1.0)


@pytest.mark.parametrize(("fault", "code"), [("fails", "failing"), ("slow", "slow")])
def test_a_breach_rolls_back_and_the_history_tells_why(world: World, fault: str, code: str) -> None:
    _, users = add(world)
    users.faults["2"] = fault
    done = watched(world, seconds=30)
    assert done.breach and (done.ended, done.breach.code, world.registry.now) == ("breach", code, "1")
    assert f"({code}). It is rolled back to shop/1, live on {A} after" in done.text
    newest = history(world.registry, "shop")[0]
    assert (newest.action, newest.version, newest.before, newest.after) == ("rolled-back", "1", "2", "1")
    assert newest.grounds.reasons == f"rolled back by the watch: {done.breach}" and newest.grounds.by == "me@here"


def test_one_replica_of_two_that_fails_is_enough_and_one_that_is_away_for_a_look_does_not_matter(world: World) -> None:
    add(world)
    replica, users = add(world, B)
    users.faults["2"] = "fails"
    looks = iter(range(1000))
    counted = replica.counted
    replica.counted = lambda: counted() if next(looks) % 3 else b"no metrics {"
    assert watched(world, seconds=30).ended == "breach" and world.registry.now == "1"


def test_an_alias_that_someone_moved_ends_the_watch_and_is_left(world: World) -> None:
    _, users = add(world)
    looks = iter(range(1000))

    def asked() -> tuple[str | None, ...]:
        if next(looks) == 5:
            world.registry.now = "3"
        return (world.registry.now,)

    users.asked = asked
    done = watched(world, seconds=30)
    assert done.ended == "moved" and world.registry.now == "3" and "The champion is shop/3 by now" in done.text


def test_an_alias_that_moves_at_the_breach_is_left_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, users = add(world)
    users.faults["2"] = "fails"
    original = watch.promote

    def promote(*args: Any, **options: Any) -> Any:
        world.registry.now = "3"
        return original(*args, **options)

    monkeypatch.setattr(watch, "promote", promote)
    done = watched(world, seconds=30)
    assert done.ended == "moved" and world.registry.now == "3" and done.breach


def test_without_a_champion_before_a_breach_is_said_loudly(world: World) -> None:
    world.registry.now = None
    _, users = add(world)
    users.faults["2"] = "fails"
    done = watched(world, seconds=30)
    assert done.ended == "breach" and world.registry.now == "2" and done.against is None
    assert "CANNOT BE ROLLED BACK" in done.text and "tuneserve disable shop" in done.text


def test_the_alias_goes_back_also_where_a_replica_does_not_follow(world: World) -> None:
    replica, users = add(world)
    users.faults["2"] = "fails"
    fleet = world.fleet(unreachable_fails=True)
    watching = watch.begin(fleet, WatchRules(window_seconds=1, poll_seconds=0.02), 30)
    second = world.registry.version("shop", "2")
    promotion.promote(world.registry, second, fleet, world.lock, 5.0)
    replica.ready = False
    done = watch_champion(world.registry, second, watching, world.lock, GROUNDS)
    assert done.ended == "breach" and world.registry.now == "1" and "though not every replica followed" in done.text
    assert history(world.registry, "shop")[0].action == "rolled-back"


def test_a_rollback_that_fails_says_how_to_do_it_by_hand(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, users = add(world)
    users.faults["2"] = "fails"

    def away(*_: Any, **__: Any) -> None:
        raise RegistryError("MLflow is away")

    monkeypatch.setattr(watch, "promote", away)
    with pytest.raises(ServingError, match=r"FAILED \(MLflow is away\).*tuneserve rollback shop --to 1"):
        watched(world, seconds=30)


def test_no_requests_end_the_watch_after_three_times_as_long(world: World) -> None:
    _, users = add(world)
    users.asked = lambda: ()
    began = time.monotonic()
    done = watched(world, seconds=0.2)
    assert done.ended == "too-few-requests" and world.registry.now == "2" and time.monotonic() - began >= 0.6
    assert "too few requests to judge it by" in done.text and "nothing to compare its speed with" in done.text


def test_an_interrupted_watch_leaves_the_version_and_says_that_nobody_watches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    add(world)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
    done = watched(world, seconds=30)
    assert done.ended == "interrupted" and world.registry.now == "2" and "nobody watches it any more" in done.text


def test_a_registry_that_is_away_does_not_end_a_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    add(world)
    number, asked = world.registry.champion_number, iter(range(1000))

    def away(name: str) -> Any:
        if next(asked) % 2:
            raise RegistryError("MLflow is away")
        return number(name)

    fleet = world.fleet()
    watching = watch.begin(fleet, WatchRules(window_seconds=1, poll_seconds=0.02), 0.3)
    second = world.registry.version("shop", "2")
    promotion.promote(world.registry, second, fleet, world.lock, 5.0)
    monkeypatch.setattr(world.registry, "champion_number", away)
    assert watch_champion(world.registry, second, watching, world.lock, GROUNDS).ended == "passed"


def canary(world: World, seconds: float = 30) -> Watched:
    second = world.registry.version("shop", "2")
    fleet = world.fleet()
    promotion.start_canary(world.registry, second, 10.0, fleet, world.lock, 5.0)
    watching = watch.begin(fleet, WatchRules(window_seconds=1, poll_seconds=0.02), seconds)
    return watch_canary(world.registry, second, 10.0, watching, world.lock)


def test_a_canary_passes_or_is_ended(world: World) -> None:
    _, users = add(world)
    users.asked = lambda: (world.registry.now, world.registry.canary)
    done = canary(world, seconds=0.3)
    assert (done.ended, done.percent, done.against, world.registry.canary) == ("passed", 10.0, "shop/1", "2")
    assert done.text.startswith("shop/2 at 10% was watched for")
    users.faults["2"] = "slow"
    done = canary(world)
    assert done.ended == "breach" and done.then == "The canary is ended" and (world.registry.canary, world.registry.now) == (None, "1")


def test_a_canary_that_someone_ended_or_replaced_is_left(world: World) -> None:
    _, users = add(world)
    looks = iter(range(1000))

    def asked() -> tuple[str | None, ...]:
        if next(looks) == 3:
            world.registry.canary, world.registry.shares = "3", {"3": "5"}
        return (world.registry.now,)

    users.asked = asked
    done = canary(world)
    assert done.ended == "moved" and world.registry.canary == "3" and "The canary is shop/3 by now" in done.text
    assert promotion.end_canary(world.registry, "shop", world.fleet(), world.lock, only="2").candidate is None and world.registry.canary == "3"
