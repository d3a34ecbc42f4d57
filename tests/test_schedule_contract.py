"""Schedules against a real Prefect server and worker: one fires, runs one at a time, what was missed is not made up for, and prefect.yaml means the same."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings.models.server.concurrency import ServerConcurrencySettings

from flows.schedule import FORGETFUL, GRACE_SECONDS, HEARTBEAT_SECONDS, ZOMBIES, forgets_leases
from pipeline import basemodel, lineage, process, services
from pipeline.adapter import read_adapter
from pipeline.preflight import checked_rows
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.registry import Registry, flat
from tests import command
from tests.conftest import ROOT, write_adapter
from tests.test_cli import data_project

pytestmark = pytest.mark.contract
WAIT_SECONDS = 240.0
RECIPE = "recipes/finetune/catalog-tiny.yaml"
CRON = "0 3 * * 1"


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a server on a free port; it ends with the tests."""
    project = Project(tmp_path_factory.mktemp("prefect"))
    with services.prefect_server(project) as up:
        yield up.url + "/api"
    services.wait_all_ended(project)


@pytest.fixture(autouse=True)
def nothing_left(prefect: str) -> Iterator[None]:
    """What a test that failed had scheduled is not the next one's."""
    yield
    for found in asked(prefect, "deployments"):
        httpx.delete(f"{prefect}/deployments/{found['id']}", timeout=WAIT_SECONDS).raise_for_status()


def environment(prefect: str, project: Project) -> dict[str, str]:
    """As a user's, whose packages are this checkout's."""
    own = {"PREFECT_API_URL": prefect, "MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    own |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PREFECT_HOME": str(project.root / "home"), "HOME": str(project.root / "home")}
    return command.command_environment(**own)


def tuneserve(prefect: str, project: Project, *args: str) -> Any:
    argv = [sys.executable, "-m", "pipeline.cli", "schedule", *args, "--json"]
    done = subprocess.run(argv, cwd=project.root, env=environment(prefect, project), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def asked(prefect: str, what: str, **body: Any) -> Any:
    answer = httpx.post(f"{prefect}/{what}/filter", json=body, timeout=WAIT_SECONDS)  # flows that start beside it take both cores
    answer.raise_for_status()
    return answer.json()


def runs(prefect: str, *states: str) -> list[dict[str, Any]]:
    return [run for run in asked(prefect, "flow_runs", sort="EXPECTED_START_TIME_ASC") if run["deployment_id"] and run["state_type"] in states]


def wait_for(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"not after {WAIT_SECONDS:.0f} s: {what}"
        time.sleep(0.5)


def trained_project(project: Project) -> None:
    """A recipe of which there is nothing to do: its version is registered, and is champion."""
    path = data_project(project.root)
    path.write_text(path.read_text("utf-8").replace("{max_length_tokens: 60}", "{max_length_tokens: 60, device: cpu}"), "utf-8")
    recipe = load_recipe(path, FinetuneRecipe)
    base = basemodel.resolve_base_model(recipe.base_model, project, lambda *_: None)
    inputs = lineage.inputs_of(recipe, base, checked_rows(path, recipe, project))
    registry = Registry(f"sqlite:///{project.root}/mlflow.db")
    with registry.run("r", flat(recipe.model_dump(mode="json")), lineage.lineage_of(recipe, inputs, project.root)) as run:
        adapter = read_adapter(write_adapter(project.root / "adapter"))
        registry.register("r", run.run_id, adapter, {}, base.revision, basemodel.template_digest(), inputs.digest)
    registry.move_champion("r", "1")


def test_an_interval_fires_one_run_at_a_time_and_makes_up_for_nothing(
    prefect: str, project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, project.root)
    monkeypatch.chdir(project.root)  # where artifacts go
    trained_project(project)
    made = tuneserve(prefect, project, "recipes/r.yaml", "--interval", "5")
    assert (made["name"], made["overlap"], made["workers"], made["paused"]) == ("r", "cancel-new", 0, False)
    wait_for("runs are planned", lambda: len(runs(prefect, "SCHEDULED")) >= 3)
    planned = [run["id"] for run in runs(prefect, "SCHEDULED")[:3]]
    time.sleep(20)  # nobody is there, and three are missed
    worker = process.start(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "tuneserve"],
        name="worker",
        lease=project.root / "worker.lease",
        log=project.root / "worker.log",
        environment=environment(prefect, project),
        cwd=project.root,
    )
    try:
        wait_for("a run completes, and a later one", lambda: len(runs(prefect, "COMPLETED")) >= 2 or bool(runs(prefect, "FAILED", "CRASHED")))
        (shown,) = tuneserve(prefect, project, "--list")["schedules"]
        tuneserve(prefect, project, "recipes/r.yaml", "--pause")
        wait_for("the one that runs ends", lambda: not runs(prefect, "RUNNING", "PENDING"))
    finally:
        worker.end()
        print(worker.log.read_text("utf-8")[-6000:])
    assert not runs(prefect, "FAILED", "CRASHED")
    assert (
        (shown["workers"], shown["when"]) == (1, "every 5 s")
        and shown["last_run"]
        and shown["last_state"] in ("Completed", "Submitting", "Running", "Pending", "Cancelled")
    )
    ended = runs(prefect, "COMPLETED")
    assert all(one["end_time"] <= other["start_time"] for one, other in itertools.pairwise(ended))
    states = {run["id"]: run for run in asked(prefect, "flow_runs", flow_runs={"id": {"any_": planned}})}
    assert sum(states[each]["state_type"] == "COMPLETED" for each in planned) <= 1
    assert {states[each]["state_type"] for each in planned} <= {"COMPLETED", "CANCELLED"}
    texts = [found["data"] for found in asked(prefect, "artifacts") if found["key"] == "retrain"]
    assert len(texts) >= 2 and all("nothing to do" in text and "it is the champion" in text for text in texts)
    assert runs(prefect, "SCHEDULED") == [] and tuneserve(prefect, project, "--list")["schedules"][0]["paused"]
    resumed = tuneserve(prefect, project, "recipes/r.yaml", "--resume")
    assert not resumed["paused"]
    wait_for("runs are planned again", lambda: bool(runs(prefect, "SCHEDULED")))
    tuneserve(prefect, project, "--name", "r", "--remove")
    assert tuneserve(prefect, project, "--list")["schedules"] == [] and runs(prefect, "SCHEDULED") == []


def test_a_server_says_where_it_keeps_leases(prefect: str) -> None:
    assert ServerConcurrencySettings.model_fields["lease_storage"].default == FORGETFUL
    said = httpx.get(f"{prefect}/admin/settings", timeout=WAIT_SECONDS).json()["server"]["concurrency"]["lease_storage"]
    assert said == services.LEASES_ON_DISK["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] != FORGETFUL
    with temporary_settings({PREFECT_API_URL: prefect}):
        assert not forgets_leases()


def test_prefect_yaml_deploys_what_the_command_deploys(prefect: str, project: Project) -> None:
    for name in ("recipes", "data"):
        shutil.copytree(ROOT / name, project.root / name)
    shutil.copy(ROOT / "prefect.yaml", project.root)

    def deployed() -> dict[str, Any]:
        (found,) = asked(prefect, "deployments")
        own = ("name", "entrypoint", "description", "parameters", "tags", "concurrency_options", "enforce_parameter_schema", "parameter_openapi_schema")
        (timing,) = found["schedules"]
        more = {"limit": found["global_concurrency_limit"]["limit"], "pool": found["work_pool_name"], "folder": found["job_variables"]["working_dir"]}
        return {key: found[key] for key in own} | more | {"when": timing["schedule"], "slug": timing["slug"], "active": timing["active"]}

    tuneserve(prefect, project, RECIPE, "--cron", CRON)
    by_command = deployed()
    assert by_command["concurrency_options"] == {"collision_strategy": "CANCEL_NEW", "grace_period_seconds": 300} and by_command["limit"] == 1
    tuneserve(prefect, project, RECIPE, "--remove")
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    own = environment(prefect, project) | {"PWD": str(project.root)}
    done = subprocess.run(argv, cwd=project.root, env=own, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert deployed() == by_command
    tuneserve(prefect, project, RECIPE, "--cron", "0 4 * * *", "--overlap", "enqueue", "--timezone", "Europe/Berlin")  # and takes it over
    (found,) = tuneserve(prefect, project, "--list")["schedules"]
    assert (found["when"], found["overlap"]) == ("cron 0 4 * * * (Europe/Berlin)", "enqueue")
    other = Project(project.root / "other")
    shutil.copytree(project.root / "recipes", other.root / "recipes")
    shutil.copytree(project.root / "data", other.root / "data")
    argv = [sys.executable, "-m", "pipeline.cli", "schedule", RECIPE, "--cron", CRON]
    refused = subprocess.run(argv, cwd=other.root, env=environment(prefect, other), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert refused.returncode == 2 and f"in {project.root}; give another: --name NAME" in refused.stderr
    wrong = subprocess.run([*argv[:-1], "61 3 * * 1"], cwd=project.root, env=own, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert wrong.returncode == 2 and "--cron" in wrong.stderr
    (automation,) = [each for each in asked(prefect, "automations") if each["name"] == ZOMBIES]  # one, however often it was scheduled
    assert automation["trigger"]["within"] == GRACE_SECONDS >= 3 * HEARTBEAT_SECONDS
    tuneserve(prefect, project, RECIPE, "--remove")
    assert not [each for each in asked(prefect, "automations") if each["name"] == ZOMBIES]  # it goes with the last schedule


TIMED = """
import time
from prefect import flow
from prefect.flow_engine import FlowRunTimeoutError

@flow
def train():
    try:
        while True:
            time.sleep(0.2)
    except Exception:
        print("taken for a failure", flush=True)
    finally:
        print("cleaned up", flush=True)

@flow
def retrain():
    try:
        train.with_options(timeout_seconds=1.0)()
    except FlowRunTimeoutError:
        print("ended", flush=True)
        return 1

retrain()
"""


def test_a_flow_that_is_timed_out_cleans_up_and_says_so(prefect: str, project: Project) -> None:
    """What is raised within is no Exception, so that an MLflow run ends KILLED, not FAILED."""
    argv = [sys.executable, "-c", TIMED]
    done = subprocess.run(argv, env=environment(prefect, project), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    said = [line for line in done.stdout.splitlines() if line in ("cleaned up", "ended", "taken for a failure")]
    assert (done.returncode, said) == (0, ["cleaned up", "ended"]), done.stdout + done.stderr
