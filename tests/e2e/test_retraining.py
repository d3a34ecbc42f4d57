"""Retraining with real servers: nothing to do, a version that is kept out once, and one that asks first. Runs after the recipes' tests, on the same server."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.version import APPROVAL_TAG
from tests.e2e.conftest import Quickstart
from tests.e2e.test_promotion import answering

RECIPE = Path("recipes/finetune/retrained.yaml")


@pytest.fixture(scope="module", autouse=True)
def recipe(quickstart: Quickstart) -> None:
    """The catalog's recipe with a tenth of its held-out rows and, for a version that any champion beats, half an epoch."""
    root = quickstart.sandbox.root
    rows = (root / "data/catalog/eval.jsonl").read_text("utf-8").splitlines()
    (root / "data/catalog/eval-tenth.jsonl").write_text("\n".join(random.Random(2).sample(rows, 40)) + "\n", "utf-8")
    write(quickstart, {"epochs: 8": "epochs: 0.5"})


def write(quickstart: Quickstart, changed: dict[str, str]) -> None:
    root = quickstart.sandbox.root
    text = (root / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8")
    for old, new in {"eval.jsonl": "eval-tenth.jsonl", **changed}.items():
        assert old in text
        text = text.replace(old, new)
    (root / RECIPE).write_text(text, "utf-8")


def retrain(quickstart: Quickstart, *options: str) -> dict[str, Any]:
    said: dict[str, Any] = quickstart.sandbox.json("retrain", str(RECIPE), "--json", *options, seconds=600)
    return said


def newest(quickstart: Quickstart) -> dict[str, Any]:
    entries = quickstart.sandbox.json("history", "catalog", "--json", seconds=60)["entries"]
    return dict(entries[0])


def test_what_is_kept_out_is_a_success_and_is_not_done_again(quickstart: Quickstart) -> None:
    quickstart.registry.move_champion("catalog", "1")
    before = quickstart.registry.newest("catalog")  # other tests also register folders, which have no origin
    assert before
    why = "recipe-changed" if "input_digest" in quickstart.registry.lineage(before) else "origin-unknown"
    first = retrain(quickstart)
    assert first["trained"] and not first["promoted"] and first["decision"]["code"] == "kept-out"
    assert why in [reason["code"] for reason in first["changes"]]
    assert newest(quickstart)["action"] == "refused" and answering(quickstart, "catalog").startswith("catalog/1@")
    again = retrain(quickstart)
    assert again["nothing_to_do"] and (again["version"], again["decision"]["code"]) == (first["version"], "refused-before")


def test_a_better_version_asks_and_is_promoted_once_approved(quickstart: Quickstart) -> None:
    """catalog/1, found by its inputs again, is better than the half-trained one."""
    worse = quickstart.registry.newest("catalog")
    assert worse
    quickstart.sandbox.json("promote", worse.label, "--force", "--json")
    write(quickstart, {"promotion:": "promotion:\n  approval: manual\n  minimum_gain: 0.01"})
    asks = retrain(quickstart)
    assert not asks["trained"] and (asks["version"], asks["decision"]["code"]) == (1, "asks-for-approval")
    assert answering(quickstart, "catalog").startswith(f"{worse.label}@")
    assert retrain(quickstart)["decision"]["code"] == "waits-for-approval"
    done = quickstart.sandbox.json("approve", "catalog/1", "--json", seconds=120)
    assert (done["version"], done["previous"], done["replicas"]) == (1, worse.label, [quickstart.replica])
    assert answering(quickstart, "catalog").startswith("catalog/1@")
    told = newest(quickstart)
    assert told["action"] == "promoted" and "approved by" in told["reasons"] and json.loads(told["scores"])["score"]["version"] > 0.9
    assert quickstart.registry.tags(quickstart.registry.version("catalog", "1"))[APPROVAL_TAG] == "approved"
    after = retrain(quickstart)
    assert after["nothing_to_do"] and after["decision"]["code"] == "is-champion"
