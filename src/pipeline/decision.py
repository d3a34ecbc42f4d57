"""Whether a version becomes champion: `decide` says promote, keep or refuse, and why. Pure and total."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.comparison import Comparison
from pipeline.recipe import PromotionRules

Verdict = Literal["promote", "keep", "refuse"]


@dataclass(frozen=True)
class Reason:
    """`code` is kebab-case and stable; `message` gives the values."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True)
class Evidence:
    """What is known of a version. Every `..._fault` is None if that was proven, else why it was not.

    `mean` is the rules' metric over `examples` held-out rows, `p95_seconds` of its answers at the evaluation's concurrency. `against_champion`: overall first,
    then per part; None if the model has no champion. `champion` is its label.
    """

    examples: int
    mean: float
    p95_seconds: float
    servable_fault: str | None = None
    live_fault: str | None = None
    faithful_fault: str | None = None
    champion: str | None = None
    against_champion: Sequence[Comparison] | None = None
    same_digest: bool = False
    """The champion has the very same weights."""
    on_record: bool = False
    """The champion was not asked, since it is of another base or stack: it stands for itself by its record, and as good as that is enough."""


@dataclass(frozen=True)
class Decision:
    """`reasons` are all that speak against promotion, the most fundamental first; or, to promote, the one for it."""

    verdict: Verdict
    reasons: tuple[Reason, ...] = field(default=())

    @property
    def text(self) -> str:
        return f"{self.verdict}: " + "; ".join(map(str, self.reasons))

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": [reason.as_dict() for reason in self.reasons]}


def decide(evidence: Evidence, rules: PromotionRules) -> Decision:
    """Refuse what is not servable, live, faithful, measured, or is worse where that is not allowed; keep the champion on a tie; else promote.

    Where the champion stands by its record alone, what is not worse by more than `allowed_loss` is promoted.
    """
    refusals = tuple(_refusals(evidence, rules))
    if refusals:
        return Decision("refuse", refusals)
    overall = next(iter(evidence.against_champion or ()), None)
    if overall is None:
        return Decision(
            "promote", (Reason("above-floor", f"{rules.metric} {evidence.mean:.1%} is at least the floor of {rules.floor:.1%}, and there is no champion"),)
        )
    compared = f"{rules.metric} {overall} at {rules.confidence:.0%} confidence"
    if evidence.on_record:
        if not overall.gain >= -rules.allowed_loss:
            return Decision("refuse", (Reason("worse", f"{compared}: {evidence.champion} was better on record, by more than {rules.allowed_loss:.1%}"),))
        return Decision("promote", (Reason("as-good", f"{compared}: as good as {evidence.champion} on record, within {rules.allowed_loss:.1%}"),))
    if evidence.same_digest:
        return Decision("keep", (Reason("same-adapter", f"{evidence.champion} has the very same weights"),))
    if not overall.low > rules.minimum_gain:
        return Decision("keep", (Reason("no-gain", f"{compared}: not surely more than {rules.minimum_gain:.1%} better than {evidence.champion}"),))
    return Decision("promote", (Reason("better", f"{compared}: better than {evidence.champion}"),))


def _refusals(evidence: Evidence, rules: PromotionRules) -> Iterator[Reason]:
    for code, fault in (("not-servable", evidence.servable_fault), ("not-live", evidence.live_fault), ("not-faithful", evidence.faithful_fault)):
        if fault is not None:
            yield Reason(code, fault)
    if evidence.examples < rules.min_examples:
        yield Reason("too-few-examples", f"{evidence.examples} held-out examples; promotion.min_examples is {rules.min_examples}")
    if not math.isfinite(evidence.mean):
        yield Reason("not-measured", f"{rules.metric} is {evidence.mean}")
    elif rules.floor is not None and evidence.mean < rules.floor:
        yield Reason("below-floor", f"{rules.metric} {evidence.mean:.1%} is below promotion.floor {rules.floor:.1%}")
    if evidence.against_champion is None:
        if rules.floor is None:
            yield Reason("no-floor", "there is no champion to compare with; give promotion.floor, the least score that may be served")
    elif not evidence.against_champion:
        yield Reason("not-measured", "it was not compared with the champion")
    else:
        yield from _worse(evidence.against_champion, rules)
    if rules.max_p95_seconds is not None and not evidence.p95_seconds <= rules.max_p95_seconds:
        yield Reason("too-slow", f"p95 of an answer is {evidence.p95_seconds:.2f} s, more than promotion.max_p95_seconds {rules.max_p95_seconds:g}")


def _worse(comparisons: Sequence[Comparison], rules: PromotionRules) -> Iterator[Reason]:
    overall, *parts = comparisons
    if not all(map(math.isfinite, (overall.gain, overall.low, overall.high))):
        yield Reason("not-measured", f"the gain over the champion is {overall.gain} [{overall.low}, {overall.high}]")
    by_part = {comparison.part: comparison for comparison in parts}
    for name in rules.protect:
        if name not in by_part:
            yield Reason("part-missing", f"no held-out row is of {name!r}, which promotion.protect names; there are {', '.join(sorted(by_part)) or 'none'}")
        elif not by_part[name].gain >= -rules.allowed_loss:
            yield Reason("part-worse", f"{name}: {rules.metric} {by_part[name]}; a loss of {rules.allowed_loss:.1%} is allowed there")
