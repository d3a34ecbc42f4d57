"""The watch after a promotion, and over each step of a canary: a version that fails or slows down under its users is taken out again, by itself.

`Soak` judges, and is pure; `watch_champion` and `watch_canary` look at the replicas' counters, and act. A watch ends in at most `LONGEST` times what was asked.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.decision import Reason
from pipeline.errors import RegistryError, ServingError
from pipeline.fleet import Fleet
from pipeline.history import Grounds
from pipeline.lock import Lock
from pipeline.progress import progress
from pipeline.promotion import Promotion, end_canary, promote, rollback_target
from pipeline.recipe import WatchRules
from pipeline.registry import Registry, Version, label_of
from pipeline.serving.client import Replica, ReplicaError
from pipeline.tally import NOTHING, Key, Meter, Tallies, Tally, read_tallies

logger = logging.getLogger(__name__)
MANY_FAILURES = 5
"""So many decide, however few requests there were."""
WARM_UP_SECONDS = 5.0
"""A version begins with no prefix of a prompt in the KV cache and perhaps without a slot: how fast it is counts from here on, whether it fails from the start."""
LONGEST_WINDOW = 6
"""A window grows to at most so many times window_seconds until it holds min_samples: what has become very slow ends few requests."""
LONGEST = 3

Ended = Literal["passed", "too-few-requests", "breach", "moved", "interrupted"]
"""passed: it was watched for the time asked, with enough requests. moved: someone else moved the alias. interrupted: by Ctrl-C."""


@dataclass(frozen=True)
class Watched:
    """How a watch ended. Counts and ratios are over all of it; `seconds` only those in which there were enough requests.

    `slowdowns`: per measure, how many times the mean of `against` (name/version; None: nothing to compare with) the version's was. `then`: what was done, or why
    it ended. `percent`: of a canary.
    """

    version: str
    against: str | None
    ended: Ended
    seconds: float
    requests: int
    failed: int
    slowdowns: Mapping[str, float]
    breach: Reason | None = None
    then: str = ""
    percent: float | None = None

    @property
    def text(self) -> str:
        rate = f" ({self.failed / self.requests:.1%})" if self.requests else ""
        speed = ", ".join(f"{measure} {ratio:.2f} times" for measure, ratio in self.slowdowns.items())
        at = f" at {self.percent:g}%" if self.percent is not None else ""
        seen = f"{self.version}{at} was watched for {self.seconds:.0f} s: {self.requests} requests, {self.failed} failed{rate}"
        seen += f"; {speed} {self.against}'s" if speed else "; nothing to compare its speed with"
        return seen + (f". {self.breach}" if self.breach else "") + (f". {self.then}" if self.then else "")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "breach": self.breach.as_dict() if self.breach else None}


def slowdowns(now: Tally, before: Tally, min_samples: int) -> dict[str, float]:
    """Per measure, how many times the mean before the mean now is; only where both were measured `min_samples` times."""
    pairs = {measure: (timing, before.timings[measure]) for measure, timing in now.timings.items()}
    return {
        measure: timing.mean / then.mean
        for measure, (timing, then) in pairs.items()
        if min(timing.samples, then.samples) >= min_samples and timing.seconds > 0 and then.seconds > 0
    }


def overload(now: Tallies, before: Tallies, served: str, min_samples: int) -> dict[str, float]:
    """Per measure, how much slower everything became: the least slowdown of the base and the other served names, at least 1; absent if none has the samples.

    What slows all of them is no fault of one version. It hides a version that is so slow that it slows the whole server.
    """
    found: dict[str, float] = {}
    for key, tally in now.items():
        if key[0] == served:
            continue
        for measure, ratio in slowdowns(tally, before.get(key, NOTHING), min_samples).items():
            found[measure] = max(1.0, min(ratio, found.get(measure, math.inf)))
    return found


def judge_errors(watched: Tally, champion: Tally, rules: WatchRules) -> Reason | None:
    """A breach if too many requests of a window failed. Fewer than min_samples tell nothing unless MANY_FAILURES failed, and one failure never does."""
    allowed = champion.error_rate + rules.max_error_rate_gain
    tells = watched.failed >= MANY_FAILURES or (watched.finished >= rules.min_samples and watched.failed > 1)
    if not (tells and watched.error_rate > allowed):
        return None
    return Reason("failing", f"{watched.failed:.0f} of {watched.finished:.0f} requests failed ({watched.error_rate:.1%}); {allowed:.1%} is allowed")


def judge_speed(watched: Tally, champion: Tally, overloaded: Mapping[str, float], rules: WatchRules) -> Reason | None:
    """A breach if a mean over a window is rules.slowdown times the champion's, beyond what slowed everything."""
    for measure, ratio in slowdowns(watched, champion, rules.min_samples).items():
        shared = overloaded.get(measure, 1.0)
        if ratio / shared >= rules.slowdown:
            means = f"{watched.timings[measure].mean:.3f} s against {champion.timings[measure].mean:.3f} s"
            aside = f", {shared:.2f} of which everything on these replicas shares" if shared > 1 else ""
            return Reason("slow", f"{measure} is {ratio:.2f} times the champion's ({means}){aside}; less than {rules.slowdown:g} times is allowed")
    return None


class Soak:
    """Judges one version by what is counted, look by look, until it was watched for `seconds` with enough requests.

    `baseline`: what was counted before, when `champion` had the users (a promotion); None compares with what comes to `champion` in the same time (a canary).
    """

    def __init__(self, watched: Key, champion: Key | None, baseline: Tallies | None, rules: WatchRules, seconds: float) -> None:
        self.seconds = seconds
        self.soaked_seconds = 0.0
        self._watched, self._champion, self._baseline, self._rules = watched, champion, baseline, rules
        self._looks: deque[tuple[float, Tallies]] = deque()
        self._first: tuple[float, Tallies] | None = None

    def look(self, now: float, counted: Tallies) -> Reason | None:
        """What speaks against the version, by the counters as they stand at `now` (seconds of any clock)."""
        began = (self._first or (now, counted))[0]
        since_last = now - self._looks[-1][0] if self._looks else 0.0
        self._first = self._first or (now, counted)
        self._looks.append((now, counted))
        window = self._rules.window_seconds
        while len(self._looks) > 1 and now - self._looks[1][0] >= LONGEST_WINDOW * window:
            self._looks.popleft()
        if self._of(self._window(0, began), self._watched).finished >= self._rules.min_samples:
            self.soaked_seconds += since_last
        found = self._window(self._rules.min_samples, began)
        if failing := judge_errors(self._of(found, self._watched), self._of(self._baseline or found, self._champion), self._rules):
            return failing
        found = self._window(self._rules.min_samples, began + WARM_UP_SECONDS)
        before = self._baseline or found
        shared = overload(found, before, self._watched[0], self._rules.min_samples)
        return judge_speed(self._of(found, self._watched), self._of(before, self._champion), shared, self._rules)

    def ended(self, now: float) -> Ended | None:
        """How it ended without a breach, if it has."""
        if self.soaked_seconds >= self.seconds:
            return "passed"
        return "too-few-requests" if self._first and now - self._first[0] >= LONGEST * self.seconds else None

    def seen(self) -> tuple[Tally, dict[str, float]]:
        """What came to the version since the first look, and how it compares with the champion."""
        if self._first is None:
            return NOTHING, {}
        all_of_it = _difference(self._looks[-1][1], self._first[1])
        watched = self._of(all_of_it, self._watched)
        return watched, slowdowns(watched, self._of(self._baseline or all_of_it, self._champion), self._rules.min_samples)

    def _window(self, samples: int, not_before: float) -> Tallies:
        """What was counted in the shortest time back from the last look, of at least window_seconds, in which `samples` requests ended; else since `not_before`."""
        (now, latest), start = self._looks[-1], self._looks[-1][1]
        for at, then in reversed(self._looks):
            if at < not_before:
                break
            start = then
            if now - at >= self._rules.window_seconds and self._of(_difference(latest, then), self._watched).finished >= samples:
                break
        return _difference(latest, start)

    @staticmethod
    def _of(found: Tallies, key: Key | None) -> Tally:
        return found.get(key, NOTHING) if key else NOTHING


def _difference(now: Tallies, before: Tallies) -> Tallies:
    return {key: tally.since(before.get(key, NOTHING)) for key, tally in now.items()}


@dataclass(frozen=True)
class Watching:
    """A fleet whose counters are followed by `rules`, for a watch of `seconds`. `begin` makes one before anything is changed, for the champion's own figures."""

    fleet: Fleet
    rules: WatchRules
    seconds: float
    meter: Meter = field(default_factory=Meter)

    def scrape(self) -> dict[Key, Tally]:
        """What was counted since the begin. A replica that does not tell now is left out; it tells all of it later."""
        for url, found in self.fleet.each(lambda replica: (replica.url, _tallies(replica))):
            if found is not None:
                self.meter.take(url, found)
        return self.meter.since()

    def baseline(self) -> Tallies:
        """Each version's tally since the begin, or, where that holds fewer than min_samples requests, since the replicas started."""
        recent, ever = self.meter.since(), self.meter.ever()
        return {key: recent[key] if recent.get(key, NOTHING).finished >= self.rules.min_samples else tally for key, tally in ever.items()}


def begin(fleet: Fleet, rules: WatchRules, seconds: float) -> Watching:
    """Starts to follow the counters of the fleet's replicas."""
    watching = Watching(fleet, rules, seconds)
    watching.scrape()
    return watching


def _tallies(replica: Replica) -> dict[Key, Tally] | None:
    try:
        return read_tallies(replica.metrics())
    except (ReplicaError, ValueError) as error:
        logger.info("counters not read", extra={"replica": replica.url, "reason": str(error)[:200]})
        return None


def watch_champion(registry: Registry, version: Version, watching: Watching, lock: Lock, grounds: Grounds) -> Watched:
    """Watches the champion `version`, and at a breach makes the champion before it champion again, on record with the breach as the reason.

    The alias goes back also where replicas do not follow. Raises ServingError or RegistryError if it cannot. If the alias is someone else's by then, it is left.
    """
    name = version.name
    try:
        before: Version | None = rollback_target(registry, name, None)
        stuck = ""
    except ServingError as error:
        before, stuck = None, f"It CANNOT BE ROLLED BACK and still answers: {error}; or switch it off: tuneserve disable {name} --reason TEXT"

    def moved() -> str:
        now = registry.champion_number(name)
        return (
            "" if now == version.version else f"The champion is {label_of(name, now) if now else 'nobody'} by now: someone moved the alias, and it is left so"
        )

    watching.scrape()
    soak = Soak((name, version.version), (name, before.version) if before else None, watching.baseline(), watching.rules, watching.seconds)
    ended, breach, then = _watch(soak, watching, version, moved)
    if breach and before is None:
        then = stuck
    elif breach and before:
        ended, then = _roll_back(registry, version, before, watching.fleet, lock, replace(grounds, reasons=f"rolled back by the watch: {breach}"), moved)
    return _watched(soak, version, before.label if before else None, ended, breach, then)


def watch_canary(registry: Registry, version: Version, percent: float, watching: Watching, lock: Lock) -> Watched:
    """Watches the candidate `version` beside the champion, and at a breach ends the canary. Raises ServingError or RegistryError if that fails."""
    name = version.name
    champion = registry.champion_number(name)

    def moved() -> str:
        now = registry.deployment(name)
        if now.candidate != version.version:
            return f"The canary is {label_of(name, now.candidate) if now.candidate else 'ended'} by now: someone else did that, and it is left so"
        return (
            ""
            if now.champion == champion
            else f"The champion is {label_of(name, now.champion) if now.champion else 'nobody'} by now; the canary is left as it is"
        )

    soak = Soak((name, version.version), (name, champion) if champion else None, None, watching.rules, watching.seconds)
    ended, breach, then = _watch(soak, watching, version, moved)
    if breach:
        done = end_canary(registry, name, watching.fleet, lock, only=version.version)
        then = "The canary is ended" if done.candidate else moved()
    return _watched(soak, version, label_of(name, champion), ended, breach, then, percent)


def _watch(soak: Soak, watching: Watching, version: Version, moved: Callable[[], str]) -> tuple[Ended, Reason | None, str]:
    """Looks until the end, a breach, or the alias is moved (`moved` then says so); what ended it, and what there is to say of that."""
    try:
        with progress(f"watching {version.label}") as report:
            while True:
                breach = soak.look(time.monotonic(), watching.scrape())
                if breach:
                    logger.warning("watch breached", extra={"model": version.name, "version": version.version, "reason": str(breach)})
                    return "breach", breach, ""
                try:
                    if why := moved():
                        return "moved", None, why
                except RegistryError as error:  # replicas go on as they are, and so do we
                    logger.warning("alias not read", extra={"model": version.name, "reason": str(error)})
                seen, _ = soak.seen()
                report(f"{seen.finished:.0f} requests, {seen.failed:.0f} failed", min(1.0, soak.soaked_seconds / soak.seconds))
                if ended := soak.ended(time.monotonic()):
                    few = f"In {LONGEST * soak.seconds:.0f} s there were too few requests to judge it by (promotion.watch.min_samples in a window); it stays"
                    return ended, None, "" if ended == "passed" else few
                time.sleep(watching.rules.poll_seconds)
    except KeyboardInterrupt:
        return "interrupted", None, f"{version.label} stays as it is, and nobody watches it any more"


def _roll_back(
    registry: Registry, version: Version, before: Version, fleet: Fleet, lock: Lock, grounds: Grounds, moved: Callable[[], str]
) -> tuple[Ended, str]:
    def back(to: Fleet | None) -> Promotion:
        return promote(registry, before, to, lock, grounds=grounds, rolls_back=True, instead_of=version.version)

    try:
        try:
            done = back(fleet)
            return "breach", f"It is rolled back to {before.label}, live on {', '.join(done.reach.replicas) or 'no replica'} after {done.reach.seconds:.1f} s"
        except ServingError as error:
            if why := moved():
                return "moved", why
            back(None)  # a replica that does not follow, perhaps for the breach's own reason, must not keep the alias where it is
            return "breach", f"The alias is rolled back to {before.label}, though not every replica followed ({error}); see who does: tuneserve status"
    except (ServingError, RegistryError) as error:
        by_hand = f"tuneserve rollback {version.name} --to {before.version}"
        raise ServingError(f"{version.label}: {grounds.reasons}; but that FAILED ({error}); do it by hand: {by_hand}") from error


def _watched(soak: Soak, version: Version, against: str | None, ended: Ended, breach: Reason | None, then: str, percent: float | None = None) -> Watched:
    seen, ratios = soak.seen()
    found = Watched(version.label, against, ended, soak.soaked_seconds, round(seen.finished), round(seen.failed), ratios, breach, then, percent)
    logger.info("watch ended", extra={"model": version.name, "version": version.version, "ended": ended, "seconds": round(soak.soaked_seconds, 1)})
    return found
