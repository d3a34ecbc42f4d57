"""The command line's contract: exit codes, one JSON object, remedies, and a help that starts at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline import preflight, process
from pipeline.cli import cli
from pipeline.errors import Fault
from pipeline.project import Project
from tests import command
from tests.conftest import ROOT, row, write_counting_base, write_image, write_rows
from tests.test_dataset import SIX, six_faults

HEAVY = ("torch", "vllm", "mlflow", "prefect", "swift", "transformers", "datasets", "pyarrow", "tokenizers", "numpy", "PIL")


def tuneserve(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return command.tuneserve(cwd, *args, **environment)


def as_process(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = command.command_environment(**environment)
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *args], capture_output=True, text=True, cwd=cwd, env=whole, check=False)


def test_help_and_check_import_nothing_heavy() -> None:
    code = f"""
import sys
from click.testing import CliRunner
from pipeline.cli import cli
assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
assert CliRunner().invoke(cli, ["check", "recipes/finetune/catalog-tiny.yaml"]).exit_code == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_shipped_recipes_pass_the_check() -> None:
    recipes = sorted(str(path) for path in (ROOT / "recipes").rglob("*.yaml"))
    done = as_process("check", "--json", *recipes)
    assert json.loads(done.stdout) == {"ok": True, "errors": [], "warnings": []}
    assert done.returncode == 0


def test_check_finds_exactly_what_is_wrong(tmp_path: Path) -> None:
    text = (ROOT / "recipes/finetune/catalog-tiny.yaml").read_text("utf-8")
    text = (
        text.replace("lora:\n", "lora:\n  rnak: 8\n")
        .replace("training:\n", "training:\n  deepspeed: zero4\n")
        .replace("catalog/train.jsonl", "catalog/none.jsonl")
    )
    bad = tmp_path / "bad.yaml"
    bad.write_text(text, "utf-8")
    done = tuneserve("check", "--json", str(bad))
    answer = json.loads(done.stdout)
    assert done.returncode == 2
    assert not answer["ok"]
    assert {(error["file"], error["path"]) for error in answer["errors"]} == {(str(bad), path) for path in ("lora.rnak", "training.deepspeed", "dataset.train")}
    assert len(answer["errors"]) == 3
    assert "did you mean 'rank'?" in next(error["message"] for error in answer["errors"] if error["path"] == "lora.rnak")
    plain = as_process("check", str(bad))
    assert plain.returncode == 2 and plain.stdout == "" and "lora.rnak" in plain.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["check"],
        ["train"],
        ["nonsense"],
        ["check", "--wrong", "x"],
        ["train", "none.yaml"],
        ["serve", "none.yaml"],
        ["promote", "catalog/x"],
        ["promote", "/1"],
        ["promote", "catalog/"],
        ["promote", "catalog/1", "--canary", "101%"],
        ["promote", "catalog/1", "--canary", "nan"],
        ["promote", "catalog/1", "--canary", "1%", "--no-wait"],
        ["promote", "catalog", "--replica", "localhost:8000"],
        ["promote", "catalog", "--evaluate-on", "localhost:8000"],
        ["promote", "catalog", "--evaluate-on", "http://a:1", "--force"],
        ["evaluate", "catalog", "--evaluate-on", "localhost:8000"],
        ["promote", "catalog", "--serving", "none.yaml"],
        ["rollback", "catalog/1"],
        ["rollback", "catalog", "--to", "x"],
        ["canary", "catalog/1", "10%"],
        ["canary", "catalog", "-1%"],
        ["canary", "catalog", "much"],
        ["canary", "catalog"],
        ["disable", "catalog"],
        ["disable", "catalog", "--reason", " "],
        ["enable", "catalog/x"],
        ["status", "catalog/1"],
        ["status", "--replica", "http://a:1/adapters"],
    ],
)
def test_a_wrong_invocation_exits_2_and_says_why(args: list[str], tmp_path: Path) -> None:
    done = tuneserve(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr and "Traceback" not in done.stderr and "command failed" not in done.stderr
    assert not (tmp_path / ".tuneserve").exists()


def test_down_with_nothing_running_says_so(tmp_path: Path) -> None:
    done = tuneserve("down", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ended: nothing was running\n")


def data_project(folder: Path) -> Path:
    """A project with one finetune recipe over two rows; its base model is a folder with a tokenizer and an image processor."""
    base = write_counting_base(folder / "base")
    (base / "config.json").write_text("{}", "utf-8")
    (base / "model.safetensors").write_bytes(b"")
    write_image(folder / "a.png")
    write_rows(folder / "t.jsonl", [row(), row("other", None)])
    write_rows(folder / "e.jsonl", [row("held out", None)])
    recipe = folder / "recipes" / "r.yaml"
    recipe.parent.mkdir()
    recipe.write_text("name: r\nbase_model: base\ndataset: {train: t.jsonl, eval: e.jsonl}\ntraining: {max_length_tokens: 60}\n", "utf-8")
    return recipe


def test_the_deep_check_prints_statistics(tmp_path: Path) -> None:
    recipe = data_project(tmp_path)
    done = tuneserve("check", "--deep", "--json", str(recipe), cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], answer["warnings"]) == (0, True, [])
    train = answer["statistics"][str(recipe)]["train"]
    assert (train["rows"], train["images"], train["image_tokens"]["total"], train["answer_tokens"]["max"]) == (2, 1, 4, len("Azul tote") + 1)
    plain = tuneserve("check", "--deep", str(recipe), cwd=tmp_path)
    assert plain.returncode == 0 and "tokens: mean / p95 / max" in plain.stdout and "1 recipe checked, no fault found" in plain.stdout


def test_the_deep_check_needs_a_readable_base_and_says_what_else_is_wrong(tmp_path: Path) -> None:
    recipe = data_project(tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text("{}", "utf-8")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    done = tuneserve("check", "--deep", "--json", str(recipe), cwd=tmp_path)
    errors = json.loads(done.stdout)["errors"]
    assert done.returncode == 2
    assert [(error["file"], error["path"]) for error in errors] == [(str(tmp_path / "base"), ""), ("t.jsonl", "row 1.images.0")]


def test_train_says_all_that_is_wrong_with_the_rows_and_starts_nothing(tmp_path: Path) -> None:
    recipe = data_project(tmp_path)
    write_rows(tmp_path / "t.jsonl", [row(), row("long" * 20, None), row(image="none.png")])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    for asked in (["train"], ["check", "--deep"]):
        done = tuneserve(*asked, "--json", str(recipe), cwd=tmp_path)
        errors = json.loads(done.stdout)["errors"]
        assert done.returncode == 2
        assert [error["path"] for error in errors] == ["row 1.images.0", "row 2", "row 3.images.0"], asked
        assert not (tmp_path / "mlruns").exists() and not (tmp_path / ".tuneserve" / "services").exists() and not (tmp_path / ".tuneserve" / "runs").exists()


def test_warnings_do_not_fail_a_check(tmp_path: Path) -> None:
    recipe = data_project(tmp_path)
    write_rows(tmp_path / "t.jsonl", [row(), row()])
    done = tuneserve("check", str(recipe), cwd=tmp_path)
    assert done.returncode == 0 and "warning: t.jsonl: row 2: is also row 1" in done.stderr


def test_six_faults_are_said_at_once_by_check_and_train(project: Project) -> None:
    recipe = data_project(project.root)
    six_faults(project)
    for asked in (["train"], ["check", "--deep"]):
        done = tuneserve(*asked, "--json", str(recipe), cwd=project.root)
        assert done.returncode == 2
        assert [(error["file"], error["path"]) for error in json.loads(done.stdout)["errors"]] == [(file, path) for file, path, _ in SIX], asked


def test_gc_lists_first_and_removes_only_when_told(tmp_path: Path) -> None:
    stale = tmp_path / ".tuneserve/cache/vllm/compiled"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"x" * 5000)
    done = tuneserve("gc", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    (entry,) = (entry for entry in answer["entries"] if entry["removable"])
    assert done.returncode == 0 and entry["path"] == ".tuneserve/cache/vllm" and stale.exists() and answer["removable_bytes"] == entry["size_bytes"] >= 5000
    assert "tuneserve gc --delete" in tuneserve("gc", cwd=tmp_path).stdout
    done = tuneserve("gc", "--delete", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["removed"] == [".tuneserve/cache/vllm"] and answer["freed_bytes"] >= 5000 and not stale.exists()
    lines = [json.loads(line) for line in (tmp_path / ".tuneserve/logs/tuneserve.jsonl").read_text("utf-8").splitlines()]
    assert {line["command"] for line in lines} == {"gc"}
    assert [line["event"] for line in lines] == [*["command started", "command ended"] * 2, "command started", "removed", "command ended"]
    assert lines[-2]["path"] == ".tuneserve/cache/vllm" and lines[-1]["exit_code"] == 0


@pytest.mark.parametrize(("tracking_uri", "why"), [("http://127.0.0.1:9", "cannot be asked"), (None, "mlflow.db")])
def test_gc_without_its_registry_still_lists_and_leaves_what_it_cannot_judge(tmp_path: Path, tracking_uri: str | None, why: str) -> None:
    (tmp_path / ".tuneserve/runs" / ("a" * 32)).mkdir(parents=True)
    (tmp_path / ".tuneserve/cache/vllm").mkdir(parents=True)
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} if tracking_uri else {}
    done = tuneserve("gc", "--delete", "--older-than", "0", "--json", cwd=tmp_path, **environment)
    entries = {entry["category"]: entry for entry in json.loads(done.stdout)["entries"]}
    assert done.returncode == 0 and not entries["runs"]["removable"] and why in entries["runs"]["reason"]
    assert entries["caches"]["removable"] and not (tmp_path / ".tuneserve/cache/vllm").exists() and (tmp_path / ".tuneserve/runs" / ("a" * 32)).is_dir()


@pytest.mark.parametrize("block", ["opened_project()", "using_caches(project)"])
def test_gc_leaves_the_caches_of_a_running_command_alone(tmp_path: Path, block: str) -> None:
    picture = tmp_path / ".tuneserve/cache/images/0.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    code = "import click, time; from pipeline.cli import cli; from pipeline.command import opened_project, using_caches; from pipeline.project import find_project; project = find_project()\n"
    code += f"with click.Context(cli, info_name='train'), {block}: print(1, flush=True); time.sleep(60)"
    running = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert running.stdout and running.stdout.readline() == b"1\n"
        (entry,) = json.loads(tuneserve("gc", "--delete", "--json", cwd=tmp_path).stdout)["entries"][:1]
        assert not entry["removable"] and "command runs" in entry["reason"] and picture.exists()
    finally:
        running.kill()
        running.wait()
    assert tuneserve("gc", "--delete", cwd=tmp_path).returncode == 0 and not picture.exists()


def test_the_check_holds_the_caches_and_makes_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(path: Path, project: Project, deep: bool) -> tuple[list[Fault], None]:
        if project.state.is_dir():
            with process.if_unlocked(project.in_use) as free:
                seen.append(free)
        return [], None

    monkeypatch.setattr(preflight, "check_recipe_and_rows", look)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNESERVE_PROJECT", raising=False)
    for made in ("", ".tuneserve"):
        (tmp_path / made).mkdir(exist_ok=True)
        assert CliRunner().invoke(cli, ["check", "r.yaml"]).exit_code == 0
        assert bool(made) or not list(tmp_path.iterdir())
    assert seen == [False]


def test_gc_outside_a_project_makes_nothing(tmp_path: Path) -> None:
    done = tuneserve("gc", cwd=tmp_path)
    assert done.returncode == 1 and "run this in your project's folder" in done.stderr and not list(tmp_path.iterdir())


def test_a_failed_command_is_in_the_journal_without_its_faults_text(tmp_path: Path) -> None:
    (tmp_path / ".tuneserve/services").mkdir(parents=True)
    done = as_process("promote", "shop", cwd=tmp_path, MLFLOW_TRACKING_URI="sqlite:///x", PREFECT_API_URL="http://me:secret@127.0.0.1:9/api")
    text = (tmp_path / ".tuneserve/logs/tuneserve.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert done.returncode == 1 and "secret" not in text
    assert [line["event"] for line in lines] == ["command started", "stage started", "stage failed", "command failed", "command ended"]
    assert (lines[-2]["error"], lines[-1]["exit_code"]) == ("ServingError", 1)
