"""Plans: verdicts, the nearest change that fits, and that shipped recipes say in their comments what `tuneserve plan` says."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.capacity import Assumed, Plan, architecture_of, host_memory, plan
from pipeline.errors import InvalidInput
from pipeline.gpus import GIB, KNOWN, known_gpu
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, ServingRecipe, load_either, load_recipe
from tests.conftest import ROOT
from tests.planning import ALL_SERVED, finetune, glm, serving

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
FOR_GPUS = [path for path in RECIPES if "device: cpu" not in path.read_text("utf-8")]
COMMAND = re.compile(r"^# \$ (tuneserve plan (\S+) --gpu (\S+))$", re.MULTILINE)
H100, H200, A100_40 = known_gpu("h100-80gb"), known_gpu("h200-141gb"), known_gpu("a100-40gb")


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_recipes_for_gpus_fit_and_their_comment_is_the_plan_of_now(path: Path, project: Project) -> None:
    text = path.read_text("utf-8")
    command = COMMAND.search(text)
    assert command is not None, f"{path.name}: no plan in its header comment"
    assert (ROOT / command[2]) == path
    recipe = load_either(path)
    found = plan(recipe, architecture_of(recipe.base_model, project), known_gpu(command[3]))
    assert found.fits
    comment = text[command.end() + 1 :].splitlines()
    lines = [line.removeprefix("# ") for line in comment[: len(found.lines())]]
    assert lines == found.lines(), f"write anew what {shlex.quote(command[1])} prints"


@pytest.mark.parametrize("path", sorted(set(RECIPES) - set(FOR_GPUS)), ids=lambda path: path.stem)
def test_recipes_for_the_cpu_are_held_against_host_memory(path: Path, project: Project) -> None:
    recipe = load_either(path)
    found = plan(recipe, architecture_of("tiny", project), replace(host_memory(), bytes=8 * GIB))
    assert found.fits and found.total < 6 * GIB


def training_change(gpu_name: str = "h100-80gb", available: int | None = None, **values: object) -> Plan:
    return plan(finetune(**values), glm(), known_gpu(gpu_name), available)  # type: ignore[arg-type]


def test_a_training_that_fits_needs_no_change() -> None:
    found = training_change(quantization="nf4", max_length_tokens=2048)
    assert (found.fits, found.tight, found.change, found.bound_by) == (True, False, "", "weights of the frozen base")
    assert found.verdict.startswith("fits 1 x h100-80gb: 17.2 GiB left on each")
    assert training_change(quantization="nf4", max_length_tokens=16384).tight


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("training.micro_batch_size: 2", {"quantization": "nf4", "max_length_tokens": 8192, "micro_batch_size": 8}),
        ("training.gradient_checkpointing: true", {"quantization": "nf4", "max_length_tokens": 4096, "gradient_checkpointing": False}),
        ("training.offload_checkpoints: true", {"quantization": "nf4", "max_length_tokens": 32768}),
        (
            "training.micro_batch_size: 1, training.offload_checkpoints: true, training.max_length_tokens: 41984",
            {"quantization": "nf4", "max_length_tokens": 65536, "micro_batch_size": 2},
        ),
        ("training.deepspeed: zero3", {"processes": 8, "deepspeed": "zero2", "max_length_tokens": 4096}),
        ("training.deepspeed: zero3_offload", {"max_length_tokens": 4096}),
        ("training.deepspeed: zero3_offload", {"processes": 2, "deepspeed": "zero3", "max_length_tokens": 4096}),
    ],
)
def test_the_nearest_change_to_a_training_is_the_cheapest_that_fits(change: str, values: dict[str, object]) -> None:
    found = training_change(**values)
    assert not found.fits
    assert found.change == change


def test_more_gpus_are_proposed_only_where_nothing_else_fits() -> None:
    found = training_change("rtx-4090-24gb", quantization="nf4", max_length_tokens=2048)
    assert not found.fits and found.change == ""  # 4-bit weights cannot be split
    assert "30" in found.verdict or "GiB too much on each" in found.verdict


def test_fewer_gpus_than_processes_is_said_and_planned_for() -> None:
    found = training_change(available=4, processes=8, deepspeed="zero3", max_length_tokens=4096)
    assert found.verdict == "does not run on 8 x h100-80gb: training.processes: 8 is one GPU each, and there are 4"
    assert found.change == "training.processes: 4"


def test_proposed_processes_divide_the_global_batch() -> None:
    found = training_change(available=3, processes=4, deepspeed="zero3", global_batch_size=16, max_length_tokens=4096)
    assert found.change.startswith("training.processes: 2, ")


@pytest.mark.parametrize(
    ("change", "available", "values"),
    [
        ("max_model_len_tokens: 137216", 1, {"quantization": "fp8_per_channel", "max_model_len_tokens": 200_000}),
        ("quantization: fp8_per_channel", 1, {}),
        ("lora.max_loras: 7", 1, {"quantization": "fp8_per_channel", "lora": {"max_loras": 9, "target_modules": ALL_SERVED}}),
        ("lora.target_modules: [qkv_proj, o_proj]", 1, {"quantization": "fp8_per_channel", "lora": {"max_rank": 512, "target_modules": ALL_SERVED}}),
        ("tensor_parallel_size: 1, quantization: fp8_per_channel", 1, {"tensor_parallel_size": 2}),
    ],
)
def test_the_nearest_change_to_a_server_is_the_cheapest_that_fits(change: str, available: int, values: dict[str, object]) -> None:
    found = plan(serving(**values), glm(), H200, available)  # type: ignore[arg-type]
    assert not found.fits
    assert found.change == change


def test_a_server_that_needs_more_gpus_gets_the_smallest_count_that_the_model_can_be_shared_over() -> None:
    found = plan(serving(quantization="fp8_per_channel"), glm(), A100_40)
    assert found.change == "tensor_parallel_size: 4 (4 x a100-40gb)"


def test_a_server_that_cannot_be_shared_out_says_why() -> None:
    found = plan(serving(tensor_parallel_size=8), glm(), H100)
    assert not found.fits and "vision_data_parallel: true" in found.verdict


def test_one_request_of_full_length_must_fit() -> None:
    found = plan(serving(quantization="fp8_per_channel", max_model_len_tokens=200_000), glm(), H200)
    assert found.left > 0 and not found.fits
    assert "one request of max_model_len_tokens is 200000" in found.verdict


def test_several_servers_beside_each_other() -> None:
    found = plan(serving(quantization="fp8_per_channel"), glm(), H200, 4)
    assert "  4 such servers fit on 4 of them" in found.lines()


def test_answers_are_what_logits_are_computed_for() -> None:
    recipe = finetune("nf4", max_length_tokens=16384, row_weights=True)
    assert plan(recipe, glm(), H100, assumed=Assumed(answer_tokens=1024)).fits
    assert not plan(recipe, glm(), H100).fits


def test_every_kind_of_gpu_gets_a_plan() -> None:
    for gpu in KNOWN:
        for recipe in (finetune(processes=8, deepspeed="zero3"), serving()):
            found = plan(recipe, glm(), gpu)
            assert found.fits or found.change
            assert found.as_dict()["total_bytes"] == sum(found.as_dict()["items"].values())


def test_a_base_model_that_is_here_is_planned_with_its_own_dimensions(project: Project) -> None:
    assert "is not here yet" in architecture_of("base", project).source
    (project.root / "base").mkdir()
    (project.root / "base/config.json").write_text("{}", "utf-8")
    with pytest.raises(InvalidInput, match="hidden_size"):
        architecture_of("base", project)


def test_qlora_with_zero_3_is_refused_before_any_plan(tmp_path: Path) -> None:
    text = "name: s\nbase_model: m\nquantization: nf4\ndataset: {train: t, eval: e}\ntraining: {deepspeed: zero3}\n"
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    with pytest.raises(InvalidInput, match="cannot gather 4-bit weights"):
        load_either(tmp_path / "r.yaml")


def test_either_kind_of_recipe_is_told_by_its_keys() -> None:
    assert isinstance(load_either(ROOT / "recipes/serving/tiny-cpu.yaml"), ServingRecipe)
    recipe = load_either(ROOT / "recipes/finetune/catalog-tiny.yaml")
    assert recipe == load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe)
