"""Figures of the acceptance scripts: percentiles, bootstrap intervals, and the one JSON line that each script prints."""

import json
from collections.abc import Callable, Sequence

import numpy as np

ROUNDS = 2000


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.asarray(values), percent))


def interval(count: int, statistic: Callable[[np.ndarray], float], seed: int = 7) -> tuple[float, float]:
    """The middle 95 % of `statistic` over bootstrap samples of 0..count-1, drawn with replacement."""
    dice = np.random.default_rng(seed)
    drawn = [statistic(dice.integers(0, count, count)) for _ in range(ROUNDS)]
    return percentile(drawn, 2.5), percentile(drawn, 97.5)


def show(**figures: object) -> None:
    """Prints the script's line: floats with three digits after the point."""
    print(json.dumps(_rounded(figures)))


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(float(value), 3) if isinstance(value, float | np.floating) else value
