"""Killed runs of a schedule against a real Prefect server and worker: each is marked as crashed, and its place is free, also if worker, run and server die at once."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.retrain import TRAINING_LOCK
from flows.schedule import GRACE_SECONDS, HEARTBEAT_SECONDS, ZOMBIES
from pipeline import process, services
from pipeline.project import Project
from tests.acceptance.figures import show
from tests.test_cli import data_project
from tests.test_schedule_contract import environment, tuneserve, wait_for

WINDOW_SECONDS = 60
"""Two heartbeats, so that the test need not wait for the real window."""
LEASE_SECONDS = 60
"""The shortest that Prefect takes."""
LATE_SECONDS = 60
"""What the server's loops, each some seconds apart, and a busy machine may add."""


@dataclass
class Prefect:
    """A server on one port, whatever happens to it, and a worker."""

    project: Project
    port: int
    server: process.Child | None = None
    worker: process.Child | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.server = self._started("server", argv, self.project.child_environment(services.LEASES_ON_DISK))
        services.wait_healthy(self.server, f"http://127.0.0.1:{self.port}", "/api/health", None, 120.0, lambda: None)

    def start_worker(self) -> None:
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "tuneserve"]
        self.worker = self._started("worker", argv, environment(self.api, self.project))

    def _started(self, name: str, argv: list[str], own: dict[str, str]) -> process.Child:
        root = self.project.root
        return process.start(argv, name=name, lease=root / f"{name}.lease", log=root / f"{name}.log", environment=own, cwd=root)

    def kill_all(self) -> None:
        """As when a host is gone: nobody can say anything any more."""
        assert self.server and self.worker
        gone = [*psutil.Process(self.worker.supervisor.pid).children(recursive=True), *psutil.Process(self.server.supervisor.pid).children(recursive=True)]
        for each in gone:
            each.kill()
        self.worker.end()
        self.server.end()

    def asked(self, method: str, path: str, **body: Any) -> Any:
        answer = httpx.request(method, f"{self.api}/{path}", json=body or None, timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self) -> Any:
        return self.asked("GET", "deployments/name/retrain/r")

    def slots(self) -> int:
        return int(self.asked("GET", f"v2/concurrency_limits/{self.deployment()['global_concurrency_limit']['id']}")["active_slots"])

    def state(self, run: str) -> str:
        return str(self.asked("GET", f"flow_runs/{run}")["state_type"])

    def run(self) -> str:
        """The id of a new run, once it has its place, has said so, and waits for the training before it."""
        made = self.asked("POST", f"deployments/{self.deployment()['id']}/create_flow_run", state={"type": "SCHEDULED"})["id"]
        wait_for("it runs", lambda: self.state(made) == "RUNNING")
        wait_for("its process waits", lambda: bool(self.processes()))
        beats = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{made}"]}}
        wait_for("it is heard", lambda: bool(self.asked("POST", "events/filter", filter=beats)["events"]))
        assert self.slots() == 1
        return str(made)

    def processes(self) -> list[psutil.Process]:
        """Of flow runs."""
        assert self.worker
        return [each for each in psutil.Process(self.worker.supervisor.pid).children(recursive=True) if "prefect.engine" in " ".join(each.cmdline())]


@pytest.fixture
def prefect(project: Project, empty_store: Path) -> Iterator[Prefect]:
    shutil.copy(empty_store, project.root)
    path = data_project(project.root)
    path.write_text(path.read_text("utf-8").replace("{max_length_tokens: 60}", "{max_length_tokens: 60, device: cpu}"), "utf-8")
    up = Prefect(project, services.free_port(0))
    up.start()
    try:
        yield up
    finally:
        for child in (up.worker, up.server):
            if child:
                child.end()
                print(child.log.read_text("utf-8")[-4000:])


def test_a_killed_run_is_crashed_and_its_place_is_free(prefect: Prefect) -> None:
    tuneserve(prefect.api, prefect.project, "recipes/r.yaml", "--cron", "0 3 1 1 *")
    (automation,) = [each for each in prefect.asked("POST", "automations/filter") if each["name"] == ZOMBIES]
    assert automation["trigger"]["within"] == GRACE_SECONDS >= 3 * HEARTBEAT_SECONDS
    assert prefect.deployment()["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)
    tuneserve(prefect.api, prefect.project, "recipes/r.yaml", "--cron", "0 4 1 1 *")  # and is not made twice
    assert len([each for each in prefect.asked("POST", "automations/filter") if each["name"] == ZOMBIES]) == 1
    automation["trigger"]["within"] = WINDOW_SECONDS
    prefect.asked("PUT", f"automations/{automation['id']}", **{key: automation[key] for key in ("name", "description", "enabled", "trigger", "actions")})
    seconds: dict[str, float] = {}
    with process.locked(prefect.project.runs / TRAINING_LOCK):  # as if another training held the host
        prefect.start_worker()

        killed = prefect.run()
        (flow,) = prefect.processes()
        began = time.monotonic()
        os.kill(flow.pid, signal.SIGKILL)
        wait_for("the worker reports it", lambda: prefect.state(killed) == "CRASHED" and prefect.slots() == 0)
        seconds["flow"] = time.monotonic() - began
        assert seconds["flow"] < 30

        lost = prefect.run()
        prefect.kill_all()
        began = time.monotonic()
        prefect.start()
        assert (prefect.state(lost), prefect.slots()) == ("RUNNING", 1)  # nobody has said otherwise
        wait_for("its silence is noticed", lambda: prefect.state(lost) == "CRASHED" and prefect.slots() == 0)
        seconds["flow, worker and server"] = time.monotonic() - began
        assert seconds["flow, worker and server"] < WINDOW_SECONDS + HEARTBEAT_SECONDS + LATE_SECONDS

        prefect.asked("PATCH", f"automations/{automation['id']}", enabled=False)
        prefect.start_worker()
        leased = prefect.run()
        lease = prefect.asked("GET", f"flow_runs/{leased}")["state"]["state_details"]["deployment_concurrency_lease_id"]
        prefect.kill_all()
        prefect.start()
        prefect.asked("POST", f"v2/concurrency_limits/leases/{lease}/renew", lease_duration=LEASE_SECONDS)  # it is known still: a run that lived would go on
        began = time.monotonic()
        wait_for("the lease ends", lambda: prefect.slots() == 0)
        seconds["lease"] = time.monotonic() - began
        assert LEASE_SECONDS - 5 < seconds["lease"] < LEASE_SECONDS + LATE_SECONDS and prefect.state(leased) == "RUNNING"
    show(script="zombies", seconds={what: round(took, 1) for what, took in seconds.items()})
    tuneserve(prefect.api, prefect.project, "--name", "r", "--remove")
    assert not [each for each in prefect.asked("POST", "automations/filter") if each["name"] == ZOMBIES]
