"""Two evaluations of the same examples against each other: the mean gain and how sure it is, overall and per part."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import Fault, InvalidInput
from pipeline.evaluation import METRICS, Answer, Evaluation

RESAMPLES = 10_000
SEED = 0
"""The same answers give the same interval."""


@dataclass(frozen=True)
class Comparison:
    """`gain` is the mean over examples of the one's metric minus the other's, -1 to 1; between `low` and `high` with the confidence that was asked for.

    NaN where fewer than two examples leave nothing to resample.
    """

    part: str
    """As `Answer.parts` names it; '' for all examples."""
    examples: int
    mean: float
    other_mean: float
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} against {self.other_mean:.1%}, {self.gain:+.1%} [{self.low:+.1%}, {self.high:+.1%}], {self.examples} examples"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(one: Evaluation, other: Evaluation, metric: str, confidence: float) -> list[Comparison]:
    """All examples first, then each part. The interval is the paired bootstrap's, by percentiles (Efron and Tibshirani 1993, chapter 13; scipy.stats.bootstrap).

    Raises InvalidInput if the two did not answer the same examples in the same order.
    """
    if [answer.example for answer in one.answers] != [answer.example for answer in other.answers]:
        raise InvalidInput([Fault("", "", "the two evaluations are of different examples; evaluate both on the same rows")])
    value = METRICS[metric]
    pairs = [(value(ours), value(theirs)) for ours, theirs in zip(one.answers, other.answers, strict=True)]
    found = [_compared("", pairs, confidence)]
    return found + [_compared(part, [pairs[index] for index in one.indices(part)], confidence) for part in one.parts]


def against_level(one: Evaluation, level: float, metric: str, confidence: float, part: str = "") -> Comparison:
    """All examples, or those of a part, against a mean of before, which counts as known; the interval tells how sure the mean of these is. As `compare`."""
    value = METRICS[metric]
    chosen = [one.answers[index] for index in one.indices(part)] if part else one.answers
    found = _compared(part, [(value(answer), level) for answer in chosen], confidence)
    return replace(found, other_mean=level, gain=round(found.gain, 9))  # a mean of equal numbers is off by float noise, and the same as before is no loss


def _compared(part: str, pairs: Sequence[tuple[float, float]], confidence: float) -> Comparison:
    import numpy as np
    from scipy.stats import bootstrap

    ours, theirs = np.array(pairs, dtype=float).T
    differences = ours - theirs
    low = high = math.nan
    if len(pairs) > 1 and np.isfinite(differences).all():
        drawn = bootstrap(
            (differences,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, batch=500, method="percentile", rng=np.random.default_rng(SEED)
        )
        low, high = float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
    return Comparison(part, len(pairs), float(ours.mean()), float(theirs.mean()), float(differences.mean()), low, high)


def worst(one: Evaluation, other: Evaluation, metric: str, count: int) -> list[tuple[Answer, Answer]]:
    """The answers of `one` that lost most against `other`'s, with these; only where it lost anything."""
    value = METRICS[metric]
    pairs = [(ours, theirs) for ours, theirs in zip(one.answers, other.answers, strict=True) if value(ours) < value(theirs)]
    return sorted(pairs, key=lambda pair: value(pair[0]) - value(pair[1]))[:count]
