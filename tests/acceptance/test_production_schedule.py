"""A deployment every 180 s on production's servers: trains and promotes, finds nothing to do, takes new rows in, and holds to its overlap policy."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.acceptance.figures import show
from tests.acceptance.production_environment import BUCKET, Production, production
from tests.acceptance.serving_environment import wait_until

RECIPE = "recipes/finetune/scheduled.yaml"
ROWS = "data/catalog/scheduled.jsonl"
INTERVAL_SECONDS = 180
FIRST, NEW = ("name", "use"), "colour"
"""The kinds of question that are there at first, and the one that comes in later."""
EVERY = 3
"""Of the held-out rows, every third is asked."""
RUN_SECONDS = 1200.0
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def rows(site: Production, file: str, *kinds: str) -> list[dict[str, Any]]:
    lines = (site.sandbox.root / "data/catalog" / file).read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] in kinds]


def write(path: Path, found: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".new")
    draft.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    draft.replace(path)


def write_recipe(site: Production) -> None:
    """The shipped recipe on rows of its own."""
    root = site.sandbox.root
    write(root / ROWS, rows(site, "train.jsonl", *FIRST))
    write(root / "data/catalog/scheduled-eval.jsonl", rows(site, "eval.jsonl", *FIRST, NEW)[::EVERY])
    shipped = yaml.safe_load((root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8"))
    own = {"dataset": {"train": ROWS, "eval": "data/catalog/scheduled-eval.jsonl"}, "promotion": {"floor": 0.3}}
    (root / RECIPE).write_text(yaml.safe_dump(shipped | own), "utf-8")


def score(site: Production) -> tuple[str, float]:
    """Which version answers the questions of the new kind, and the share that it answers right; some are held out from the gate too."""
    asked = rows(site, "eval.jsonl", NEW)[:20]
    versions, right = set(), 0
    for row in asked:
        question, wanted = (message["content"] for message in row["messages"])
        picture = base64.b64encode((site.sandbox.root / "data/catalog" / row["images"][0]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": question.removeprefix("<image>")},
        ]
        version, answer = site.answer("replica-1", "catalog", content)
        versions.add(version)
        right += answer == wanted
    (version,) = versions
    return version, right / len(asked)


def runs(site: Production, *states: str) -> list[dict[str, Any]]:
    """The schedule's runs in these states, by when they were due."""
    found = site.ask_prefect("flow_runs", sort="EXPECTED_START_TIME_ASC")
    return [run for run in found if run["deployment_id"] and run["state_type"] in states]


def said(site: Production, run: dict[str, Any]) -> str:
    """What a run that completed left as its artifact."""
    (text,) = [found["data"] for found in site.ask_prefect("artifacts") if found["key"] == "retrain" and found["flow_run_id"] == run["id"]]
    return str(text)


def next_completed(site: Production, seen: set[str]) -> dict[str, Any]:
    """The next run that completes; `seen` then has it."""

    def look() -> dict[str, Any] | None:
        assert not (bad := runs(site, "FAILED", "CRASHED")), bad
        return next((run for run in runs(site, "COMPLETED") if run["id"] not in seen), None)

    run = wait_until(look, RUN_SECONDS, "a run that completes", every=2.0)
    seen.add(run["id"])
    return run


def fire_beside(site: Production, deployment: str) -> str:
    """Fires the deployment while a run of it runs, without waiting for the clock; what the state of that run is in the end."""
    wait_until(lambda: runs(site, "RUNNING"), RUN_SECONDS, "a run that runs", every=1.0)
    made = httpx.post(f"{site.prefect}/deployments/{deployment}/create_flow_run", json={"state": {"type": "SCHEDULED"}}, timeout=30, trust_env=False)
    run = made.raise_for_status().json()["id"]
    return str(wait_until(lambda: next((each["state_type"] for each in runs(site, *ENDED) if each["id"] == run), None), 120, "its end", every=1.0))


def test_production_schedule(tmp_path: Path) -> None:
    began = time.monotonic()
    with production(tmp_path, replicas=1) as site:
        up_seconds = time.monotonic() - began
        write_recipe(site)
        made = site.json("schedule", RECIPE, "--interval", str(INTERVAL_SECONDS), *site.replica_options, "--json")
        assert (made["workers"], made["overlap"], made["when"]) == (1, "cancel-new", f"every {INTERVAL_SECONDS} s")
        (deployment,) = (each["id"] for each in site.ask_prefect("deployments"))
        seen: set[str] = set()

        beside = fire_beside(site, deployment)
        first = next_completed(site, seen)
        first_said = said(site, first)
        before = score(site)
        leaks = site.leaks()

        second_said = said(site, next_completed(site, seen))

        write(site.sandbox.root / ROWS, rows(site, "train.jsonl", *FIRST, NEW))
        dropped = time.time()
        while "nothing to do" in (third_said := said(site, third := next_completed(site, seen))):
            assert time.time() - dropped < INTERVAL_SECONDS + RUN_SECONDS
        after = score(site)

        status = site.run("status", "catalog", *site.replica_options, "--json")
        (shown,) = site.json("schedule", "--list", "--json")["schedules"]
        site.json("schedule", RECIPE, "--remove", "--json")
        wait_until(lambda: not runs(site, "RUNNING", "PENDING"), RUN_SECONDS, "the runs' end", every=1.0)
        history = [(entry["action"], entry["version"]) for entry in site.json("history", "catalog", "--json")["entries"]]
        store: Any = site.s3()
        keys = [entry["Key"] for entry in store.list_objects_v2(Bucket=BUCKET)["Contents"]]
        leaks += site.leaks()
        wait_until(lambda: not site.left_over(), 60, lambda: f"the end of {site.left_over()}", every=1.0)  # the last run's process
        overlapping = [run["expected_start_time"] for run in runs(site, "CANCELLED")]
        show(
            up_seconds=up_seconds,
            first={"said": first_said, "seconds": first["total_run_time"], "answers": before},
            fired_beside_it=beside,
            second=second_said,
            third={"said": third_said, "seconds": third["total_run_time"], "answers": after},
            cancelled_runs=len(overlapping),
            status_exit=status.returncode,
            history=history,
            schedule=shown,
            adapters_in_s3=sum(key.endswith("adapter_model.safetensors") for key in keys),
            secrets_found=leaks,
        )
        assert beside == "CANCELLED"
        assert "promoted" in first_said and "catalog/1" in first_said
        assert before[0].startswith("catalog/1@") and before[1] < 0.5
        assert "nothing to do" in second_said and "catalog/1" in second_said
        assert "promoted" in third_said and "catalog/2" in third_said
        assert after[0].startswith("catalog/2@") and after[1] >= 0.9
        assert status.returncode == 0
        assert history == [("promoted", "2"), ("promoted", "1")]
        assert sum(key.endswith("adapter_model.safetensors") for key in keys) == 2
        assert leaks == []
