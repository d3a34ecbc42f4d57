"""`tuneserve bench` against the real server and registry, very short; its figures are of no interest here. Runs after the other tests, since it registers a version."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Quickstart
from tests.e2e.test_promotion import answering, register_variant

FILES = {"rounds.jsonl", "result.json", "result.md", "plot.png", "plot.svg"}
SHORT = ("--answer-tokens", "8", "--json")


def test_bench_serve_measures_the_base_and_the_adapter(quickstart: Quickstart) -> None:
    load = ("--concurrency", "1,4", "--requests", "4", "--rounds", "2", "--mix", "mixed", "--arm", "base", "--arm", "one")
    said = quickstart.sandbox.json("bench", "serve", "--url", quickstart.openai, *load, *SHORT, seconds=120)
    assert said["complete"] and [(each["concurrency"], each["arm"]) for each in said["figures"]] == [
        (level, arm) for level in (1, 4) for arm in ("base", "one")
    ]
    assert all(each["failed"] == 0 and each["answer_tokens"] == 8 and all(each["values"].values()) for each in said["figures"])
    values = {(each["concurrency"], each["arm"]): each["values"] for each in said["figures"]}
    assert {each["metric"] for each in said["ratios"]} == set(values[1, "base"])
    for each in said["ratios"]:
        level, metric = each["concurrency"], each["metric"]
        assert each["ratio"] == pytest.approx(values[level, each["arm"]][metric] / values[level, "base"][metric]), each
    assert said["servers"][0]["version"].startswith("0.")
    folder = Path(said["folder"])
    assert folder.parent == quickstart.sandbox.root / ".tuneserve/bench" and {path.name for path in folder.iterdir()} == FILES
    runs = json.loads((folder / "result.json").read_text("utf-8"))["runs"]
    kinds = {kind for run in runs for kind in run["requests"]["kind"]}
    assert len(runs) == 8 and kinds == {"image", "text", "two-images"}


def test_bench_swap_moves_the_alias_to_and_fro_and_leaves_it_where_it_was(quickstart: Quickstart, tmp_path: Path) -> None:
    champion = quickstart.registry.champion("catalog")
    assert champion
    other = register_variant(quickstart, tmp_path / "adapter", 0.9)
    load = ("--moves", "2", "--streams", "2", "--pause", "0.5", "--yes", "--replica", quickstart.replica)
    said = quickstart.sandbox.json("bench", "swap", other.label, *load, *SHORT, seconds=180)
    assert said["complete"] and [(move["to"], move["was_loaded"]) for move in said["moves"]] == [(other.label, False), (champion.label, True)]
    assert all(0 < move["first_token_seconds"] < 60 and move["live_seconds"] is not None for move in said["moves"])
    assert said["traffic"]["failed"] == 0 and said["traffic"]["requests"] > 2
    assert quickstart.registry.champion("catalog") == champion
    assert answering(quickstart, "catalog") == f"{champion.label}@{champion.digest[:8]}"
    newest = quickstart.sandbox.json("history", "catalog", "--json", seconds=60)["entries"][0]
    assert (newest["action"], newest["after"]) == ("kept", champion.version) and "tuneserve bench swap" in newest["reasons"]


def test_bench_train_holds_training_against_ms_swift_alone_and_keeps_nothing(quickstart: Quickstart) -> None:
    versions = quickstart.registry.registered()
    said = quickstart.sandbox.json("bench", "train", "recipes/finetune/catalog-tiny.yaml", "--steps", "2", "--rounds", "1", "--json", seconds=300)
    train, bare = said["figures"]
    assert said["complete"] and (train["arm"], train["steps"], bare["arm"], bare["steps"]) == ("train", 2, "bare", 2)
    assert train["ratio"] > 0 and train["tokens_per_second"] > 0 and bare["ratio"] is None
    assert {path.name for path in Path(said["folder"]).iterdir()} == FILES
    assert quickstart.registry.registered() == versions and not list((quickstart.sandbox.root / ".tuneserve/runs").glob("bench-*"))
