"""Steps as ms-swift logs them, and what trainings come to."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.bench.steps import Training, arm_figures, logged_steps, read_training, step_seconds


def log(folder: Path, *means: float) -> Path:
    """A log with ms-swift's lines: a loss and the mean since the start for each step, then its summary."""
    lines = [{"loss": 2.0, "train_speed(s/it)": mean, "global_step/max_steps": f"{step}/{len(means)}"} for step, mean in enumerate(means, 1)]
    path = folder / "logging.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"train_runtime": 9.0, "global_step/max_steps": "3/3"}]), "utf-8")
    return path


def test_steps_are_told_from_means_since_the_start(tmp_path: Path) -> None:
    steps = logged_steps(log(tmp_path, 4.0, 3.0, 2.5))
    assert len(steps) == 3 and step_seconds(steps) == pytest.approx([4.0, 2.0, 1.5])


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = log(tmp_path, 4.0, 3.0)
    path.write_text(path.read_text("utf-8") + '{"loss": 1', "utf-8")
    assert len(logged_steps(path)) == 2 and logged_steps(tmp_path / "none") == []


def trainings(**arms: tuple[float, ...]) -> list[Training]:
    return [
        Training(arm, number, tuple(second * drift for second in seconds), 50.0, 9.0)
        for number, drift in enumerate((1.0, 1.1))
        for arm, seconds in arms.items()
    ]


def test_a_ratio_is_of_tokens_per_second_and_holds_steps_against_steps() -> None:
    train, bare = arm_figures(trainings(train=(2.0, 2.0, 2.2), bare=(1.8, 1.8, 1.98)), "bare", 4096.0)
    assert (train.arm, train.rounds, train.steps, train.memory_gib) == ("train", 2, 6, 50.0)
    assert train.ratio == pytest.approx(0.9, rel=0.001) and train.low is not None and train.high is not None and train.low <= 0.9 <= train.high
    assert bare.ratio is None and bare.tokens_per_second == pytest.approx(4096.0 / bare.step_p50_seconds)


def test_what_drifts_from_round_to_round_is_in_both_arms_and_not_in_the_interval() -> None:
    train, _ = arm_figures(trainings(train=(2.0, 2.0), bare=(1.8, 1.8)), "bare", None)
    assert (train.ratio, train.low, train.high) == pytest.approx((0.9, 0.9, 0.9))


def test_a_round_that_has_one_arm_alone_does_not_count_in_the_ratio() -> None:
    whole = trainings(train=(2.0, 2.0), bare=(1.0, 1.0))
    train, bare = arm_figures([*whole[:3], dataclasses.replace(whole[3], step_seconds=())], "bare", None)
    assert (train.rounds, bare.rounds) == (2, 1) and (train.ratio, train.low) == (0.5, None)


def test_one_round_has_no_interval_and_an_arm_without_steps_no_figures() -> None:
    once = [each for each in trainings(train=(2.0,), bare=(1.0,)) if each.round == 0]
    train, _ = arm_figures(once, "bare", None)
    assert (train.ratio, train.low, train.tokens_per_second) == (0.5, None, None)
    assert [each.arm for each in arm_figures([*once, dataclasses.replace(once[0], arm="cut", step_seconds=())], "bare", None)] == ["train", "bare"]


def test_a_training_is_read_as_it_was_written() -> None:
    for each in trainings(train=(2.0, 1.0)):
        assert read_training(json.loads(json.dumps(dataclasses.asdict(each)))) == each
