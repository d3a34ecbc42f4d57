"""What a load's requests come to: figures of each arm at each concurrency, and their ratios to those of another arm with an interval. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pipeline.bench.load import Answer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

THROUGHPUT = "output_tokens_per_second"
LATENCIES = ("first_token_p50_ms", "first_token_p95_ms", "per_token_p50_ms", "per_token_p95_ms", "end_to_end_p50_ms", "end_to_end_p95_ms")
METRICS = (THROUGHPUT, *LATENCIES)
RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0
"""The same requests give the same interval."""


@dataclass(frozen=True)
class Request:
    """One request as it is kept; `sent` since its run began, the others since it was sent. `error` is None where it was answered in full."""

    model: str
    kind: str
    sent_ms: float
    first_token_ms: float | None
    last_token_ms: float | None
    prompt_tokens: int | None
    answer_tokens: int | None
    error: str | None

    @property
    def per_token_ms(self) -> float:
        """Of each token after the first; NaN if there is none."""
        if self.first_token_ms is None or self.last_token_ms is None or (self.answer_tokens or 0) < 2:
            return math.nan
        return (self.last_token_ms - self.first_token_ms) / ((self.answer_tokens or 0) - 1)


def request_of(answer: Answer, began: float) -> Request:
    """`began`: when its run did, in `time.perf_counter` seconds."""

    def since_sent(at: float | None) -> float | None:
        return None if at is None else round((at - answer.sent) * 1000, 3)

    times = (round((answer.sent - began) * 1000, 3), since_sent(answer.first), since_sent(answer.parts[-1] if answer.parts else None))
    return Request(answer.model, answer.kind, *times, answer.prompt_tokens, answer.answer_tokens, answer.error)


@dataclass(frozen=True)
class Run:
    """One arm at one concurrency in one round, from the first request sent to the last answer's end."""

    arm: str
    concurrency: int
    round: int
    seconds: float
    requests: tuple[Request, ...]

    @property
    def answered(self) -> tuple[Request, ...]:
        return tuple(request for request in self.requests if request.error is None)

    @property
    def tokens(self) -> int:
        return sum(request.answer_tokens or 0 for request in self.answered)

    def as_dict(self) -> dict[str, Any]:
        """With the requests as columns."""
        own = {"arm": self.arm, "concurrency": self.concurrency, "round": self.round, "seconds": self.seconds}
        return own | {"requests": columns(self.requests)}


def columns(requests: Sequence[Request]) -> dict[str, list[Any]]:
    """A list for each of their fields."""
    return {column.name: [getattr(request, column.name) for request in requests] for column in fields(Request)}


def read_run(said: Mapping[str, Any]) -> Run:
    """What `as_dict` wrote."""
    rows = zip(*(said["requests"][column.name] for column in fields(Request)), strict=True)
    return Run(said["arm"], said["concurrency"], said["round"], said["seconds"], tuple(Request(*row) for row in rows))


@dataclass(frozen=True)
class Figures:
    """Of one arm at one concurrency, all rounds together. Tokens are means of the answered requests; `values` has each of METRICS, None where nothing was answered."""

    arm: str
    concurrency: int
    rounds: int
    requests: int
    failed: int
    first_error: str | None
    prompt_tokens: float | None
    answer_tokens: float | None
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Ratio:
    """`arm`'s metric divided by that of the arm `against`; between `low` and `high` with CONFIDENCE, both None where there is too little to tell.

    Rounds are drawn with replacement, the same ones for both arms, and within them requests (Efron and Tibshirani 1993, chapter 8); a throughput is a whole round's.
    Of few rounds such an interval is too narrow: its standard error is too small by about sqrt((n - 1) / n), and no more than n^n draws differ.
    """

    arm: str
    against: str
    concurrency: int
    metric: str
    ratio: float
    low: float | None
    high: float | None


def figures(runs: Sequence[Run]) -> list[Figures]:
    """By concurrency, then in the order in which the arms first come."""
    return [_figures([run for run in runs if (run.arm, run.concurrency) == key]) for key in _keys(runs)]


def _keys(runs: Iterable[Run]) -> list[tuple[str, int]]:
    """The sort is stable: arms stay as they first came."""
    return sorted(dict.fromkeys((run.arm, run.concurrency) for run in runs), key=lambda key: key[1])


def _figures(runs: Sequence[Run]) -> Figures:
    answered = [request for run in runs for request in run.answered]
    errors = [request.error for run in runs for request in run.requests if request.error is not None]
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    if answered:
        values[THROUGHPUT] = sum(run.tokens for run in runs) / sum(run.seconds for run in runs)
        values |= {metric: _known(value) for metric, value in zip(LATENCIES, _percentiles(_latencies(answered)), strict=True)}

    def mean(counts: Iterable[int | None]) -> float | None:
        return sum(count or 0 for count in counts) / len(answered) if answered else None

    return Figures(
        runs[0].arm,
        runs[0].concurrency,
        len(runs),
        sum(len(run.requests) for run in runs),
        len(errors),
        errors[0] if errors else None,
        mean(request.prompt_tokens for request in answered),
        mean(request.answer_tokens for request in answered),
        values,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _latencies(requests: Sequence[Request]) -> "Floats":
    """(requests, 3): ms to the first token, per token, to the last token."""
    import numpy as np

    rows = [(request.first_token_ms, request.per_token_ms, request.last_token_ms) for request in requests]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _percentiles(rows: "Floats") -> "Floats":
    """(..., requests, 3) -> (..., 6): those of LATENCIES, in that order. NaN stands for no value: a request of one token has no time per token; linear between values, as numpy's."""
    import numpy as np

    ordered = np.sort(rows, axis=-2)  # NaN last
    counts = np.count_nonzero(~np.isnan(rows), axis=-2)[..., None, :]
    found = []
    for share in (0.50, 0.95):
        place = np.maximum(counts - 1, 0) * share
        below = np.floor(place).astype(np.int64)
        low, high = (np.take_along_axis(ordered, at, axis=-2) for at in (below, np.ceil(place).astype(np.int64)))
        found.append(low + (high - low) * (place - below))
    return np.stack(found, axis=-1).reshape(*rows.shape[:-2], len(LATENCIES))


def ratios(runs: Sequence[Run], against: str) -> list[Ratio]:
    """Every other arm against that one, at each concurrency, in the rounds in which both answered anything; by concurrency, arm and metric."""
    found = []
    for arm, concurrency in _keys(runs):
        if arm == against:
            continue
        ours, theirs = ({run.round: run for run in runs if (run.arm, run.concurrency) == (name, concurrency) and run.answered} for name in (arm, against))
        pairs = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
        if pairs:
            found += _ratios(arm, against, concurrency, pairs)
    return found


def _ratios(arm: str, against: str, concurrency: int, pairs: Sequence[tuple[Run, Run]]) -> list[Ratio]:
    import numpy as np

    dice = np.random.default_rng(SEED)
    rounds = dice.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    ours, theirs = zip(*pairs, strict=True)
    measured = _figures(ours).values, _figures(theirs).values
    drawn = _drawn(ours, rounds, dice) / _drawn(theirs, rounds, dice)
    tail = (1 - CONFIDENCE) / 2 * 100
    lows, highs = np.percentile(drawn, (tail, 100 - tail), axis=0)
    found = []
    for metric, low, high in zip(METRICS, lows, highs, strict=True):
        one, other = (values[metric] for values in measured)
        if one is not None and other:
            sure = len(pairs) > 1 or (metric != THROUGHPUT and min(len(ours[0].answered), len(theirs[0].answered)) > 1)
            found.append(Ratio(arm, against, concurrency, metric, one / other, float(low) if sure else None, float(high) if sure else None))
    return found


def _drawn(runs: Sequence[Run], rounds: "NDArray[np.int64]", dice: "np.random.Generator") -> "Floats":
    """(draws, 7): METRICS of these rounds, (draws, rounds), with the requests of each drawn anew from its own."""
    import numpy as np

    tokens, seconds = (np.array([getattr(run, name) for run in runs], dtype=np.float64)[rounds].sum(axis=1) for name in ("tokens", "seconds"))
    counts = np.array([len(run.answered) for run in runs])
    rows = np.full((len(runs), counts.max(), 3), np.nan)
    for place, run in enumerate(runs):
        rows[place, : counts[place]] = _latencies(run.answered)
    picked = (dice.random((*rounds.shape, counts.max())) * counts[rounds][..., None]).astype(np.int64)
    latencies = rows[rounds[..., None], picked]
    latencies[np.arange(counts.max()) >= counts[rounds][..., None]] = np.nan  # a round with fewer requests stays one with fewer
    return np.concatenate(((tokens / seconds)[:, None], _percentiles(latencies.reshape(len(rounds), -1, 3))), axis=1)
