"""Paired comparison: who is better, how surely, and on the same examples only."""

import math
import random

import pytest

from pipeline import comparison
from pipeline.comparison import Comparison, against_level, compare, worst
from pipeline.errors import InvalidInput
from pipeline.evaluation import Answer, Evaluation
from pipeline.example import Example


def rows(count: int, kind: str = "name") -> list[Example]:
    return [Example(({"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}), (), kind, row=row) for row in range(count)]


def answered(examples: list[Example], right: list[bool]) -> Evaluation:
    return Evaluation(tuple(Answer(example, "yes" if ok else "no", "m") for example, ok in zip(examples, right, strict=True)))


def overall(ours: list[bool], theirs: list[bool], confidence: float = 0.95) -> Comparison:
    examples = rows(len(ours))
    return compare(answered(examples, ours), answered(examples, theirs), "score", confidence)[0]


def test_a_gain_and_its_interval() -> None:
    found = overall([True] * 80 + [False] * 20, [True] * 60 + [False] * 40)
    assert (found.part, found.examples, found.mean, found.other_mean) == ("", 100, 0.8, 0.6)
    assert found.gain == pytest.approx(0.2) and 0.1 < found.low < 0.2 < found.high < 0.3


def test_pairing_tells_what_two_means_cannot() -> None:
    dice = random.Random(3)
    theirs = [dice.random() < 0.5 for _ in range(200)]
    ours = [ok or index % 20 == 0 for index, ok in enumerate(theirs)]  # better on a few, worse on none
    assert overall(ours, theirs).low > 0
    shuffled = dice.sample(ours, len(ours))
    assert overall(shuffled, theirs).low < 0


def test_the_same_answers_are_a_tie_and_the_interval_is_reproducible() -> None:
    same = overall([True, False] * 30, [True, False] * 30)
    assert (same.gain, same.low, same.high) == (0.0, 0.0, 0.0)
    ours, theirs = [True] * 33 + [False] * 27, [False, True] * 30
    assert overall(ours, theirs) == overall(ours, theirs)
    wide, narrow = overall(ours, theirs, 0.99), overall(ours, theirs, 0.5)
    assert wide.low < narrow.low <= narrow.high < wide.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 1000)  # a rougher interval, many times
    dice = random.Random(11)
    covered = 0
    for _ in range(100):
        pairs = [(dice.random() < 0.7, dice.random() < 0.6) for _ in range(150)]
        found = overall([ours for ours, _ in pairs], [theirs for _, theirs in pairs], 0.9)
        covered += found.low <= 0.1 <= found.high
    assert 80 <= covered <= 97


def test_parts_are_compared_on_their_own() -> None:
    examples = [*rows(30, "name"), *rows(10, "json")]
    ours, theirs = answered(examples, [True] * 30 + [False] * 10), answered(examples, [False] * 30 + [True] * 10)
    found = {each.part: each for each in compare(ours, theirs, "exact_match", 0.95)}
    assert (found["name"].gain, found["json"].gain, found["images=0"].gain) == (1.0, -1.0, 0.5)
    assert (found["json"].examples, found["images=0"].examples) == (10, 40)


def test_one_example_says_nothing() -> None:
    found = overall([True], [False])
    assert found.gain == 1.0 and math.isnan(found.low) and math.isnan(found.high)


def test_other_examples_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different examples"):
        compare(answered(rows(2), [True, True]), answered(rows(3)[1:], [True, True]), "score", 0.95)


def test_the_worst_regressions_come_first() -> None:
    examples = rows(4)
    ours, theirs = answered(examples, [False, True, False, False]), answered(examples, [False, False, True, True])
    assert [pair[0].example.row for pair in worst(ours, theirs, "score", 5)] == [2, 3]
    assert len(worst(ours, theirs, "score", 1)) == 1


def test_a_level_of_before_is_compared_with_as_a_number() -> None:
    found = against_level(answered(rows(40), [True] * 24 + [False] * 16), 0.95, "score", 0.95)
    assert (found.examples, found.mean, found.other_mean, found.gain) == (
        40,
        0.6,
        pytest.approx(0.95),
        pytest.approx(-0.35),
    ) and found.low < -0.35 < found.high < 0
    assert against_level(answered(rows(40), [True] * 40), 1.0, "score", 0.95).high == 0
    same = answered(rows(30), [True] * 29 + [False])
    assert against_level(same, same.mean("score"), "score", 0.95).gain == 0.0
    part = against_level(answered(rows(40), [False] * 20 + [True] * 20), 0.5, "score", 0.95, "images=0")
    assert (part.part, part.examples, part.gain) == ("images=0", 40, 0.0)
