"""Two recipes that are due in the same minute on one host: one trains after the other, and a promotion of one model does not wait for another model's."""

import contextlib
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipeline.journal import FILE
from pipeline.lock import Lock
from pipeline.project import Project
from tests.acceptance.figures import show
from tests.acceptance.production_environment import Production, production
from tests.acceptance.serving_environment import wait_until
from tests.acceptance.small_retraining import write_recipe, write_rows

pytestmark = pytest.mark.timeout(3600)
MODELS = ("catalog", "shelf")
REPLICA = "replica-1"
RUN_SECONDS = 900.0


def runs(site: Production, model: str) -> list[dict[str, Any]]:
    """The schedule's runs that were not only planned."""
    found = httpx.get(f"{site.prefect}/deployments/name/retrain/{model}", timeout=30, trust_env=False).raise_for_status().json()
    given = {"deployments": {"id": {"any_": [found["id"]]}}, "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    return list(site.ask_prefect("flow_runs", sort="EXPECTED_START_TIME_ASC", **given))


def state(site: Production, model: str) -> str:
    return next((run["state_type"] for run in runs(site, model)), "")


def trainings(site: Production) -> dict[str, tuple[str, str]]:
    """When each model's training began and ended."""
    lines = map(json.loads, (Project(site.sandbox.root).logs / FILE).read_text("utf-8").splitlines())
    said = [(line["event"], line["name"], line["time"]) for line in lines if line["event"] in ("training started", "training ended")]
    return {model: (at("training started", model, said), at("training ended", model, said)) for model in MODELS}


def at(event: str, model: str, said: list[tuple[str, str, str]]) -> str:
    (found,) = [moment for what, name, moment in said if (what, name) == (event, model)]
    return found


def test_two_recipes_due_in_the_same_minute(tmp_path: Path) -> None:
    with production(tmp_path, replicas=1) as site:
        root = site.sandbox.root
        serving = root / f"recipes/serving/{REPLICA}.yaml"
        serving.write_text(yaml.safe_dump(yaml.safe_load(serving.read_text("utf-8")) | {"follow": list(MODELS)}), "utf-8")
        site.stop(REPLICA)
        site.start(REPLICA)
        due = time.gmtime(time.time() + 120)
        for model in MODELS:
            recipe = write_recipe(root, model)
            write_rows(root, model, 1)
            site.json("schedule", recipe, "--cron", f"{due.tm_min} {due.tm_hour} * * *", "--name", model, *site.replica_options, "--json")
        held, free = MODELS
        lock = Lock(f"tuneserve/promote/{held}", Project(root).services / f"promote-{held}.lock", site.database("mlflow"))
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock.held())  # as if a promotion of that model took long
            wait_until(lambda: state(site, free) == "COMPLETED", RUN_SECONDS, lambda: f"{free} promoted: {runs(site, free)}", every=1)
            promoted_meanwhile = state(site, held)
        wait_until(lambda: state(site, held) == "COMPLETED", RUN_SECONDS, lambda: f"{held} promoted: {runs(site, held)}", every=1)
        assert promoted_meanwhile == "RUNNING"
        first, second = sorted(trainings(site).values())
        assert first[1] <= second[0], "one trained while the other did"
        began = [runs(site, model)[0] for model in MODELS]
        assert len({run["expected_start_time"] for run in began}) == 1
        one, other = (datetime.fromisoformat(run["start_time"]) for run in began)
        for model in MODELS:
            live = site.ask_replica(REPLICA, "/adapters").json()["models"][model]["live"]
            assert live["version"] == "1"
        wait_until(lambda: not site.left_over(), 60, lambda: f"the end of {site.left_over()}", every=1)  # the last run's process
        show(
            due=began[0]["expected_start_time"],
            runs_started_seconds_apart=abs((one - other).total_seconds()),
            trainings=[first, second],
            while_one_promotion_waited=f"{free} was promoted",
        )
