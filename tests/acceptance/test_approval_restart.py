"""A version that waits for a person: everything is stopped and started, it still waits, is approved and promoted; another's time passes, and the champion is kept."""

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.history import history
from pipeline.registry import Registry
from tests.acceptance.figures import show
from tests.acceptance.production_environment import MLFLOW, POSTGRESQL, PREFECT, S3, WORKER, Production, production
from tests.acceptance.small_retraining import write_recipe, write_rows

pytestmark = pytest.mark.timeout(3600)
MODEL, REPLICA = "catalog", "replica-1"
SHORT_SECONDS = 30


def live(site: Production) -> Any:
    return site.ask_replica(REPLICA, "/adapters").json()["models"].get(MODEL, {}).get("live")


def retrain(site: Production, recipe: str) -> Any:
    return site.json("retrain", recipe, *site.replica_options, "--json", seconds=900)


def test_a_request_for_approval_survives_a_restart_of_everything(tmp_path: Path) -> None:
    with production(tmp_path, replicas=1) as site:
        root = site.sandbox.root
        recipe = write_recipe(root, MODEL, "approval: manual")
        write_rows(root, MODEL, 1)
        asks = retrain(site, recipe)
        assert (asks["trained"], asks["promoted"], asks["decision"]["code"]) == (True, False, "asks-for-approval") and live(site) is None

        servers = (POSTGRESQL, S3, MLFLOW, PREFECT, WORKER, REPLICA)
        began = time.monotonic()
        for name in reversed(servers):
            site.stop(name)
        assert not site.sandbox.processes()
        for name in servers:
            site.start(name)
        restart_seconds = time.monotonic() - began
        waits = retrain(site, recipe)
        assert (waits["trained"], waits["nothing_to_do"], waits["decision"]["code"]) == (False, True, "waits-for-approval") and live(site) is None
        done = site.json("approve", f"{MODEL}/1", *site.replica_options, "--json")
        assert done["version"] == 1 and live(site)["version"] == "1"
        assert retrain(site, recipe)["decision"]["code"] == "is-champion"

        write_recipe(root, MODEL, f"approval: manual, approval_days: {SHORT_SECONDS / 86400:.6f}")
        write_rows(root, MODEL, 2)
        second = retrain(site, recipe)
        assert (second["trained"], second["version"], second["decision"]["code"]) == (True, 2, "asks-for-approval")
        time.sleep(SHORT_SECONDS)
        lapsed = retrain(site, recipe)
        assert not lapsed["promoted"] and "kept" in " ".join(lapsed["answered"]) and live(site)["version"] == "1"
        late = site.run("approve", f"{MODEL}/2", *site.replica_options)
        assert late.returncode != 0 and live(site)["version"] == "1"
        told = [(entry.action, entry.version) for entry in history(Registry(site.mlflow), MODEL)][::-1]
        assert told == [("requested", "1"), ("promoted", "1"), ("requested", "2"), ("kept", "2")]
        assert not site.left_over()
        show(restart_seconds=restart_seconds, history=told, lapsed=lapsed["answered"], too_late=late.stderr.strip().splitlines()[-1])
