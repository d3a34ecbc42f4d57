"""What each served version has done, from the counters on replicas' /metrics (serving/metrics.py): summed over replicas, whether they restart or are away."""

from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, str]
"""A served name and a version's number: what counters are kept by."""
GENERATIONS = "tuneserve_requests_total"
HTTP_ERRORS = "tuneserve_http_errors_total"
NOT_JUDGED = ("abort", "invalid")
"""How generations end that tell nothing of the version: the client went away, or asked for what cannot be."""
MEASURES = {
    "time to first token": "tuneserve_time_to_first_token_seconds",
    "time per token": "tuneserve_time_per_output_token_seconds",
    "time per request": "tuneserve_request_seconds",
}


class Timing(NamedTuple):
    """A duration's sum in seconds over `samples` times that it was measured."""

    seconds: float = 0.0
    samples: float = 0.0

    @property
    def mean(self) -> float:
        return self.seconds / self.samples if self.samples else 0.0


class Tally(NamedTuple):
    """What requests to one version came to, from some time to another, or ever since."""

    answered: float = 0.0
    errors: float = 0.0
    """Generations in which the engine failed."""
    http_errors: float = 0.0
    """HTTP answers of 500 and above."""
    first_token: Timing = Timing()
    per_token: Timing = Timing()
    request: Timing = Timing()

    @property
    def failed(self) -> float:
        """The larger of the two counts of failures, since one failed request may be in both: streamed answers fail after their status, others with it."""
        return max(self.errors, self.http_errors)

    @property
    def finished(self) -> float:
        """Requests that were answered or failed, through no fault of the client."""
        return self.answered + self.failed

    @property
    def error_rate(self) -> float:
        return self.failed / self.finished if self.finished else 0.0

    @property
    def timings(self) -> dict[str, Timing]:
        return dict(zip(MEASURES, (self.first_token, self.per_token, self.request), strict=True))

    def plus(self, other: "Tally") -> "Tally":
        return _tally([mine + its for mine, its in zip(_numbers(self), _numbers(other), strict=True)])

    def since(self, before: "Tally") -> "Tally":
        """What came to it after `before`, if this is a later state of the same counters."""
        return _tally([now - then for now, then in zip(_numbers(self), _numbers(before), strict=True)])


Tallies = Mapping[Key, Tally]
NOTHING = Tally()


def _numbers(tally: Tally) -> list[float]:
    return [tally.answered, tally.errors, tally.http_errors, *tally.first_token, *tally.per_token, *tally.request]


def _tally(numbers: list[float]) -> Tally:
    answered, errors, http_errors, *timings = numbers
    return Tally(answered, errors, http_errors, Timing(*timings[0:2]), Timing(*timings[2:4]), Timing(*timings[4:6]))


def read_tallies(text: str) -> dict[Key, Tally]:
    """Every version's tally on one replica since it started, from its /metrics. Raises ValueError if that is not Prometheus' text format."""
    names = (GENERATIONS, HTTP_ERRORS, *MEASURES.values())
    ours = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(names) and "_bucket{" not in line)  # a tenth of what vLLM writes
    samples: dict[Key, dict[str, float]] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            found = samples.setdefault((sample.labels.get("served", ""), sample.labels.get("version", "")), {})
            name = _meaning(sample.name, sample.labels)
            found[name] = found.get(name, 0.0) + sample.value

    def timing(found: Mapping[str, float], name: str) -> Timing:
        return Timing(found.get(f"{name}_sum", 0.0), found.get(f"{name}_count", 0.0))

    return {
        key: Tally(
            found.get("answered", 0.0), found.get("errors", 0.0), found.get("http_errors", 0.0), *(timing(found, measure) for measure in MEASURES.values())
        )
        for key, found in samples.items()
    }


def _meaning(name: str, labels: Mapping[str, str]) -> str:
    """What a sample counts: a field of `Tally`, a timing's sum or count, or something that is left out."""
    if name == GENERATIONS:
        finish = labels.get("finish", "")
        return "errors" if finish == "error" else "left out" if finish in NOT_JUDGED else "answered"
    if name == HTTP_ERRORS:
        return "http_errors" if labels.get("status_class") == "5xx" else "left out"
    return name


class Meter:
    """The tallies of all replicas together.

    A replica that is not heard for a while is caught up with when it is. One whose counters went back has restarted: what it has counted since is added. One that
    is heard for the first time adds what it has counted so far only to `ever`.
    """

    def __init__(self) -> None:
        self._last: dict[str, Tallies] = {}
        self._since: dict[Key, Tally] = {}
        self._before: dict[Key, Tally] = {}

    def take(self, replica: str, found: Tallies) -> None:
        """Adds what a replica (its URL) shows now."""
        known = self._last.get(replica)
        for key, now in found.items():
            if known is None:
                self._before[key] = self._before.get(key, NOTHING).plus(now)
                continue
            last = known.get(key, NOTHING)  # a version's series may go, and come again from 0
            went_back = any(new < old for new, old in zip(_numbers(now), _numbers(last), strict=True))
            self._since[key] = self._since.get(key, NOTHING).plus(now if went_back else now.since(last))
        self._last[replica] = found

    def since(self) -> dict[Key, Tally]:
        """What was counted since this meter began."""
        return dict(self._since)

    def ever(self) -> dict[Key, Tally]:
        """That, and what the replicas had counted before it, since each of them started."""
        return {key: self._before.get(key, NOTHING).plus(self._since.get(key, NOTHING)) for key in {*self._before, *self._since}}
