"""What ms-swift is told, what is made of what it logs, and which process of several is blamed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.process import Child
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.training import LogFollower, SwiftArgs, failure_of, input_digest, published, swift_args, swift_command, swift_environment
from tests.conftest import ROOT

EMBEDDED = load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe)
PATHS = (Path("/base"), Path("/rows.jsonl"), Path("/out"))
LOGS = Path("/logs")


def variant(**sections: Any) -> FinetuneRecipe:
    """The embedded recipe with other values; a dictionary changes only its own keys of a section."""
    values = EMBEDDED.model_dump()
    for key, value in sections.items():
        values[key] = values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    return FinetuneRecipe.model_validate(values)


def args_of(**sections: Any) -> SwiftArgs:
    return swift_args(variant(**sections), *PATHS)


def plugins_of(recipe: FinetuneRecipe) -> list[str]:
    """By name; each is there."""
    plugins = swift_args(recipe, *PATHS).get("external_plugins", [])
    assert isinstance(plugins, list) and all(Path(plugin).is_file() for plugin in plugins)
    return [Path(plugin).name for plugin in plugins]


def test_the_embedded_recipes_arguments() -> None:
    args = swift_args(EMBEDDED, *PATHS)
    wanted = {
        "model": "/base",
        "model_type": "glm4v_moe",
        "template": "glm4_5v",
        "dataset": ["/rows.jsonl"],
        "output_dir": "/out",
        "tuner_type": "lora",
        "lora_rank": EMBEDDED.lora.rank,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "torch_dtype": "float32",
        "fp16": False,
        "bf16": False,
        "use_cpu": True,
        "strict": True,
        "check_model": False,
        "add_version": False,
        "save_strategy": "steps",
        "report_to": ["none"],
    }
    assert {key: args[key] for key in wanted} == wanted
    assert not args.keys() & {"deepspeed", "quant_method", "rlhf_type", "callbacks", "max_steps", "save_only_model"}
    assert plugins_of(EMBEDDED) == ["swift_chunked_loss.py"]
    assert swift_command(EMBEDDED) == "sft"
    environment = swift_environment(EMBEDDED, LOGS)
    assert environment["DS_ACCELERATOR"] == "cpu" and not [name for name in environment if name.startswith(("NPROC", "PET_"))]


def test_batches_and_deepspeed_on_gpus() -> None:
    recipe = variant(training={"device": "cuda", "processes": 4, "micro_batch_size": 2, "global_batch_size": 32, "deepspeed": "zero3"})
    args = swift_args(recipe, *PATHS)
    assert (args["per_device_train_batch_size"], args["gradient_accumulation_steps"], args["deepspeed"]) == (2, 4, "zero3")
    assert "use_cpu" not in args and plugins_of(recipe) == ["swift_chunked_loss.py", "swift_zero3.py"]
    assert swift_environment(recipe, LOGS)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    environment = swift_environment(recipe, LOGS)
    assert (environment["NPROC_PER_NODE"], environment["PET_LOG_DIR"], environment["PET_STANDALONE"]) == ("4", "/logs", "1")


def test_deepspeed_on_the_cpu_brings_the_plugin_that_spares_the_compiler() -> None:
    recipe = variant(training={"deepspeed": "zero2"})
    assert swift_environment(recipe, LOGS)["NPROC_PER_NODE"] == "1", "without a launcher DeepSpeed looks for MPI"
    assert plugins_of(variant(training={"processes": 2, "micro_batch_size": 8, "deepspeed": "zero2"})) == ["swift_chunked_loss.py", "swift_cpu_deepspeed.py"]


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"quantization": "nf4"}, {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}),
        ({"method": "dpo"}, {"rlhf_type": "dpo", "beta": 0.1}),
        ({"method": "dpo", "dpo": {"beta": 0.5, "sft_weight": 1.0}}, {"rlhf_type": "dpo", "beta": 0.5, "rpo_alpha": 1.0}),
        ({"training": {"epochs": None, "max_steps": 7}}, {"max_steps": 7}),
        ({"training": {"epochs": None}}, {"num_train_epochs": 1.0}),
        ({"training": {"scheduler": "linear", "weight_decay": 0.0}}, {"lr_scheduler_type": "linear", "weight_decay": 0.0}),
        (
            {"training": {"early_stopping": {"patience_checkpoints": 2, "validation_share": 0.1}, "checkpoint_steps": 20}},
            {"split_dataset_ratio": 0.1, "eval_strategy": "steps", "eval_steps": 20, "save_steps": 20, "callbacks": ["early_stop"], "early_stop_interval": 2},
        ),
        ({"training": {"device": "cuda", "packing": True, "attention": "flash_attention_2"}}, {"packing": True, "attn_impl": "flash_attention_2"}),
        ({"training": {"device": "cuda"}}, {"dataloader_num_workers": 2}),
        ({"training": {"device": "cpu"}}, {"dataloader_num_workers": 0}),
        ({"lora": {"rslora": True}}, {"use_rslora": True}),
        (
            {"lora": {"layers": (2, 3), "target_modules": ("q_proj", "o_proj")}},
            {"target_modules": [f"language_model.layers.{layer}.self_attn.{name}" for layer in (2, 3) for name in ("q_proj", "o_proj")]},
        ),
        (
            {"lora": {"target_modules": ("q_proj",), "freeze_vit": False, "freeze_aligner": False}},
            {"target_modules": ["q_proj", "attn.qkv", "attn.proj", "merger.proj"], "freeze_vit": False, "freeze_aligner": False},
        ),
    ],
)
def test_fields_become_arguments(sections: dict[str, Any], wanted: dict[str, Any]) -> None:
    args = args_of(**sections)
    assert {key: args.get(key) for key in wanted} == wanted


def test_quantization_takes_the_experts_with_it_and_the_loss_is_chunked_where_it_is_the_plain_one() -> None:
    assert plugins_of(variant(quantization="nf4")) == ["swift_chunked_loss.py", "swift_expert_nf4.py"]
    assert plugins_of(variant(quantization="nf4", method="dpo")) == ["swift_expert_nf4.py"]
    assert plugins_of(variant(training={"row_weights": True})) == []
    offloaded = variant(training={"device": "cuda", "gradient_checkpointing": True, "offload_checkpoints": True})
    assert plugins_of(offloaded) == ["swift_chunked_loss.py", "swift_offload_checkpoints.py"]
    assert swift_args(offloaded, *PATHS)["gradient_checkpointing_kwargs"] == '{"use_reentrant": true}'


def test_steps_and_epochs_are_not_both_given() -> None:
    assert "num_train_epochs" not in args_of(training={"epochs": None, "max_steps": 7})


def published_of(recipe: FinetuneRecipe, folder: str = "") -> SwiftArgs:
    args = swift_args(recipe, Path(f"{folder}/base"), Path(f"{folder}/rows.jsonl"), Path(f"{folder}/out"))
    return published(args, "abc", "def")


def test_published_arguments_hold_no_path() -> None:
    recipe = variant(training={"processes": 2, "micro_batch_size": 8, "deepspeed": "zero2"})
    assert "/" not in json.dumps(published_of(recipe))


def test_the_input_digest_is_of_what_decides_the_result() -> None:
    versions = {"version.ms-swift": "4.6.0", "version.trl": "1"}

    def digest(recipe: FinetuneRecipe, folder: str = "", template: str = "t", versions: dict[str, str] = versions) -> str:
        return input_digest(published_of(recipe, folder), recipe.training.processes, template, versions)

    first = digest(EMBEDDED)
    assert digest(EMBEDDED, "/elsewhere") == first
    assert digest(variant(name="other")) == first
    assert digest(variant(training={"checkpoint_steps": 7})) == first
    assert digest(EMBEDDED, versions=versions | {"version.trl": "2"}) == first, "not used by this method"
    others = [
        digest(variant(training={"seed": 9})),
        digest(variant(lora={"alpha": 1.0})),
        digest(variant(quantization="nf4")),
        digest(EMBEDDED, template="other"),
        digest(EMBEDDED, versions=versions | {"version.ms-swift": "4.7.0"}),
        digest(variant(training={"processes": 2, "global_batch_size": 32})),
        digest(EMBEDDED, versions=versions | {"version.pillow": "13"}),
        input_digest(published(swift_args(EMBEDDED, *PATHS), "abc", "other rows"), 1, "t", versions),
        input_digest(published(swift_args(EMBEDDED, *PATHS), "other base", "def"), 1, "t", versions),
    ]
    assert len({first, *others}) == len(others) + 1
    stopping = {"early_stopping": {"patience_checkpoints": 2}}
    assert digest(variant(training=stopping)) != digest(variant(training=stopping | {"checkpoint_steps": 7})), "it decides when to stop"
    quantized = published_of(variant(quantization="nf4"))
    linears_only = quantized | {"external_plugins": ["swift_chunked_loss.py"]}
    assert input_digest(quantized, 1, "t", versions) != input_digest(linears_only, 1, "t", versions), "what nf4 meant before it took the experts along"
    plain = published_of(EMBEDDED)
    before = {key: value for key, value in plain.items() if key != "external_plugins"}
    assert input_digest(plain, 1, "t", versions) == input_digest(before, 1, "t", versions), "the same loss, in another order of summation"
    assert digest(variant(method="dpo")) != digest(variant(method="dpo"), versions=versions | {"version.trl": "2"})


def line(step: int, loss: float = 1.0) -> str:
    return json.dumps({"loss": loss, "global_step/max_steps": f"{step}/20", "remaining_time": "3s", "train_speed(s/it)": 0.25}) + "\n"


class Heard:
    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[str, float]] = []
        self.follower = LogFollower(path, lambda step, values: self.metrics.append((step, dict(values))), lambda *text: self.texts.append(text), resumed_step)


def test_the_log_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    heard = Heard(path)
    heard.follower.read()
    path.write_text(line(5, 2.5) + '{"loss": 1.5, "global', "utf-8")
    heard.follower.read()
    assert heard.metrics == [(5, {"loss": 2.5, "train_speed_s/it": 0.25})]
    path.write_text(line(5, 2.5) + line(10) + '{"train_loss": 1.0, "log_history": []}\n', "utf-8")
    heard.follower.read()
    assert [step for step, _ in heard.metrics] == [5, 10]
    assert heard.texts[:2] == [("loading the model", 0.0), ("step 5/20, loss 2.5000, 0.25 s/step, 3s left", 0.25)]


def test_what_a_killed_training_logged_is_read_and_its_half_line_cut(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    path.write_text(line(5) + line(10) + line(15) + '{"loss": 1.', "utf-8")
    heard = Heard(path, resumed_step=10)
    with path.open("a") as file:
        file.write(line(15) + line(20))
    heard.follower.read()
    assert [step for step, _ in heard.metrics] == [5, 10, 15, 15, 20]
    assert heard.texts[0] == ("going on from step 10/20", 0.5)
    assert heard.texts[-1][0].startswith("step 20/20")


def test_the_process_that_failed_first_is_blamed_with_its_own_log(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("Root Cause (first observed failure):\n[0]:\n  time : now\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n", "utf-8")
    own = tmp_path / "ranks" / "id_x" / "attempt_0" / "1" / "stderr.log"
    own.parent.mkdir(parents=True)
    own.write_text("MemoryError: no room\n", "utf-8")
    recipe = variant(training={"processes": 2, "micro_batch_size": 8})
    child = Child("training", log, log.open("rb"), supervisor=None)  # type: ignore[arg-type]
    text = str(failure_of(child, recipe, tmp_path, tmp_path / "ranks"))
    assert (
        "process 1 of 2 was ended by signal 9" in text and str(own) in text and "MemoryError: no room" in text and "run it again" in text and "full" not in text
    )
