"""Disks that fill, on small file systems in memory (mounting them needs root): during a training, and under the registry's artifacts. What was done stays, and goes on."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint import Checkpoint, checkpoints, is_complete, size_bytes
from pipeline.registry import Registry
from tests.acceptance.figures import show
from tests.acceptance.test_training import RECIPE, change, curve, output
from tests.e2e.environment import Sandbox, make_sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
STEPS, CHECKPOINT_STEPS = 24, 4
DISK_BYTES = 64 << 20
BALLAST = "somebody-elses.log"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = make_sandbox(tmp_path)
    change(made, checkpoint_steps=CHECKPOINT_STEPS, epochs="null", max_steps=STEPS)
    yield made
    for left in made.processes():  # of a test that failed
        if "pipeline.cli" in left.cmdline():
            left.kill()
    made.run("down", "--json", seconds=90)
    made.wait_until_nothing_runs(seconds=10)


@pytest.fixture
def disk(sandbox: Sandbox) -> Iterator[Callable[[str, int], Path]]:
    """Mounts a disk of so many bytes on a folder of the project."""
    mounted: list[Path] = []

    def mount(folder: str, size: int) -> Path:
        path = sandbox.root / folder
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def whole(sandbox: Sandbox) -> list[Checkpoint]:
    folder = output(sandbox)
    return [each for each in checkpoints(folder) if is_complete(each, 1, sharded=False)] if folder else []


def wait_for(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def content(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {str(path.relative_to(checkpoint.folder)): path.read_bytes() for path in sorted(checkpoint.folder.rglob("*")) if path.is_file()}


def test_a_disk_that_fills_during_training(sandbox: Sandbox, disk: Callable[[str, int], Path]) -> None:
    runs = disk(".tuneserve/runs", DISK_BYTES)
    up = sandbox.json("up", "--json")
    process = sandbox.start("train", RECIPE, "--json")
    wait_for(process, lambda: len(whole(sandbox)) >= 2)
    needed = size_bytes(whole(sandbox)[0])
    free = os.statvfs(runs).f_bavail * os.statvfs(runs).f_frsize
    os.posix_fallocate((filled := os.open(runs / BALLAST, os.O_CREAT | os.O_WRONLY)), 0, free - needed // 2)
    os.close(filled)
    before = {each.step: content(each) for each in whole(sandbox)}
    out, err = process.communicate(timeout=120)
    said = json.loads(out.splitlines()[-1])["errors"][0]["message"]
    assert process.returncode == 1 and "Traceback" not in err.partition("the log is")[0]
    folder = output(sandbox)
    assert folder
    wanted = re.search(
        rf"the disk of {folder} is full: a checkpoint takes ([\d,]+) bytes, ([\d,]+) are free for it, ([\d,]+) are missing; .*tuneserve gc", said
    )
    assert wanted, said
    takes, left, missing = (int(number.replace(",", "")) for number in wanted.groups())
    assert needed <= takes < needed * 1.1 and takes == left + missing and 0 < missing < takes  # a checkpoint's record of what was logged grows
    kept = whole(sandbox)[-1]
    assert kept.step >= 2 * CHECKPOINT_STEPS and before.get(kept.step, content(kept)) == content(kept)
    registry = Registry(up["mlflow"])
    assert registry.newest("catalog") is None  # nothing is half registered

    remount(runs, "ro")
    done = sandbox.run("train", RECIPE)
    read_only = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Read-only file system" in read_only and str(runs) in read_only and "Traceback" not in done.stderr
    remount(runs, "rw")

    (runs / BALLAST).unlink()
    again = sandbox.json("train", RECIPE, "--json")
    assert (again["version"], again["trained"]) == (1, True)
    args = json.loads((runs / again["mlflow_run_id"] / "swift_args.json").read_text("utf-8"))
    assert args["resume_from_checkpoint"] == str(kept.folder)
    experiment = registry.client.get_experiment_by_name("tuneserve").experiment_id
    assert {run.info.run_id: run.info.status for run in registry.client.search_runs([experiment])} == {again["mlflow_run_id"]: "FINISHED"}
    assert max(curve(registry, again["mlflow_run_id"])) == STEPS
    show(checkpoint_bytes=takes, missing_bytes=missing, went_on_from_step=kept.step, of_steps=STEPS, says=said.partition(";")[0], read_only=read_only)


def test_an_artifact_store_that_is_full(sandbox: Sandbox, disk: Callable[[str, int], Path]) -> None:
    """The adapter waits, trained, until there is room; what was uploaded in part is no version."""
    store = disk("mlruns/artifacts", 64 << 10)
    up = sandbox.json("up", "--json")
    process = sandbox.start("train", RECIPE, "--json")
    heard: list[str] = []
    assert process.stderr
    for line in process.stderr:
        heard.append(line)
        if "trying again to register" in line:
            break
    assert "500" in heard[-1]
    registry = Registry(up["mlflow"])
    assert registry.newest("catalog") is None
    remount(store, "size=64m")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, "".join(heard) + err
    made = json.loads(out.splitlines()[-1])
    assert (made["version"], made["trained"]) == (1, True) and registry.holds_adapter(made["mlflow_run_id"])
    assert sandbox.json("train", RECIPE, "--json") == made | {"trained": False}
    show(said=heard[-1].strip())
