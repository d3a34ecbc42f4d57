"""A checkpoint is gone on from only if all of it is there: every file missing or cut short, one at a time, makes it incomplete."""

import json
import zipfile
from pathlib import Path

import pytest

from pipeline.checkpoint import STATE_FILE, Checkpoint, best, checkpoints, evaluations_without_gain, is_complete, missing_room, resume_point, size_bytes
from tests.conftest import write_adapter

ONE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
TWO = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth")
SHARDED = (
    "scheduler.pt",
    "rng_state_0.pth",
    "rng_state_1.pth",
    "global_step5/mp_rank_00_model_states.pt",
    "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step5/zero_pp_rank_1_mp_rank_00_optim_states.pt",
)
LAYOUTS = {"one process": (ONE, 1, False), "two processes": (TWO, 2, False), "DeepSpeed": (SHARDED, 2, True)}


def write_checkpoint(output: Path, step: int = 5, pickles: tuple[str, ...] = ONE, state: dict[str, object] | None = None) -> Checkpoint:
    folder = write_adapter(output / f"checkpoint-{step}")
    for name in pickles:
        (folder / name).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("archive/data.pkl", "state" * 100)
    if "global_step5/mp_rank_00_model_states.pt" in pickles:
        (folder / "latest").write_text("global_step5", "utf-8")
    (folder / STATE_FILE).write_text(json.dumps({"global_step": step} | (state or {})), "utf-8")
    return Checkpoint(folder, step)


@pytest.mark.parametrize(("pickles", "processes", "sharded"), LAYOUTS.values(), ids=LAYOUTS)
def test_whole_ones_are_complete_and_each_missing_or_cut_file_is_found(tmp_path: Path, pickles: tuple[str, ...], processes: int, sharded: bool) -> None:
    whole = write_checkpoint(tmp_path, pickles=pickles)
    assert is_complete(whole, processes, sharded=sharded)
    for path in [path for path in whole.folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        assert not is_complete(whole, processes, sharded=sharded), f"without {path.name}"
        path.write_bytes(content[: len(content) // 2])
        assert not is_complete(whole, processes, sharded=sharded), f"half of {path.name}"
        path.write_bytes(content)
    assert is_complete(whole, processes, sharded=sharded)


def test_a_checkpoint_of_fewer_processes_is_not_gone_on_from(tmp_path: Path) -> None:
    assert not is_complete(write_checkpoint(tmp_path), 2, sharded=False)


def test_training_goes_on_from_the_newest_complete_one_and_incomplete_ones_are_removed(tmp_path: Path) -> None:
    assert resume_point(tmp_path, 1, sharded=False) is None
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "last-checkpoint").symlink_to("checkpoint-100")
    assert resume_point(tmp_path, 1, sharded=False) == Checkpoint(tmp_path / "checkpoint-10", 10)
    assert [found.step for found in checkpoints(tmp_path)] == [5, 10]


def test_the_adapter_is_taken_from_the_best_checkpoint_if_training_names_one(tmp_path: Path) -> None:
    assert best(tmp_path) is None
    write_checkpoint(tmp_path, 5)
    last = write_checkpoint(tmp_path, 10)
    assert best(tmp_path) == last
    write_checkpoint(tmp_path, 10, state={"best_model_checkpoint": "/elsewhere/swift/checkpoint-5"})
    assert best(tmp_path) == Checkpoint(tmp_path / "checkpoint-5", 5)


def test_the_last_checkpoint_is_known_by_steps_or_by_patience(tmp_path: Path) -> None:
    losses = [{"eval_loss": loss} for loss in (3.0, 1.0, 2.0, 2.0)]
    assert write_checkpoint(tmp_path, 10, state={"max_steps": 10, "log_history": []}).is_last(None)
    middle = write_checkpoint(tmp_path, 5, state={"max_steps": 10, "log_history": [{"loss": 1.0}, *losses]})
    assert not middle.is_last(None) and not middle.is_last(3) and middle.is_last(2)
    assert [evaluations_without_gain(losses[:count]) for count in range(5)] == [0, 0, 0, 1, 2]


def test_a_training_that_goes_on_takes_the_new_intervals(tmp_path: Path) -> None:
    found = write_checkpoint(tmp_path, 5, state={"save_steps": 50, "logging_steps": 5})
    found.take_cadence({"save_steps": 10, "logging_steps": 5})
    assert json.loads((found.folder / STATE_FILE).read_text("utf-8")) == {"global_step": 5, "save_steps": 10, "logging_steps": 5}
    assert is_complete(found, 1, sharded=False)


@pytest.mark.parametrize(("free", "missing"), [(10_000_000, None), (0, "missing"), (-1, "{0} bytes, {1} are free for it, {2} are missing")])
def test_the_room_that_the_next_checkpoint_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, missing: str | None) -> None:
    """Half a checkpoint goes before the next is written, so its bytes are free for that."""
    whole, half = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 10)
    (half.folder / STATE_FILE).unlink()
    for path in half.folder.iterdir():
        path.write_bytes(b"")
    (half.folder / "optimizer.pt").write_bytes(b"half")
    needed = size_bytes(whole)
    free = needed - 5 if free < 0 else free  # with the 4 bytes of the half one, one is missing
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    said = missing_room(tmp_path, 1, sharded=False)
    if missing is None:
        assert said is None
    else:
        wanted = missing.format(f"{needed:,}", f"{needed - 1:,}", "1")
        assert said and str(tmp_path) in said and wanted in said


def test_a_disk_without_room_for_the_first_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 4096}))
    assert "the first checkpoint takes more than the 4,096 bytes" in str(missing_room(tmp_path, 1, sharded=False))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 30}))
    assert missing_room(tmp_path, 1, sharded=False) is None
