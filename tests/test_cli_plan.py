"""`tuneserve plan`, and that `train` and `serve` refuse what cannot fit the GPUs that are there before they start anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import cli_plan, gpus, services
from pipeline.cli import cli
from pipeline.errors import InvalidInput
from pipeline.gpus import Gpu, known_gpu
from pipeline.project import Project
from pipeline.recipe import load_either
from tests.conftest import ROOT
from tests.planning import GLM_4_5V
from tests.test_cli import HEAVY, data_project

QLORA = str(ROOT / "recipes/finetune/glm-4.5v-qlora-80gb.yaml")
SERVE = "name: s\nbase_model: base\nfollow: [shop]\ndevice: {device}\nquantization: {quantization}\n"
H200, A100_40 = known_gpu("h200-141gb"), known_gpu("a100-40gb")


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *args])


def faults_of(result: Result) -> str:
    assert isinstance(result.exception, InvalidInput)
    return str(result.exception)


def test_the_table_and_the_verdict() -> None:
    result = run(QLORA, "--gpu", "h100-80gb")
    assert result.exit_code == 0
    assert "  weights of the frozen base               54.7" in result.output.splitlines()
    assert result.output.splitlines()[-1].startswith("fits 1 x h100-80gb")


def test_json_is_one_line_and_exit_code_1_says_that_it_does_not_fit() -> None:
    result = run(QLORA, "--gpu", "a100-40gb", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.output)
    assert (answer["fits"], answer["gpu"], answer["gpus"], answer["change"]) == (False, "a100-40gb", 1, None)
    assert answer["items"]["weights of the frozen base"] == pytest.approx(54.69 * 2**30, rel=0.001)


def test_the_nearest_change_is_printed() -> None:
    result = run(str(ROOT / "recipes/serving/glm-4.5v-h200-fp8.yaml"), "--gpu", "h100-80gb", "--count", "8")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "nearest change that fits: tensor_parallel_size: 2"


def test_a_kind_that_is_not_known_and_a_machine_without_gpus_say_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "known: rtx-4090-24gb, a100-40gb" in faults_of(run(QLORA, "--gpu", "h100"))
    monkeypatch.setattr(gpus, "gpus_here", lambda: ([], "none"))
    assert "none is here: none; name a kind, such as --gpu h100-80gb" in faults_of(run(QLORA))


def test_gpus_that_are_here_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpus_here", lambda: ([H200, A100_40], ""))
    answer = json.loads(run(QLORA, "--json").output)
    assert (answer["gpu"], answer["available"]) == ("a100-40gb", 2)  # the smaller one counts


def test_a_recipe_for_the_cpu_is_held_against_host_memory() -> None:
    answer = json.loads(run(str(ROOT / "recipes/finetune/catalog-tiny.yaml"), "--json").output)
    assert (answer["gpu"], answer["model"]) == ("host memory", "the tiny GLM-4.5V")


def test_a_plan_imports_nothing_heavy() -> None:
    code = f"""
import sys
from click.testing import CliRunner
from pipeline.cli import cli
for recipe in ({QLORA!r}, "recipes/serving/glm-4.5v-4xh100.yaml", "recipes/finetune/catalog-tiny.yaml"):
    assert CliRunner().invoke(cli, ["plan", recipe, "--gpu", "h100-80gb"]).exit_code == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def serving_project(project: Project, quantization: str = "null", device: str = "cuda") -> Path:
    """A project with a base model's config.json and a server's recipe."""
    (project.root / "base").mkdir()
    (project.root / "base/config.json").write_text(json.dumps(GLM_4_5V), "utf-8")
    path = project.root / "s.yaml"
    path.write_text(SERVE.format(device=device, quantization=quantization), "utf-8")
    return path


def here(monkeypatch: pytest.MonkeyPatch, *found: Gpu) -> None:
    monkeypatch.setattr(gpus, "gpus_here", lambda: (list(found), "" if found else "none"))


def test_serve_refuses_what_cannot_fit_and_starts_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serving_project(project)
    here(monkeypatch, H200)
    monkeypatch.setenv("TUNESERVE_PROJECT", str(project.root))
    result = CliRunner().invoke(cli, ["serve", str(path)])
    message = faults_of(result)
    assert "does not fit 1 x h200-141gb" in message and "change quantization: fp8_per_channel, or start it all the same with --ignore-plan" in message
    assert "GiB per GPU" in result.stderr
    assert not list(project.services.glob("*"))


def test_train_refuses_what_cannot_fit_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_project(tmp_path)
    (tmp_path / "base/config.json").write_text(json.dumps(GLM_4_5V), "utf-8")
    here(monkeypatch, known_gpu("h100-80gb"))
    monkeypatch.setenv("TUNESERVE_PROJECT", str(tmp_path))
    result = CliRunner().invoke(cli, ["train", str(path)])
    message = faults_of(result)
    assert "does not fit 1 x h100-80gb" in message and "change training.deepspeed: zero3_offload" in message
    assert not (tmp_path / "mlruns").exists() and services.find_services(Project(tmp_path)) == []


@pytest.mark.parametrize(
    ("found", "quantization", "device", "ignore"),
    [((H200,), "fp8_per_channel", "cuda", False), ((), "null", "cuda", False), ((H200,), "null", "cpu", False), ((H200,), "null", "cuda", True)],
    ids=["fits", "no GPU to be seen", "CPU", "--ignore-plan"],
)
def test_what_fits_or_cannot_be_planned_is_let_through(
    project: Project, monkeypatch: pytest.MonkeyPatch, found: tuple[Gpu, ...], quantization: str, device: str, ignore: bool
) -> None:
    path = serving_project(project, quantization, device)
    here(monkeypatch, *found)
    cli_plan.refuse_what_cannot_fit(path, load_either(path), project, ignore)


def test_a_base_model_that_is_not_here_is_left_to_what_starts_next(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serving_project(project)
    (project.root / "base/config.json").unlink()
    here(monkeypatch, H200)
    cli_plan.refuse_what_cannot_fit(path, load_either(path), project, False)


def test_train_and_serve_have_the_way_around() -> None:
    for command in ("train", "serve"):
        assert "--ignore-plan" in CliRunner().invoke(cli, [command, "--help"]).output
