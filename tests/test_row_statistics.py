"""Figures of a split, and how they are shown."""

import pytest

from pipeline.row_statistics import Lengths, SplitStatistics, lengths, table


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], Lengths(0, 0.0, 0, 0)),
        ([7], Lengths(7, 7.0, 7, 7)),
        (list(range(100, 0, -1)), Lengths(5050, 50.5, 95, 100)),
        ([1] * 19 + [100], Lengths(119, 5.95, 1, 100)),
    ],
)
def test_lengths(values: list[int], wanted: Lengths) -> None:
    assert lengths(values) == wanted


def test_metrics_have_flat_names_and_the_table_a_line_per_split() -> None:
    split = SplitStatistics(2, 1, 3, lengths([10, 20]), lengths([4, 8]), lengths([5, 5]))
    metrics = split.metrics("train")
    assert metrics["dataset.train.rows"] == 2 and metrics["dataset.train.dropped"] == 1 and metrics["dataset.train.tokens_mean"] == 15
    assert len(metrics) == 3 + 3 * 4 and all(isinstance(value, float) for value in metrics.values())
    head, train, held_out = table({"train": split, "eval": split}).splitlines()
    assert head.startswith("split") and train.split()[:4] == ["train", "2", "1", "3"] and "15.0 / 20 / 20" in held_out
