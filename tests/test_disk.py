"""What may go and what never does, for each thing that piles up; removal touches nothing else, and a cut short one leaves nothing half there."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import basemodel, disk, process
from pipeline.disk import Entry, Known, Limits, Removal
from pipeline.project import Project
from pipeline.registry import Registered, Trace

HELD, NAMED, OLD, YOUNG, DELETED, ACTIVE, FOREIGN, MISSING, TRAINED = (letter * 32 for letter in "abcdef012")
"""Run ids: of a version, of a version without files, unfinished ones, one deleted in the registry, one that it has, one of a foreign version,
one that it does not have, one that was trained and never registered."""
DIGEST, LOST, LIVE = "1" * 64, "2" * 64, "3" * 64


class FakeRegistry:
    def registered(self) -> list[Registered]:
        return [
            Registered("shop/1", DIGEST, frozenset({HELD})),
            Registered("shop/2", None, frozenset({NAMED})),
            Registered("foreign/1", None, frozenset({FOREIGN})),
        ]

    def trace(self, run_id: str) -> Trace | None:
        return Trace(run_id == DELETED, "shop", run_id * 2) if run_id in (HELD, DELETED, ACTIVE, YOUNG, OLD, TRAINED) else None

    def holds_adapter(self, run_id: str) -> bool:
        return run_id in (HELD, FOREIGN)


class Remade(FakeRegistry):
    """Its database was lost and made again."""

    def registered(self) -> list[Registered]:
        return []

    def trace(self, run_id: str) -> Trace | None:
        return None


class Rebegun(Remade):
    """Lost and made again, and then one training began."""

    def trace(self, run_id: str) -> Trace | None:
        return Trace(False, "shop", "8" * 64) if run_id == YOUNG else None


def put(path: Path, days_old: float = 0.0, size_bytes: int = 5000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size_bytes)
    then = time.time() - days_old * 86400
    for touched in (path, path.parent):
        os.utime(touched, (then, then))
    return path


def aged(path: Path, days_old: float) -> None:
    """Gives the file and the folders above it, up to the run's, that age."""
    then = time.time() - days_old * 86400
    for touched in (path, *path.parents[:3]):
        os.utime(touched, (then, then))


@pytest.fixture
def full(project: Project) -> Project:
    """A project in which everything has piled up; nothing runs."""
    project.services.mkdir()
    put(project.bases / basemodel.tiny_name() / "model.safetensors")
    put(project.bases / "tiny-000000000000" / "model.safetensors")
    put(project.bases / ".tiny-000000000000.draft" / "model.safetensors")
    put(project.bases / "GLM-4.5V" / "model.safetensors")
    put(project.state / "cache" / "vllm" / "x" / "compiled")
    put(project.runs / HELD / "checkpoint-1" / "optimizer.pt")
    put(project.runs / NAMED / "adapter" / "adapter_model.safetensors", 30)
    put(project.runs / OLD / "train.parquet", 8)
    put(project.runs / YOUNG / "train.parquet", 6)
    put(project.runs / TRAINED / "adapter" / "adapter_model.safetensors", 30)
    os.utime(project.runs / TRAINED, (0, 0))
    for name in (
        "mlflow.log",
        "mlflow.log.1",
        f"training-{HELD}.log",
        f"training-{YOUNG}.log",
        f"training-{YOUNG}.log.1",
        f"training-{'9' * 32}.log",
        f"training-{'9' * 32}.log.1",
        f"training-{'9' * 32}.parity.log",
        "tuneserve.jsonl",
        "tuneserve.jsonl.1",
    ):
        put(project.logs / name)
    for digest in (DIGEST, LOST, LIVE, ".unfinished-12ab"):
        put(project.state / "serving" / "tiny" / "adapters" / digest / "adapter_model.safetensors")
    (project.state / "serving" / "tiny" / "adapters" / LOST).chmod(0o555)
    (project.state / "serving" / "tiny" / "live.json").write_text(json.dumps({"shop": {"digest": LIVE}}))
    put(project.logs / f"training-{'9' * 32}.ranks" / "0" / "stderr.log")
    for run_id in (HELD, FOREIGN, ACTIVE, DELETED, MISSING):
        aged(put(project.mlruns / "artifacts" / "1" / run_id / "artifacts" / "adapter" / "adapter_model.safetensors"), 8)
    aged(put(project.mlruns / "artifacts" / "1" / ("7" * 32) / "artifacts" / "model_card.md"), 8)
    put(project.mlruns / "artifacts" / "1" / "models" / "m")
    return project


def survey(project: Project, known: Known | None = None, days: float = 7, ours: bool = True, asked: bool = True, unregistered: bool = False) -> list[Entry]:
    if asked and known is None:
        known = disk.know(FakeRegistry(), disk.run_ids(project))
    return disk.survey(project, known, unknown="MLflow is away", artifacts_ours=ours, limits=Limits(days, unregistered))


def can_go(entries: list[Entry], category: str) -> set[str]:
    return {entry.path.name for entry in entries if entry.category == category and entry.removable}


def reason(entries: list[Entry], name: str, category: str) -> str:
    (found,) = (entry for entry in entries if entry.path.name == name and entry.category == category)
    assert not found.removable
    return found.reason


def snapshot(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.name.endswith((".lock", ".start"))}


def test_what_may_go_and_what_stays(full: Project) -> None:
    entries = survey(full)
    assert can_go(entries, disk.BASES) == {"tiny-000000000000", ".tiny-000000000000.draft"}
    assert can_go(entries, disk.CACHES) == {"vllm"}
    assert can_go(entries, disk.RUNS) == {HELD, OLD}
    assert can_go(entries, disk.LOGS) == {
        "mlflow.log.1",
        f"training-{HELD}.log",
        *(f"training-{'9' * 32}.{end}" for end in ("log", "log.1", "parity.log", "ranks")),
    }
    assert can_go(entries, disk.SERVED) == {LOST, ".unfinished-12ab"}
    assert can_go(entries, disk.ARTIFACTS) == {DELETED, "7" * 32}
    assert "only one" in reason(entries, NAMED, disk.RUNS)
    assert "registered version" in reason(entries, FOREIGN, disk.ARTIFACTS)
    assert "even without the registry" in reason(entries, LIVE, disk.SERVED)


def test_the_age_counts_for_unfinished_trainings_and_artifacts_without_a_run(full: Project) -> None:
    assert can_go(survey(full, days=30), disk.RUNS) == {HELD}
    assert can_go(survey(full, days=0), disk.RUNS) == {HELD, OLD, YOUNG}
    old = survey(full, days=9)
    assert can_go(old, disk.ARTIFACTS) == set() and "restore" in reason(old, DELETED, disk.ARTIFACTS)
    assert can_go(survey(full, days=7), disk.ARTIFACTS) == can_go(survey(full, days=0), disk.ARTIFACTS) == {DELETED, "7" * 32}


def test_an_adapter_goes_only_if_its_run_is_known_and_the_user_says_so(full: Project) -> None:
    assert "--unregistered" in reason(survey(full, days=0), TRAINED, disk.RUNS)
    assert can_go(survey(full, unregistered=True), disk.RUNS) == {HELD, OLD, TRAINED}
    assert can_go(survey(full, days=31, unregistered=True), disk.RUNS) == {HELD}
    put(full.runs / MISSING / "adapter" / "adapter_model.safetensors")
    entries = survey(full, days=0, unregistered=True)
    assert "no such run" in reason(entries, MISSING, disk.RUNS) and "hold an adapter" in reason(entries, MISSING, disk.ARTIFACTS)


def test_a_registry_that_was_lost_and_made_again_clears_nothing(full: Project) -> None:
    entries = survey(full, disk.know(Remade(), disk.run_ids(full)), days=0, unregistered=True)
    assert can_go(entries, disk.RUNS) == can_go(entries, disk.ARTIFACTS) == set() and can_go(entries, disk.SERVED) == {".unfinished-12ab"}
    assert {reason(entries, HELD, category) for category in (disk.RUNS, disk.ARTIFACTS)} == {reason(entries, LOST, disk.SERVED)} == {disk.STRANGE}
    assert f"training-{HELD}.log" not in can_go(entries, disk.LOGS)


def test_one_that_has_a_training_again_clears_no_adapter(full: Project) -> None:
    put(full.runs / HELD / "adapter" / "adapter_model.safetensors", 30)
    entries = survey(full, disk.know(Rebegun(), disk.run_ids(full)), days=0, unregistered=True)
    adapters = {path.relative_to(full.root).parts[2 if ".tuneserve" in path.parts else 3] for path in full.root.rglob("adapter_model.safetensors")}
    assert not adapters & (can_go(entries, disk.RUNS) | can_go(entries, disk.ARTIFACTS)) and {HELD, NAMED, TRAINED, FOREIGN, DELETED} <= adapters


def test_a_fetched_adapter_is_enough_to_know_the_registry_by(project: Project) -> None:
    for digest in (DIGEST, LOST):
        put(project.state / "serving" / "tiny" / "adapters" / digest / "adapter_model.safetensors")
    assert can_go(survey(project), disk.SERVED) == {LOST}
    assert can_go(survey(project, disk.know(Remade(), frozenset())), disk.SERVED) == set()


def test_samples_are_shown_and_left_to_their_server(project: Project) -> None:
    put(project.samples / "tiny" / "2020-01-01.jsonl", 2000)
    entries = survey(project, days=0, unregistered=True)
    assert can_go(entries, disk.SAMPLES) == set() and "delete the folder yourself" in reason(entries, "tiny", disk.SAMPLES)


def test_removal_takes_what_was_listed_and_nothing_else(full: Project) -> None:
    before = snapshot(full.root)
    entries = survey(full)
    assert snapshot(full.root) == before  # listing removes nothing
    removal = disk.remove(full, entries)
    going = {entry.path for entry in entries if entry.removable}
    assert set(removal.removed) == going and removal.left == {}
    assert removal.freed_bytes == sum(entry.size_bytes for entry in entries if entry.removable) >= 5000 * len(going)
    gone = {str(path.relative_to(full.root)) for path in going}
    assert snapshot(full.root) == {name for name in before if not any(name == path or name.startswith(f"{path}/") for path in gone)}
    assert disk.remove(full, survey(full)) == Removal((), 0, {})


def test_without_the_registry_nothing_goes_that_only_it_could_clear(full: Project) -> None:
    entries = survey(full, asked=False)
    assert can_go(entries, disk.RUNS) == can_go(entries, disk.ARTIFACTS) == set()
    assert can_go(entries, disk.SERVED) == {".unfinished-12ab"}
    assert reason(entries, OLD, disk.RUNS) == "MLflow is away"
    assert can_go(entries, disk.CACHES) and can_go(entries, disk.BASES)


def test_artifacts_of_another_registry_are_left_alone(full: Project) -> None:
    assert can_go(survey(full, ours=False), disk.ARTIFACTS) == set()


def test_a_run_that_began_after_the_registry_was_asked_stays(full: Project) -> None:
    known = disk.know(FakeRegistry(), disk.run_ids(full))
    put(full.runs / ("8" * 32) / "train.parquet", 30)
    put(full.mlruns / "artifacts" / "1" / ("8" * 32) / "x", 30)
    entries = survey(full, known)
    assert "8" * 32 not in can_go(entries, disk.RUNS) | can_go(entries, disk.ARTIFACTS)


@pytest.fixture
def sleeper(full: Project) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says of itself that it follows the registry as `tiny`."""
    environment = {**os.environ, "TUNESERVE_FOLLOWER": str(full.services / "vllm-tiny.settings")}
    child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], env=environment, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline()
    yield child
    child.kill()
    child.wait()


def test_while_a_replica_runs_its_adapters_the_caches_and_bases_stay(full: Project, sleeper: subprocess.Popen[bytes]) -> None:
    entries = survey(full)
    assert can_go(entries, disk.SERVED) == can_go(entries, disk.CACHES) == set()
    assert can_go(entries, disk.BASES) == {".tiny-000000000000.draft"}
    assert "vLLM dies" in reason(entries, LOST, disk.SERVED)
    sleeper.kill()
    sleeper.wait()
    assert can_go(survey(full), disk.SERVED) == {LOST, ".unfinished-12ab"}


def test_a_replica_that_starts_after_the_list_keeps_its_adapters(full: Project, request: pytest.FixtureRequest) -> None:
    entries = [entry for entry in survey(full) if entry.category == disk.SERVED]
    request.getfixturevalue("sleeper")
    removal = disk.remove(full, entries)
    assert removal.removed == () and len(removal.left) == 2 and all(entry.path.exists() for entry in entries)


def test_a_replica_that_is_being_started_keeps_its_adapters(full: Project) -> None:
    entries = [entry for entry in survey(full) if entry.category == disk.SERVED]
    with process.locked(full.services / "vllm-tiny.start"):
        assert len(disk.remove(full, entries).left) == 2


def test_a_training_that_runs_stays_with_its_log_and_the_caches(full: Project) -> None:
    with process.new_lease(full.runs / OLD / "training.lease"):
        entries = survey(full, days=0)
        assert reason(entries, OLD, disk.RUNS) == "it runs"
        assert OLD not in can_go(entries, disk.RUNS) and can_go(entries, disk.CACHES) == set()


def test_a_lease_that_nobody_holds_keeps_nothing(full: Project) -> None:
    process.new_lease(full.runs / OLD / "training.lease").close()
    os.utime(full.runs / OLD, (0, 0))
    os.utime(full.runs / OLD / "training.lease", (0, 0))
    assert OLD in can_go(survey(full), disk.RUNS)


def test_while_a_command_trains_unfinished_runs_stay_but_registered_ones_may_go(full: Project) -> None:
    lock = full.runs / "shop-0123456789abcdef.lock"
    lock.touch()
    entries = survey(full)
    with process.locked(lock):
        assert can_go(survey(full), disk.RUNS) == {HELD}
        removal = disk.remove(full, [entry for entry in entries if entry.category == disk.RUNS and entry.path.is_dir()])
    assert [path.name for path in removal.removed] == [HELD] and [path.name for path in removal.left] == [OLD]
    assert can_go(survey(full), disk.RUNS) == {OLD} and lock.exists()


def test_while_any_command_of_ours_runs_caches_and_old_bases_stay(full: Project) -> None:
    entries = survey(full)
    shared = [entry for entry in entries if entry.path.name in ("vllm", "tiny-000000000000")]
    with process.shared(full.in_use):
        assert can_go(survey(full), disk.CACHES) == set() and can_go(survey(full), disk.BASES) == {".tiny-000000000000.draft"}
        assert set(disk.remove(full, shared).left) == {entry.path for entry in shared}
    assert can_go(survey(full), disk.CACHES) == {"vllm"} and len(disk.remove(full, shared).removed) == 2


def test_while_a_training_lock_is_held_caches_stay_even_one_that_is_new_since_the_list(full: Project) -> None:
    entries = [entry for entry in survey(full) if entry.category == disk.CACHES]
    with process.locked(full.runs / "shop-0123456789abcdef.lock"):
        assert can_go(survey(full), disk.CACHES) == set()
        assert disk.remove(full, entries).removed == ()


def test_a_command_that_begins_while_caches_go_waits(full: Project) -> None:
    waited: list[str] = []
    with process.if_unlocked(full.in_use) as alone:
        begun = threading.Thread(target=lambda: hold_share(full.in_use, waited))
        begun.start()
        while not waited:
            time.sleep(0.01)
        assert alone and waited == ["waiting"]
    begun.join()
    assert waited == ["waiting", "has it"]


def hold_share(path: Path, waited: list[str]) -> None:
    with process.shared(path, lambda: waited.append("waiting")):
        waited.append("has it")


def test_the_lock_of_the_run_is_taken_even_if_no_file_was_there(full: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `train` that begins while the folder goes must wait, and then begin anew."""
    entries = [entry for entry in survey(full) if entry.path.name in (HELD, OLD)]
    seen: list[bool] = []

    def look(path: Path) -> None:
        lock = full.runs / f"shop-{path.name[:16]}.lock"
        with process.if_unlocked(lock) as free:
            seen.append(free)

    monkeypatch.setattr(disk, "discard", look)
    disk.remove(full, entries)
    assert seen == [False, False]


def test_a_training_that_resumes_after_the_list_keeps_its_folder_and_its_logs(full: Project) -> None:
    logs = [put(full.logs / f"training-{OLD}.{end}") for end in ("log", "log.1")] + [put(full.logs / f"training-{OLD}.ranks" / "0").parent]
    entries = survey(full)
    assert {path.name for path in logs} <= can_go(entries, disk.LOGS)
    with process.new_lease(full.runs / OLD / "training.lease"):
        left = disk.remove(full, entries).left
    assert all(path.exists() for path in logs) and {*logs, full.runs / OLD} <= set(left)


def test_the_logs_of_a_folder_that_could_not_go_stay(full: Project) -> None:
    logs = [entry for entry in survey(full) if entry.category == disk.LOGS]
    left = disk.remove(full, logs).left
    assert left == {full.logs / f"training-{HELD}.log": "its run's folder is still there"}


def test_what_was_written_to_since_the_list_stays(full: Project) -> None:
    entries = survey(full)
    put(full.logs / "mlflow.log.1", -1)
    put(full.mlruns / "artifacts" / "1" / DELETED / "artifacts" / "new", -1)
    left = disk.remove(full, entries).left
    assert {path.name for path in left} == {"mlflow.log.1", DELETED}


def test_a_killed_command_s_training_counts_until_it_has_ended(full: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = full.runs / OLD / "training.lease"
    process.new_lease(lease).close()
    os.utime(lease, (0, 0))
    os.utime(full.runs / OLD, (0, 0))
    supervisor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(lease)])
    try:
        assert disk.activity(full).trainings == {OLD}
    finally:
        supervisor.kill()
        supervisor.wait()
    assert disk.activity(full).trainings == set()


def test_old_locks_of_trainings_go_unless_they_are_held(full: Project) -> None:
    old, held, young = (full.runs / f"{name}-0123456789abcdef.lock" for name in ("old", "held", "young"))
    for lock in (old, held, young):
        lock.touch()
    with process.locked(held):
        for lock in (old, held):
            os.utime(lock, (0, 0))
        entries = survey(full)
        assert {name for name in can_go(entries, disk.RUNS) if name.endswith(".lock")} == {old.name}
        disk.remove(full, [entry for entry in entries if entry.path == old])
        assert not old.exists() and held.exists() and young.exists()


def test_a_tiny_base_that_is_being_made_stays(full: Project) -> None:
    entries = [entry for entry in survey(full) if entry.category == disk.BASES and entry.removable]
    with process.locked(full.bases / ".tiny.lock"):
        assert can_go(survey(full), disk.BASES) == set()
        assert len(disk.remove(full, entries).left) == 2


def test_links_are_neither_followed_nor_removed(full: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    precious = put(elsewhere / HELD / "precious")
    shutil.rmtree(full.runs / HELD)
    (full.runs / HELD).symlink_to(elsewhere / HELD)
    (full.runs / OLD / "inside").symlink_to(elsewhere)
    os.utime(full.runs / OLD, (0, 0))
    shutil.rmtree(full.state / "cache")
    (full.state / "cache").symlink_to(elsewhere)
    (full.mlruns / "artifacts" / "2").symlink_to(elsewhere)
    (full.logs / "x.log.1").symlink_to(precious)
    entries = survey(full, days=0)
    disk.remove(full, entries)
    assert precious.read_bytes() and (full.state / "cache").is_symlink() and (full.runs / HELD).is_symlink() and (full.logs / "x.log.1").is_symlink()
    assert not (full.runs / OLD).exists()
    assert all(entry.size_bytes < 5000 for entry in entries if entry.reason.startswith("links"))


def test_a_removal_that_is_cut_short_leaves_nothing_half_there_and_the_next_ends_it(full: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry for entry in survey(full) if entry.path.name == OLD]

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            disk.remove(full, entries)
    assert not (full.runs / OLD).exists()
    (rest,) = full.runs.glob(f"{disk.GONE}*")
    assert rest.name in can_go(survey(full), disk.RUNS)
    disk.remove(full, survey(full))
    assert not rest.exists()


def test_what_cannot_be_removed_is_said(full: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(f"{path}: no")

    monkeypatch.setattr(disk, "discard", refuse)
    removal = disk.remove(full, survey(full))
    assert (
        removal.removed == ()
        and removal.freed_bytes == 0
        and {why.rpartition(": ")[2] for why in removal.left.values()} == {"no", "its run's folder is still there"}
    )


def test_an_empty_project_has_nothing(project: Project) -> None:
    assert not disk.concerns_registry(project)
    assert survey(project, asked=False) == []
    assert "0.0 MiB of 0.0 MiB can go" in disk.summary(project, [], None)
