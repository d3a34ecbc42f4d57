"""What trainings' steps come to: read from ms-swift's log, figures of each arm, and their ratio with an interval. Pure but for the log."""

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.figures import CONFIDENCE, RESAMPLES, SEED


@dataclass(frozen=True)
class Training:
    """One arm in one round. `step_seconds`: of each timed step; `memory_gib`: the most that torch had reserved on a GPU, None on a CPU; `seconds`: from start to end."""

    arm: str
    round: int
    step_seconds: tuple[float, ...]
    memory_gib: float | None
    seconds: float


@dataclass(frozen=True)
class ArmFigures:
    """All rounds of an arm together. `tokens_per_second`: by the median step and the mean row; None where rows say nothing of a step's tokens.

    `ratio`: tokens/s of this arm divided by that of the arm it is held against, by median steps of the rounds that have both, between `low` and `high` with CONFIDENCE; None
    for that arm itself.
    """

    arm: str
    rounds: int
    steps: int
    step_p50_seconds: float
    step_p95_seconds: float
    tokens_per_second: float | None
    memory_gib: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def logged_steps(log: Path) -> list[Mapping[str, Any]]:
    """What ms-swift logged of each step so far; none if it has no log yet."""
    if not log.is_file():
        return []
    return [record for line in log.read_text("utf-8").splitlines() if line.endswith("}") and "loss" in (record := json.loads(line))]


def step_seconds(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each step, untimed ones too; ms-swift logs the mean since the start."""
    ended = [0.0, *(step["train_speed(s/it)"] * int(step["global_step/max_steps"].partition("/")[0]) for step in steps)]
    return [round(after - before, 4) for before, after in itertools.pairwise(ended)]


def read_training(line: Mapping[str, Any]) -> Training:
    """A line of the record."""
    return Training(**{**line, "step_seconds": tuple(line["step_seconds"])})


def arm_figures(trainings: Sequence[Training], against: str, tokens: float | None) -> list[ArmFigures]:
    """Of each arm, in the order in which they first come; `tokens`: of a step. Pure. An arm without a timed step is left out."""
    arms = dict.fromkeys(each.arm for each in trainings if each.step_seconds)
    of = {arm: [each for each in trainings if each.arm == arm and each.step_seconds] for arm in arms}
    return [_figures(of[arm], of.get(against, []) if arm != against else [], tokens) for arm in arms]


def _figures(ours: Sequence[Training], theirs: Sequence[Training], tokens: float | None) -> ArmFigures:
    import numpy as np

    steps = [second for each in ours for second in each.step_seconds]
    typical = statistics.median(steps)
    memory = max((each.memory_gib for each in ours if each.memory_gib is not None), default=None)
    found = (ours[0].arm, len(ours), len(steps), typical, float(np.percentile(steps, 95)), tokens / typical if tokens else None, memory)
    by_round = {each.round: each for each in theirs}
    pairs = [(each, by_round[each.round]) for each in ours if each.round in by_round]
    if not pairs:
        return ArmFigures(*found)
    ratio = _median(other for _, other in pairs) / _median(one for one, _ in pairs)
    if len(pairs) < 2:
        return ArmFigures(*found, ratio)
    dice = np.random.default_rng(SEED)
    rounds = dice.integers(len(pairs), size=(RESAMPLES, len(pairs)))  # the same ones for both arms: what drifts from round to round is in both
    drawn = [_drawn([pairs[index][1] for index in chosen], dice) / _drawn([pairs[index][0] for index in chosen], dice) for chosen in rounds]
    tail = (1 - CONFIDENCE) / 2 * 100
    return ArmFigures(*found, ratio, *(float(end) for end in np.percentile(drawn, (tail, 100 - tail))))


def _drawn(trainings: Sequence[Training], dice: Any) -> float:
    """The median of these trainings' steps, each one's drawn anew with replacement from its own (Efron and Tibshirani 1993, chapter 8)."""
    steps = [each.step_seconds[index] for each in trainings for index in dice.integers(len(each.step_seconds), size=len(each.step_seconds))]
    return float(statistics.median(steps))


def _median(trainings: Iterable[Training]) -> float:
    return statistics.median(second for each in trainings for second in each.step_seconds)
