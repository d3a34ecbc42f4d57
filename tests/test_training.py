"""What ms-swift is told, and what is made of what it logs."""

import json
from pathlib import Path

from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.training import LogFollower, redacted, swift_args, swift_environment
from tests.conftest import ROOT

EMBEDDED = load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe)
PATHS = (Path("/base"), Path("/rows.jsonl"), Path("/out"))


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
        "use_cpu": True,
        "strict": True,
        "check_model": False,
        "add_version": False,
        "report_to": ["none"],
    }
    assert {key: args[key] for key in wanted} == wanted
    assert "deepspeed" not in args
    assert swift_environment(EMBEDDED)["DS_ACCELERATOR"] == "cpu"


def test_batches_and_deepspeed_on_gpus() -> None:
    training = {"device": "cuda", "processes": 4, "micro_batch_size": 2, "global_batch_size": 32, "deepspeed": "zero3"}
    recipe = FinetuneRecipe.model_validate(EMBEDDED.model_dump() | {"training": training})
    args = swift_args(recipe, *PATHS)
    assert (args["per_device_train_batch_size"], args["gradient_accumulation_steps"], args["deepspeed"]) == (2, 4, "zero3")
    assert "use_cpu" not in args
    assert swift_environment(recipe)["NPROC_PER_NODE"] == "4"


def test_published_arguments_hold_no_path() -> None:
    assert "/" not in json.dumps(redacted(swift_args(EMBEDDED, *PATHS), "abc", "def"))


def test_the_log_is_followed_line_by_line(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    texts: list[tuple[str, float]] = []
    path = tmp_path / "logging.jsonl"
    follower = LogFollower(path, lambda step, values: seen.append((step, dict(values))), lambda text, fraction: texts.append((text, fraction)))
    follower.read()
    first = '{"loss": 2.5, "global_step/max_steps": "5/20", "remaining_time": "3s", "train_speed(s/it)": 0.25}\n'
    path.write_text(first + '{"loss": 1.5, "global', "utf-8")
    follower.read()
    assert seen == [(5, {"loss": 2.5, "train_speed_s/it": 0.25})]
    path.write_text(first + '{"loss": 1.5, "global_step/max_steps": "10/20"}\n{"train_loss": 1.0, "log_history": []}\n', "utf-8")
    follower.read()
    assert [step for step, _ in seen] == [5, 10]
    assert texts[0] == ("loading the model", 0.0)
    assert texts[1] == ("step 5/20, loss 2.5000, 0.25 s/step, 3s left", 0.25)
