"""Workers answer in order, and none outlives its work."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.errors import TuneserveError
from pipeline.workers import CHUNK, FEW, workers

MANY = FEW + 3 * CHUNK + 1
SLOW = """
import sys, time
from pipeline.workers import FEW, workers
if __name__ == "__main__":
    with workers() as hired:
        print("begun", flush=True)
        list(hired.map(NAP, [0.05] * (8 * FEW)))
"""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.fixture
def deeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that workers can import, as they must."""
    lines = ["import os, signal, time", "def double(chunk): return [2 * each for each in chunk]", "def die(chunk): os.kill(os.getpid(), signal.SIGKILL)"]
    lines += ["def nap(chunk): return [time.sleep(each) for each in chunk]"]
    (tmp_path / "deeds_of_workers.py").write_text("\n".join(lines), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "deeds_of_workers"


def test_few_things_start_no_process() -> None:
    def double(chunk: Sequence[int]) -> list[int]:
        return [2 * thing for thing in chunk]

    with workers() as hired:
        assert list(hired.map(double, range(FEW))) == [2 * thing for thing in range(FEW)]
        assert multiprocessing.active_children() == []


def test_many_things_come_back_in_order(deeds: str) -> None:
    with workers() as hired:
        assert list(hired.map(__import__(deeds).double, range(MANY))) == [2 * thing for thing in range(MANY)]
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_a_few_large_things_are_worth_processes_too(deeds: str) -> None:
    with workers() as hired:
        assert list(hired.map(__import__(deeds).double, [1, 2], small=False)) == [2, 4]
        assert multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error_not_a_wait(deeds: str) -> None:
    with pytest.raises(TuneserveError, match="a worker process died"), workers() as hired:
        list(hired.map(__import__(deeds).die, range(MANY)))
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_while_another_is_started_is_that_error_too(deeds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise OSError("handle is closed")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", closed)
    with pytest.raises(TuneserveError, match="a worker process died"), workers() as hired:
        list(hired.map(__import__(deeds).double, range(MANY)))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent_at_once(deeds: str, tmp_path: Path, sign: signal.Signals) -> None:
    script = tmp_path / "slow.py"
    script.write_text(f"import os\nos.sched_getaffinity = lambda _: {{0, 1}}\nfrom {deeds} import nap as NAP\n{SLOW}", "utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        began = time.monotonic()
        while len(found := psutil.Process(process.pid).children(recursive=True)) < 3:  # two workers and multiprocessing's resource tracker
            assert time.monotonic() - began < 20
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(sign)
        process.wait(5)
    _, alive = psutil.wait_procs(found, timeout=3)
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []  # a zombie has ended, and waits for init to take note
