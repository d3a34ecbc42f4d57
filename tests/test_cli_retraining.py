"""retrain, approve, reject and schedule from the command line: what is refused before anything starts, and what is handed to the flows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import process
from pipeline.approval import Request
from pipeline.errors import InvalidInput
from pipeline.history import Grounds, history
from pipeline.lock import Lock
from pipeline.registry import Registry, Version
from pipeline.schedule import Schedule, Scheduled, checked_timing
from tests import command
from tests.test_cli import data_project
from tests.test_cli_serving import files_in, registered

__all__ = ["registered"]
SERVER = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
WEEKLY = "0 3 * * 1"


def tuneserve(cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return command.tuneserve(cwd, *args, **environment)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["retrain"], "Missing argument"),
        (["retrain", "none.yaml"], "cannot be read"),
        (["retrain", "recipes/r.yaml", "--watch", "10"], "is no duration"),
        (["retrain", "recipes/r.yaml", "--replica", "localhost:1"], "is no replica's address"),
        (["retrain", "recipes/r.yaml", "--serving", "none.yaml"], "cannot be read"),
        (["approve", "shop"], "give NAME/VERSION"),
        (["approve", "shop/x"], "give NAME or NAME/VERSION"),
        (["approve", "shop/1", "--watch", "soon"], "is no duration"),
        (["reject", "shop/1"], "Missing option '--why'"),
        (["reject", "shop", "--why", "x"], "give NAME/VERSION"),
        (["reject", "shop/1", "--why", " "], "1 to 300 characters"),
        (["schedule"], "tuneserve schedule RECIPE --cron"),
        (["schedule", "recipes/r.yaml"], "neither is given"),
        (["schedule", "recipes/r.yaml", "--cron", WEEKLY, "--interval", "5"], "both are given"),
        (["schedule", "recipes/r.yaml", "--cron", "weekly"], "has not five fields"),
        (["schedule", "recipes/r.yaml", "--interval", "0"], "0 is not in the range"),
        (["schedule", "recipes/r.yaml", "--interval", "5", "--timezone", "Europe/Berlin"], "goes with --cron"),
        (["schedule", "recipes/r.yaml", "--cron", WEEKLY, "--timezone", "Mars/North"], "give an IANA name"),
        (["schedule", "recipes/r.yaml", "--interval", "5", "--timeout", "3"], "is no duration"),
        (["schedule", "recipes/r.yaml", "--interval", "5", "--overlap", "skip"], "is not one of"),
        (["schedule", "--pause"], "names no schedule"),
        (["schedule", "--list", "recipes/r.yaml"], "goes without recipe"),
        (["schedule", "recipes/r.yaml", "--remove", "--cron", WEEKLY], "goes without --cron"),
        (["schedule", "recipes/r.yaml", "--cron", WEEKLY], "PREFECT_API_URL: is not set"),
        (["schedule", "--list"], "or start the embedded one (tuneserve up)"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(project: Any, args: list[str], said: str) -> None:
    data_project(project.root)
    before = files_in(project.root)
    done = tuneserve(project.root, *args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert files_in(project.root) == before


def test_a_recipe_that_cannot_be_trained_is_not_scheduled(project: Any) -> None:
    recipe = data_project(project.root)
    (project.root / "e.jsonl").unlink()
    done = tuneserve(project.root, "schedule", str(recipe), "--cron", WEEKLY, "--json", **SERVER)
    (fault,) = json.loads(done.stdout)["errors"]
    assert done.returncode == 2 and fault["path"] == "dataset.eval" and not (project.root / "mlruns").exists()


def test_a_schedule_names_the_embedded_server_if_it_runs(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "recipes").mkdir()
    project.services.mkdir(parents=True)
    record = {"name": "prefect", "url": "http://127.0.0.1:4200", "pid": 1, "started": "now", "identity": "", "log": "", "lease": ""}
    (project.services / "prefect.json").write_text(json.dumps(record), "utf-8")
    monkeypatch.setattr(process, "started", lambda pid: "now")
    done = tuneserve(project.root, "schedule", "--list", "--json")
    assert done.returncode == 2 and "export PREFECT_API_URL=http://127.0.0.1:4200/api" in json.loads(done.stdout)["errors"][0]["message"]


@pytest.mark.parametrize("args", [["--list"], ["r", "--pause"], ["recipes/r.yaml", "--interval", "60"]])
def test_a_prefect_server_that_is_away_is_said_so(project: Any, args: list[str]) -> None:
    data_project(project.root)  # a process of its own: Prefect reads its server's address once, and other tests here may have had it read none
    argv = [sys.executable, "-m", "pipeline.cli", "schedule", *args, "--json"]
    done = subprocess.run(argv, cwd=project.root, env=command.command_environment(**SERVER), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and "no Prefect server answers at PREFECT_API_URL" in json.loads(done.stdout.splitlines()[-1])["errors"][0]["message"]


def test_what_a_schedule_is_asked_reaches_the_deployment(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import schedule as deployments

    recipe = data_project(project.root)
    serving = project.root / "recipes" / "s.yaml"
    serving.write_text("name: s\nbase_model: base\nfollow: [r]\nevaluation_replica: 'http://own:1'\n", "utf-8")
    asked: list[Schedule] = []

    def deploy(schedule: Schedule, flow: Any, project: Any) -> Scheduled:
        asked.append(schedule)
        assert flow.name == "retrain"
        return Scheduled(schedule.name, schedule.recipe, schedule.when, schedule.overlap, schedule.pool, paused=False, workers=0)

    monkeypatch.setattr(deployments, "deploy", deploy)
    monkeypatch.setattr(deployments, "forgets_leases", lambda: True)
    done = tuneserve(project.root, "schedule", str(recipe), "--cron", WEEKLY, **SERVER)
    plain = {"recipe_path": "recipes/r.yaml", "training_seconds": 72 * 3600.0}
    assert done.returncode == 0, done.stderr
    assert asked.pop() == Schedule("r", "recipes/r.yaml", plain, cron=WEEKLY)
    assert f"cron {WEEKLY} (UTC), overlap cancel-new; next not planned yet; no run yet; 0 workers" in done.stdout
    assert "prefect worker start --pool tuneserve" in done.stdout
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem" in done.stderr
    monkeypatch.setattr(deployments, "forgets_leases", lambda: False)
    options = ["--interval", "600", "--overlap", "enqueue", "--timeout", "2h", "--watch", "10m", "--serving", str(serving), "--replica", "http://a:1"]
    done = tuneserve(project.root, "schedule", str(recipe), *options, "--name", "often", "--pool", "gpu", "--json", **SERVER)
    more = {"training_seconds": 7200.0, "watch_seconds": 600.0, "serving": "recipes/s.yaml", "replicas": ["http://a:1"]}
    assert asked.pop() == Schedule("often", "recipes/r.yaml", plain | more, interval_seconds=600, overlap="enqueue", pool="gpu")
    assert "warning" not in done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["name"], said["when"], said["worker"]) == ("often", "every 600 s", "prefect worker start --pool gpu")


def test_a_time_zone_is_one_that_exists() -> None:
    assert (checked_timing(WEEKLY, None, "Europe/Berlin"), checked_timing(None, 5, None)) == ("Europe/Berlin", "UTC")
    for wrong in ("../etc/passwd", "", "Berlin"):
        with pytest.raises(InvalidInput, match="IANA name"):
            checked_timing(WEEKLY, None, wrong)


def test_an_answer_without_a_request_says_what_to_do(project: Any, registered: tuple[Registry, Version]) -> None:
    for args in (["reject", "shop/2", "--why", "prices"], ["reject", "shop/9", "--why", "prices"]):
        done = tuneserve(project.root, *args, "--json", MLFLOW_TRACKING_URI=registered[0].uri)
        (error,) = json.loads(done.stdout.splitlines()[-1])["errors"]
        assert done.returncode == 1 and ("tuneserve promote shop/2" in error["message"] or "not found" in error["message"])


def test_a_rejection_from_the_command_line(project: Any, registered: tuple[Registry, Version], tmp_path: Path) -> None:
    from pipeline.approval import ask

    registry, second = registered
    request = ask(registry, second, Lock("promote/shop", tmp_path / "lock"), Grounds("flow@host", "promote: better", gate="g"), "1", 7)
    assert isinstance(request, Request)
    done = tuneserve(project.root, "reject", "shop/2", "--why", "wrong  prices", MLFLOW_TRACKING_URI=registry.uri)
    newest = history(registry, "shop")[0]
    assert (done.returncode, done.stdout) == (0, "shop/2 is rejected: wrong prices\n")
    assert (newest.action, newest.version, newest.grounds.reasons, newest.grounds.gate) == ("rejected", "2", "rejected: wrong prices", "g")
    again = tuneserve(project.root, "reject", "shop/2", "--why", "again", "--json", MLFLOW_TRACKING_URI=registry.uri)
    assert again.returncode == 1 and "closed" in again.stdout
