"""Every shipped recipe loads; every fault is found at once, with file, path and what was meant."""

from pathlib import Path

import pytest

from pipeline.errors import InvalidInput
from pipeline.recipe import FinetuneRecipe, ServingRecipe, check_recipe, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
FINETUNE, SERVING = sorted((RECIPES / "finetune").rglob("*.yaml")), sorted((RECIPES / "serving").rglob("*.yaml"))
GOOD = "name: shop\nbase_model: tiny\ndataset: {train: t.jsonl, eval: e.jsonl}\n"
SERVE = "name: s\nbase_model: tiny\nfollow: [shop]\n"


def load(tmp_path: Path, text: str, kind: type = FinetuneRecipe) -> FinetuneRecipe | ServingRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path, kind)


def faults(tmp_path: Path, text: str, kind: type = FinetuneRecipe) -> dict[str, str]:
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, text, kind)
    assert {fault.file for fault in caught.value.faults} == {str(tmp_path / "r.yaml")}
    return {fault.path: fault.message for fault in caught.value.faults}


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.name)
def test_every_shipped_finetune_recipe_loads(path: Path) -> None:
    assert load_recipe(path, FinetuneRecipe).name
    assert check_recipe(path)[0] == []


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.name)
def test_every_shipped_serving_recipe_loads(path: Path) -> None:
    assert load_recipe(path, ServingRecipe).follow
    assert check_recipe(path) == ([], None)


def test_there_are_recipes() -> None:
    assert FINETUNE and SERVING


def test_all_faults_at_once_each_with_what_was_meant(tmp_path: Path) -> None:
    found = faults(tmp_path, GOOD + "lora: {rnak: 8, alpha: -1}\ntraining: {deepspeed: zero4, epochs: many}\nbase_modle: x\n")
    assert set(found) == {"lora.rnak", "lora.alpha", "training.deepspeed", "training.epochs", "base_modle"}
    assert "did you mean 'rank'?" in found["lora.rnak"]
    assert "did you mean 'base_model'?" in found["base_modle"]
    assert "zero2" in found["training.deepspeed"] and "did you mean 'zero" in found["training.deepspeed"]
    assert "-1" in found["lora.alpha"]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert faults(tmp_path, "name: shop\nbase_model: tiny\ndataset: {train: t.jsonl}\n") == {"dataset.eval": "is missing; add it"}


def test_relations_between_fields_name_a_field_and_a_value_that_works(tmp_path: Path) -> None:
    assert "use 6" in faults(tmp_path, GOOD + "training: {micro_batch_size: 3, global_batch_size: 8}\n")["training.global_batch_size"]
    assert "zero2" in faults(tmp_path, GOOD + "training: {device: cpu, deepspeed: zero3}\n")["training.deepspeed"]
    assert "at least 6" in faults(tmp_path, SERVE + "lora: {max_cpu_loras: 4}\n", ServingRecipe)["lora.max_cpu_loras"]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("training: {epochs: 1, max_steps: 5, global_batch_size: 3, micro_batch_size: 2}", {"training.max_steps", "training.global_batch_size"}),
        ("training: {device: cpu, attention: flash_attention_2}", {"training.attention"}),
        ("training: {packing: true}", {"training.packing"}),
        ("training: {offload_checkpoints: true, processes: 2}", {"training.offload_checkpoints"}),
        ("training: {offload_checkpoints: true, gradient_checkpointing: false}", {"training.offload_checkpoints"}),
        ("lora: {layers: [3, 1], target_modules: [gate_proj], dropout: 0.1}", {"lora.layers", "lora.dropout", "lora.target_modules"}),
        ("lora: {target_modules: [q_proj, 'a.*b', proj]}", {"lora.target_modules.1", "lora.target_modules.2"}),
        ("training: {scheduler: constant, seed: 4294967296}", {"training.scheduler", "training.seed"}),
        ("lora: {layers: [1]}", {"lora.layers.1"}),
        ("quantization: nf4\ntraining: {deepspeed: zero3}", {"training.deepspeed"}),
        ("quantization: nf4\nlora: {target_modules: [q_proj, down_proj]}", {"lora.target_modules"}),
        ("dpo: {beta: 0.2}", {"dpo"}),
        ("method: dpo\ntraining: {row_weights: true}", {"training.row_weights"}),
        ("training: {early_stopping: {patience: 3}}", {"training.early_stopping.patience"}),
    ],
)
def test_settings_that_do_not_go_together_are_all_named(tmp_path: Path, text: str, paths: set[str]) -> None:
    assert set(faults(tmp_path, GOOD + text + "\n")) == paths


def test_a_judge_is_named_where_it_decides_and_its_key_nowhere(tmp_path: Path) -> None:
    judge = "{url: 'https://j.example.com/v1', model: j, api_key_env: JUDGE_KEY}"
    recipe = load(tmp_path, GOOD + f"promotion: {{metric: judge, judge: {judge}}}\n")
    assert isinstance(recipe, FinetuneRecipe) and recipe.promotion.judge and recipe.promotion.judge.show_images
    assert load(tmp_path, dump_recipe(recipe)) == recipe
    assert "add it" in faults(tmp_path, GOOD + "promotion: {metric: judge}\n")["promotion.metric"]
    wrong = "{url: 'https://me:hidden@j.example.com/v1', model: j, api_key_env: sk-hidden, api_key: sk-hidden, concurrency: 0}"
    found = faults(tmp_path, GOOD + f"promotion: {{judge: {wrong}}}\n")
    assert set(found) == {f"promotion.judge.{key}" for key in ("url", "api_key_env", "api_key", "concurrency")}
    assert "hidden" not in str(found) and "name of an environment variable" in found["promotion.judge.api_key_env"]
    assert "did you mean 'api_key_env'" in found["promotion.judge.api_key"]


@pytest.mark.parametrize("lora", ["{rank: '16'}", "{rank: true}", "{alpha: .inf}", "{rank: 8, rank: 16}", "{rank: 1.5}", "{target_modules: q_proj}"])
def test_nothing_is_guessed_from_a_value_of_the_wrong_kind(tmp_path: Path, lora: str) -> None:
    assert faults(tmp_path, GOOD + f"lora: {lora}\n")


def test_a_followed_model_is_named_once(tmp_path: Path) -> None:
    assert "once" in faults(tmp_path, SERVE.replace("[shop]", "[shop, shop]"), ServingRecipe)["follow"]


@pytest.mark.parametrize("name", ["image", "..", "a/b", "", "x" * 65, "é"])
def test_names_that_may_not_be_served(tmp_path: Path, name: str) -> None:
    assert "name" in faults(tmp_path, GOOD.replace("name: shop", f"name: '{name}'"))


def test_an_adapter_may_not_take_the_base_models_name(tmp_path: Path) -> None:
    assert "base model" in faults(tmp_path, SERVE.replace("shop", "glm-4.5v"), ServingRecipe)["follow"]


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_what_is_no_recipe_is_one_clear_fault(tmp_path: Path, text: str) -> None:
    assert len(faults(tmp_path, text)) == 1


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml", FinetuneRecipe)


def test_a_dumped_recipe_loads_as_the_same(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_what_needs_gpus_is_refused_without_them_and_all_at_once(tmp_path: Path) -> None:
    wrong = "device: cpu\nquantization: fp8_per_channel\nexpert_parallel: true\nvision_data_parallel: true\nmax_num_seqs: 64\nmax_num_batched_tokens: 32\n"
    found = faults(tmp_path, SERVE + wrong, ServingRecipe)
    assert set(found) == {"quantization", "expert_parallel", "vision_data_parallel", "max_num_batched_tokens"}
    assert "device: cuda" in found["quantization"] and "tensor_parallel_size" in found["expert_parallel"]
    assert faults(tmp_path, SERVE + "gpu_memory_utilization: 0.96\n", ServingRecipe).keys() == {"gpu_memory_utilization"}
    assert load(tmp_path, SERVE + wrong.replace("cpu", "cuda\ntensor_parallel_size: 2").replace(": 32", ": 64"), ServingRecipe)


def test_our_kernel_is_for_gpus_and_bfloat16(tmp_path: Path) -> None:
    fused = "lora: {fused_kernel: true}\n"
    assert "device: cuda" in faults(tmp_path, SERVE + "device: cpu\n" + fused, ServingRecipe)["lora.fused_kernel"]
    assert "bfloat16 only" in faults(tmp_path, SERVE + "device: cuda\nprecision: float32\n" + fused, ServingRecipe)["lora.fused_kernel"]
    assert load(tmp_path, SERVE + "device: cuda\n" + fused, ServingRecipe)
    assert load(tmp_path, SERVE + "device: cpu\nlora: {fused_kernel: false}\n", ServingRecipe)


def test_graphs_are_for_steps_and_pictures_that_there_can_be(tmp_path: Path) -> None:
    def found(settings: str) -> dict[str, str]:
        return faults(tmp_path, SERVE + settings, ServingRecipe)

    assert found("device: cpu\ngraph_tokens: 512\npicture_graphs: true\n").keys() == {"graph_tokens", "picture_graphs"}
    assert "max_num_seqs 64" in found("device: cuda\nmax_num_seqs: 64\ngraph_tokens: 32\n")["graph_tokens"]
    assert "max_num_batched_tokens" in found("device: cuda\nmax_num_batched_tokens: 512\ngraph_tokens: 1024\n")["graph_tokens"]
    assert "max_images" in found("device: cuda\nmax_images: 0\npicture_graphs: true\n")["picture_graphs"]
    assert load(tmp_path, SERVE + "device: cuda\nmax_num_seqs: 64\nmax_num_batched_tokens: 512\ngraph_tokens: 512\npicture_graphs: true\n", ServingRecipe)
