"""Ctrl-C and kill -9 of `tuneserve train` and `tuneserve quickstart` at three moments each: nothing of ours is left after 10 s."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.environment import Sandbox, make_sandbox

FINETUNE = "recipes/finetune/catalog-tiny.yaml"


def exists(pattern: str) -> Callable[[Sandbox], bool]:
    return lambda sandbox: any((sandbox.root / ".tuneserve").glob(pattern))


def logged(steps: int) -> Callable[[Sandbox], bool]:
    def enough(sandbox: Sandbox) -> bool:
        return any(path.read_text("utf-8").count("\n") >= steps for path in (sandbox.root / ".tuneserve/runs").glob("*/swift/logging.jsonl"))

    return enough


MOMENTS: dict[str, tuple[tuple[str, ...], Callable[[Sandbox], bool]]] = {
    "train, servers starting": (("train", FINETUNE), exists("logs/mlflow.log")),
    "train, model loading": (("train", FINETUNE), exists("logs/training-*.log")),
    "train, training": (("train", FINETUNE), logged(5)),
    "quickstart, Prefect starting": (("quickstart",), exists("logs/prefect.log")),
    "quickstart, vLLM starting": (("quickstart",), exists("logs/vllm-tiny-cpu.log")),
    "quickstart, training": (("quickstart",), logged(5)),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_left(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path)
    command, reached = MOMENTS[moment]
    process = sandbox.start(*command)
    deadline = time.monotonic() + 300
    while not reached(sandbox):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)  # into the moment, not at its edge
    running = len(sandbox.processes())
    process.send_signal(number)
    try:
        seconds = sandbox.wait_until_nothing_runs(seconds=10)
    finally:
        _, err = process.communicate()
    assert running >= 3
    assert "Traceback" not in err, err
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    print(json.dumps({"moment": moment, "signal": number.name, "processes": running, "gone_after_seconds": round(seconds, 1)}))
