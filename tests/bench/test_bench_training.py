"""Which trainings are made, of what recipe, and what is kept of them. ms-swift is stood in for; tests/e2e/test_speed.py has the real one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.basemodel import BaseModel
from pipeline.bench import results, training
from pipeline.bench.record import Record, read_record
from pipeline.bench.training import ARMS, BARE, TRAIN, UNTIMED_STEPS, measure, settings_of, shortened, turns
from pipeline.dataset import Dataset
from pipeline.errors import ProcessFailed
from pipeline.example import Example
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.training import swift_args
from tests.conftest import ROOT

RECIPE = load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe)
ROWS = Dataset((Example(({"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}), ()),), (), "digest")
SWIFT = """
import json, sys, pathlib
args = json.loads(pathlib.Path(sys.argv[1]).read_text())
log = pathlib.Path(args["output_dir"], "logging.jsonl")
log.parent.mkdir(exist_ok=True)
steps = args["max_steps"]
log.write_text("".join(json.dumps({"loss": 1.0, "train_speed(s/it)": 0.5, "global_step/max_steps": f"{step}/{steps}", "memory(GiB)": 3.5}) + "\\n" for step in range(1, steps + 1)))
"""


@pytest.mark.parametrize("steps", [1, 3, 8, 10])
def test_a_shortened_recipe_logs_every_step_and_keeps_what_decides_speed(steps: int) -> None:
    args = swift_args(shortened(RECIPE, steps), Path("/base"), Path("/rows"), Path("/out"))
    whole = swift_args(RECIPE, Path("/base"), Path("/rows"), Path("/out"))
    assert (args["max_steps"], args["logging_steps"], args["eval_strategy"]) == (steps + UNTIMED_STEPS, 1, "no")
    assert {key for key in args.keys() | whole.keys() if args.get(key) != whole.get(key)} <= {"max_steps", "num_train_epochs", "save_steps", "logging_steps"}


def test_arms_take_turns() -> None:
    assert turns(ARMS, 2) == [(0, TRAIN), (0, BARE), (1, BARE), (1, TRAIN)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    found = Project(tmp_path)
    found.logs.mkdir(parents=True)
    return found


def run(project: Project, monkeypatch: pytest.MonkeyPatch, script: str = SWIFT) -> Path:
    """Two rounds of both arms with `script` in ms-swift's place; the record's folder."""
    stand_in = project.root / "swift_stand_in.py"
    stand_in.write_text(script, "utf-8")
    popen = training.subprocess.Popen
    monkeypatch.setattr(training.subprocess, "Popen", lambda command, **options: popen([sys.executable, str(stand_in), command[-1]], **options))

    def as_train(recipe: FinetuneRecipe, base: Path, rows: Dataset, folder: Path, *_: Any) -> None:
        training._train_bare(recipe, BaseModel(base, "base-1"), rows, folder, project, lambda *_: None)

    monkeypatch.setattr(training, "train_adapter", as_train)
    monkeypatch.setattr(training, "POLL_SECONDS", 0.02)
    settings = settings_of("recipe.yaml", RECIPE, ROWS, ARMS, 3, 2, 60.9)
    record = Record(project.root / "bench", {"kind": "train", "began": "now", "machine": MACHINE, "servers": [], "settings": settings, "notes": []})
    measure(shortened(RECIPE, 3), BaseModel(Path("/base"), "base-1"), ROWS, project, ARMS, 2, record, lambda *_: None)
    return record.folder


MACHINE = {"gpus": [], "cpus": 2, "architecture": "x86_64", "memory_gib": 8.0, "python": "3.12"}


def test_each_training_is_a_line_and_leaves_nothing_else(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(project, monkeypatch)
    _, lines = read_record(folder)
    assert [(line["round"], line["arm"], line["step_seconds"], line["memory_gib"]) for line in lines] == [(*turn, [0.5] * 3, 3.5) for turn in turns(ARMS, 2)]
    assert not list(project.runs.glob("*"))
    said, table = results.write_results(folder)
    assert said["complete"] and [each["ratio"] for each in said["figures"]] == [1.0, None]
    assert "| train | 1.000 [1.000, 1.000] | 0.500 | 0.500 | - | 3.5 | 6 in 2 rounds |" in table and "planned 60.9 GiB a GPU" in table
    assert len(json.loads((folder / "result.json").read_text("utf-8"))["trainings"]) == 4


def test_a_training_that_fails_names_its_log_and_keeps_what_was_measured(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SWIFT + "import os\nif '-1-' in os.getcwd(): raise ValueError('out of memory')\n"
    with pytest.raises(ProcessFailed, match=r"(?s)ms-swift alone failed \(exit code 1\).*out of memory"):
        run(project, monkeypatch, failing)
    said, table = results.write_results(project.root / "bench")
    assert not said["complete"] and "cut short: 2 of 4 trainings were measured" in table and not list(project.runs.glob("*"))
