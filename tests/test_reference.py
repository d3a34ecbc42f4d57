"""The reference that training leaves with a version: made once, made again where it is not whole, and never worth an adapter. Its child process is stood in for."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flows import finetune
from pipeline import process, training
from pipeline.adapter import Adapter, read_adapter
from pipeline.basemodel import BaseModel
from pipeline.dataset import Dataset
from pipeline.errors import ProcessFailed
from pipeline.example import Example
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.reference import read_reference
from tests.conftest import ROOT, write_adapter
from tests.test_parity import reference

RECIPE = load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe)
ROWS = Dataset((), (Example(({"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}), ()),), "digest")
WRITES = "import json, os, sys; from pathlib import Path; Path(sys.argv[2]).write_text(Path('made.json').read_text()); print(json.dumps(dict(os.environ)))"


class Child:
    """What runs in the place of swift_parity.py, and how often it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.runs, self.start = WRITES, 0, process.start
        monkeypatch.setattr(training.process, "start", self)

    def __call__(self, command: list[str], **options: Any) -> process.Child:
        assert command[1:3] == ["-m", "pipeline.swift_parity"]
        self.runs += 1
        return self.start([sys.executable, "-c", self.script, *command[3:]], **options)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    monkeypatch.setattr(training, "POLL_SECONDS", 0.05)
    return Child(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training's, with its adapter."""
    found = tmp_path / ".tuneserve" / "runs" / "run"
    write_adapter(found / "adapter")
    write_made(found)
    return found


def write_made(folder: Path) -> None:
    """What the child will say."""
    made = reference(adapter_digest=read_adapter(folder / "adapter").digest)
    (folder / "made.json").write_text(made.model_dump_json(), "utf-8")


def make(folder: Path, recipe: FinetuneRecipe = RECIPE) -> str:
    return training.make_reference(recipe, BaseModel(Path("/base"), "base-1"), adapter_of(folder), ROWS, folder, Project(folder.parents[2]))


def adapter_of(folder: Path) -> Adapter:
    return read_adapter(folder / "adapter")


def test_it_is_made_once_for_an_adapter(child: Child, folder: Path) -> None:
    text = make(folder)
    assert read_reference(text, "run").adapter_digest == adapter_of(folder).digest
    assert make(folder) == text and child.runs == 1
    (folder / "parity.json").write_text(text[:-20], "utf-8")  # as if the command was killed while it was written
    assert make(folder) == text and child.runs == 2
    write_adapter(folder / "adapter", scale=2.0)  # as if the training was gone on from
    write_made(folder)
    assert read_reference(make(folder), "run").adapter_digest == adapter_of(folder).digest and child.runs == 3


def test_it_is_one_process_on_the_unquantized_base_in_the_recipes_precision(child: Child, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe = load_recipe(ROOT / "recipes/finetune/catalog-tiny-zero2.yaml", FinetuneRecipe).model_copy(update={"quantization": "nf4"})
    make(folder, recipe)
    task = json.loads((folder / "parity_task.json").read_text("utf-8"))
    assert (task["base"], task["precision"], task["device"], task["attention"]) == ("/base", "float32", "cpu", "sdpa")
    assert not [key for key in task if "quant" in key] and len(task["questions"]) == 6
    environment = json.loads(next((folder.parents[1] / "logs").glob("*.parity.log")).read_text("utf-8"))
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and not training.LAUNCHER_VARIABLES & environment.keys()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("raise ValueError('no memory')", "could not be made.*no memory"),
        ("import sys; sys.exit(255)", r"could not be made \(exit code 255\)"),
        ("import sys; open(sys.argv[2], 'w').write('{}')", "is not whole"),
    ],
)
def test_an_adapter_without_a_reference_is_registered_all_the_same(
    child: Child, folder: Path, script: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child.script = script
    with pytest.raises(ProcessFailed, match=f"(?s){says}"):
        make(folder)

    class Run:
        run_id = "run"
        registry = None

    found = finetune.make_reference.fn(RECIPE, BaseModel(Path("/base"), "base-1"), adapter_of(folder), ROWS, Run(), Project(folder.parents[2]))
    assert found is None and "registered without a parity reference" in capsys.readouterr().err


@pytest.mark.parametrize("victim", ["os.getpid()", "os.getppid()"], ids=["command", "supervisor"])
def test_one_that_is_killed_is_begun_again(child: Child, folder: Path, victim: str) -> None:
    once = f"import os, pathlib, signal, sys\nif not (mark := pathlib.Path('killed')).exists():\n    mark.touch(); os.kill({victim}, signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)\n"
    child.script = once + child.script
    assert read_reference(make(folder), "run").adapter_digest == adapter_of(folder).digest and child.runs == 2


def test_one_that_is_always_killed_is_given_up(child: Child, folder: Path) -> None:
    child.script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(ProcessFailed, match=r"could not be made \(exit code 137\)"):
        make(folder)
    assert child.runs == training.REFERENCE_TRIES


def test_one_that_takes_too_long_is_given_up(child: Child, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REFERENCE_SECONDS", 0.2)
    child.script = "import time; time.sleep(60)"
    with pytest.raises(ProcessFailed, match="was not made within"):
        make(folder)
    assert not process.supervised(str(folder))
