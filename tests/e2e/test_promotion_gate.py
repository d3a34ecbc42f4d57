"""What is better is promoted, what is not is kept out, and both are told. Runs after the promotions' tests, on the same server."""

import itertools
import json
import random
from pathlib import Path

import pytest

from pipeline.version import CHAMPION
from tests.e2e.conftest import Quickstart
from tests.e2e.test_promotion import answering, register_variant

ROWS = 60
CATALOG = Path("data/catalog")


@pytest.fixture(scope="module")
def recipe(quickstart: Quickstart) -> str:
    """The catalog's recipe with fewer held-out rows, of every kind."""
    root = quickstart.sandbox.root
    rows = (root / CATALOG / "eval.jsonl").read_text("utf-8").splitlines()
    (root / CATALOG / "eval-few.jsonl").write_text("\n".join(random.Random(1).sample(rows, ROWS)) + "\n", "utf-8")
    text = (root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8")
    assert "eval.jsonl" in text
    (root / "recipes/finetune/few.yaml").write_text(text.replace("eval.jsonl", "eval-few.jsonl"), "utf-8")
    return "recipes/finetune/few.yaml"


def entries(quickstart: Quickstart) -> list[dict[str, object]]:
    found: list[dict[str, object]] = quickstart.sandbox.json("history", "catalog", "--json", seconds=60)["entries"]
    return found


def aliases(quickstart: Quickstart) -> dict[str, str]:
    return {alias: str(number) for alias, number in quickstart.registry.client.get_registered_model("catalog").aliases.items()}


def test_an_evaluation_changes_nothing_and_is_recorded(quickstart: Quickstart, recipe: str) -> None:
    quickstart.registry.move_champion("catalog", "1")
    said = quickstart.sandbox.json("evaluate", "catalog/1", "--recipe", recipe, "--baselines", "--json", seconds=300)
    assert said["decision"]["verdict"] == "keep" and said["decision"]["reasons"][0]["code"] == "same-adapter"
    assert said["examples"] >= ROWS and set(said["scores"]) == {"catalog/1", "base", "base with examples"}
    assert said["scores"]["catalog/1"]["score"] > 0.9 and said["scores"]["base"]["score"] < 0.1
    assert said["parity"]["verdict"] == "faithful"
    overall = said["against"]["base"][0]
    assert overall["low"] > 0.5 and overall["examples"] == said["examples"]
    run = quickstart.registry.client.get_run(said["mlflow_run_id"])
    assert round(run.data.metrics["score"], 4) == said["scores"]["catalog/1"]["score"] and run.data.tags["tuneserve.decision"] == "keep"
    assert {entry.path for entry in quickstart.registry.client.list_artifacts(run.info.run_id)} == {"answers.jsonl", "assessment.json", "assessment.md"}
    assert aliases(quickstart) == {CHAMPION: "1"}


def test_a_worse_version_is_kept_out_and_told_why(quickstart: Quickstart, recipe: str, tmp_path: Path) -> None:
    worse = register_variant(quickstart, tmp_path / "adapter", 0.3)
    done = quickstart.sandbox.run("promote", worse.label, "--recipe", recipe, "--json", seconds=300)
    assert done.returncode == 1
    assert f"{worse.label} is not promoted, refuse: " in done.stderr and "part-worse" in done.stderr and "json" in done.stderr and "not-faithful" in done.stderr
    assert not json.loads(done.stdout.splitlines()[-1])["ok"]
    assert answering(quickstart, "catalog").startswith("catalog/1@")
    newest = entries(quickstart)[0]
    assert (newest["action"], newest["version"], newest["after"], newest["forced"]) == ("refused", worse.version, "1", False)
    assert json.loads(str(newest["scores"]))["score"]["champion"] > 0.9
    assert quickstart.registry.client.get_run(str(newest["evaluation_run"])).data.tags["tuneserve.evaluated"] == worse.label
    assert aliases(quickstart) == {CHAMPION: "1"}
    forced = quickstart.sandbox.json("promote", worse.label, "--force", "--json")
    assert forced["previous"] == "catalog/1"


def test_a_better_version_is_promoted_and_history_tells_all(quickstart: Quickstart, recipe: str) -> None:
    champion = quickstart.registry.champion_number("catalog")
    assert champion != "1"
    said = quickstart.sandbox.json("promote", "catalog/1", "--recipe", recipe, "--json", seconds=300)
    assert said["assessment"]["decision"]["verdict"] == "promote" and said["replicas"] == [quickstart.replica]
    assert answering(quickstart, "catalog").startswith("catalog/1@")
    told = entries(quickstart)
    assert [(entry["action"], entry["before"], entry["after"], entry["forced"]) for entry in told[:2]] == [
        ("promoted", champion, "1", False),
        ("promoted", "1", champion, True),
    ]
    assert all(newer["before"] == older["after"] for newer, older in itertools.pairwise(told))
    assert {"rolled-back", "failed", "moved-outside"} <= {entry["action"] for entry in told}


def test_a_version_without_a_recipe_says_what_to_do(quickstart: Quickstart, tmp_path: Path) -> None:
    bare = register_variant(quickstart, tmp_path / "adapter", 0.9)
    done = quickstart.sandbox.run("promote", bare.label, "--json", seconds=120)
    assert done.returncode == 1 and f"{bare.label} has no recipe.yaml" in done.stderr and "--recipe FILE" in done.stderr
