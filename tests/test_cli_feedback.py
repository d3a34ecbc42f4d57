"""tuneserve feedback from the command line: from a sample to a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli_feedback, feedback
from pipeline.project import Project
from tests.command import tuneserve
from tests.conftest import row, write_rows
from tests.feedback import write_sample

RECIPE = "name: shop\nbase_model: tiny\ndataset: {train: data/train, eval: data/held-out.jsonl}\n"
TO = "data/train/feedback.jsonl"


@pytest.fixture
def shop(project: Project) -> Project:
    (project.root / "r.yaml").write_text(RECIPE)
    write_rows(project.root / "data/train/own.jsonl", [row("red", None, "What colour?")])
    write_rows(project.root / "data/held-out.jsonl", [row("Sol tent", None, "What is held out?")])
    return project


def test_the_states_to_choose_from_are_those_that_there_are() -> None:
    assert cli_feedback.STATES == feedback.STATES


def answer(shop: Project, *args: str, code: int = 0) -> dict[str, Any]:
    done = tuneserve(shop.root, "feedback", *args, "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_from_a_sample_to_a_row(shop: Project) -> None:
    for number in (1, 2, 3):
        write_sample(shop, number)
    write_sample(shop, 4, "What is held out?", picture=False)
    listed = answer(shop, "list", "--limit", "2")
    assert (listed["total"], [each["id"] for each in listed["samples"]]) == (4, [f"{4:016x}", f"{3:016x}"])
    assert listed["samples"][1]["images"][0].startswith(".tuneserve/feedback/samples/server/images/") and listed["samples"][1]["state"] == "new"
    assert answer(shop, "give", "chatcmpl-1", "--correction", "Rubio watch") == {"samples": [f"{1:016x}"], "state": "given"}
    answer(shop, "give", "chatcmpl-2", "--rating", "good")
    answer(shop, "give", "chatcmpl-3", "--rating", "bad")
    answer(shop, "give", "chatcmpl-4", "--correction", "Rubio watch")
    assert answer(shop, "list", "--state", "given")["total"] == 4 and answer(shop, "list", "--name", "other")["total"] == 0
    assert answer(shop, "approve", "chatcmpl-1", "chatcmpl-2", f"{1:016x}", "chatcmpl-4")["samples"] == [f"{number:016x}" for number in (1, 2, 4)]
    assert answer(shop, "reject", "chatcmpl-3", "--why", "too dark")["state"] == "rejected"
    assert "held-out" in answer(shop, "export", "r.yaml", "--to", TO, code=1)["errors"][0]["message"]
    again = answer(shop, "export", "r.yaml", "--to", TO)
    assert again["file"] == TO and again["written"] == [] and set(again["there"]) == {f"{1:016x}", f"{2:016x}"} and again["refused"] == {}
    assert len((shop.root / TO).read_text().splitlines()) == 2
    assert tuneserve(shop.root, "check", "r.yaml").returncode == 0
    shown = tuneserve(shop.root, "feedback", "list").stdout
    assert "rejected  shop/1@c969cdde  '<image>What product is this?' -> 'a red circle'  (bad; too dark)" in shown
    assert "approved" in shown and "should be 'Rubio watch'" in shown and "refused" in shown


def test_for_people(shop: Project) -> None:
    assert "servers keep them with `sampling:`" in tuneserve(shop.root, "feedback", "list").stdout
    for number in (1, 2):
        write_sample(shop, number)
    assert "1 more: --limit 2" in tuneserve(shop.root, "feedback", "list", "--limit", "1").stdout
    tuneserve(shop.root, "feedback", "give", "chatcmpl-1", "--rating", "good")
    tuneserve(shop.root, "feedback", "approve", "chatcmpl-1")
    assert tuneserve(shop.root, "feedback", "export", "r.yaml", "--to", TO).stdout == f"1 rows added to {TO}\n"
    assert tuneserve(shop.root, "feedback", "export", "r.yaml", "--to", TO).stdout == f"0 rows added to {TO}, 1 were there\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["give"], "Missing argument"),
        (["give", "none", "--rating", "good"], "no sample has that id"),
        (["give", "chatcmpl-1"], "either a rating or a correction"),
        (["give", "chatcmpl-1", "--rating", "fine"], "is not one of"),
        (["give", "chatcmpl-1", "--correction", " "], "must be a non-empty string"),
        (["approve"], "Missing argument"),
        (["approve", "chatcmpl-1"], "nobody said anything of it yet"),
        (["reject", "chatcmpl-1"], "Missing option '--why'"),
        (["reject", "chatcmpl-1", "--why", " "], "1 to 300 characters"),
        (["list", "--state", "old"], "is not one of"),
        (["export", "r.yaml"], "Missing option '--to'"),
        (["export", "none.yaml", "--to", TO], "cannot be read"),
        (["export", "r.yaml", "--to", "data/held-out.jsonl"], "among the held-out rows"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_do(shop: Project, args: list[str], said: str) -> None:
    write_sample(shop, 1)
    done = tuneserve(shop.root, "feedback", *args)
    assert done.returncode == 2 and said in done.stderr and not (shop.root / TO).exists(), done.stderr


def test_files_elsewhere_are_named_as_they_lie(shop: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere: Path = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    write_sample(shop, 1)
    answer(shop, "give", "chatcmpl-1", "--rating", "good")
    answer(shop, "approve", "chatcmpl-1")
    assert answer(shop, "export", "r.yaml", "--to", str(elsewhere))["file"] == str(elsewhere)
