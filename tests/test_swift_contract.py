"""What recipe fields do in the real ms-swift: each is trained for a few steps on an untrained tiny model, and what comes out is looked at."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline import tinyglm
from pipeline.adapter import Adapter
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.checkpoint import checkpoints
from pipeline.dataset import Dataset, load_dataset
from pipeline.project import Project
from pipeline.recipe import DatasetFiles, FinetuneRecipe, load_recipe
from pipeline.training import train_adapter
from tests.conftest import ROOT

pytestmark = pytest.mark.contract
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    processor = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    tinyglm.save(tinyglm.make_model(tinyglm.make_config(processor.tokenizer)), processor, folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> Dataset:
    folder = ROOT / "data/catalog"
    whole = load_dataset(DatasetFiles(train=folder / "train.jsonl", eval=folder / "eval.jsonl"), Project(ROOT))
    return dataclasses.replace(whole, train=whole.train[:64])


@dataclasses.dataclass(frozen=True)
class Trained:
    adapter: Adapter
    folder: Path
    metrics: list[tuple[int, dict[str, float]]]

    @property
    def modules(self) -> set[str]:
        """Names of the modules that the adapter's tensors belong to, from `language_model` or `visual` on."""
        with safe_open(self.adapter.folder / "adapter_model.safetensors", "np") as weights:
            return {key.removeprefix("base_model.model.model.").partition(".lora_")[0] for key in weights.keys()}  # noqa: SIM118 (no mapping)

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.adapter.folder / "adapter_config.json").read_text("utf-8")))


def train(base: Path, rows: Dataset, folder: Path, **sections: Any) -> Trained:
    values = load_recipe(ROOT / "recipes/finetune/catalog-tiny.yaml", FinetuneRecipe).model_dump()
    sections["training"] = {"epochs": None, "max_steps": 3, "checkpoint_steps": 2} | sections.get("training", {})
    for key, value in sections.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    recipe = FinetuneRecipe.model_validate(values)
    metrics: list[tuple[int, dict[str, float]]] = []
    project = Project(folder)
    run = project.runs / "run"
    adapter = train_adapter(recipe, base, rows, run, project, lambda step, seen: metrics.append((step, dict(seen))), lambda text, fraction: None)
    return Trained(adapter, run, metrics)


@pytest.fixture(scope="module")
def plain(base: Path, rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained as the recipe says."""
    return train(base, rows, tmp_path_factory.mktemp("plain"))


def test_layers_rslora_the_vision_towers_attention_and_the_aligner(base: Path, rows: Dataset, tmp_path: Path) -> None:
    trained = train(base, rows, tmp_path, lora={"layers": (1, 2), "rslora": True, "freeze_vit": False, "freeze_aligner": False})
    language = {f"language_model.layers.{layer}.self_attn.{name}" for layer in (1, 2) for name in ATTENTION}
    vision = {f"visual.blocks.{block}.attn.{name}" for block in (0, 1) for name in ("qkv", "proj")}
    assert trained.modules == language | vision | {"visual.merger.proj"}
    assert trained.config["use_rslora"] and trained.adapter.rank == 16


def test_early_stopping_keeps_the_best_checkpoint(base: Path, rows: Dataset, tmp_path: Path) -> None:
    stopping = {
        "early_stopping": {"patience_checkpoints": 1, "validation_share": 0.25},
        "max_steps": 100,
        "learning_rate": 0.3,
        "scheduler": "constant_with_warmup",
    }
    trained = train(base, rows, tmp_path, training=stopping)
    losses = {step: seen["eval_loss"] for step, seen in trained.metrics if "eval_loss" in seen}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) < 100, "a learning rate this high must stop early"
    assert best < max(losses)
    taken = (trained.adapter.folder / "adapter_model.safetensors").read_bytes()
    assert taken == (trained.folder / f"swift/checkpoint-{best}/adapter_model.safetensors").read_bytes()

    last = checkpoints(trained.folder / "swift")[-1]
    trained.adapter.folder.rename(tmp_path / "kept")  # as if killed before the last checkpoint: patience is not begun anew
    shutil.rmtree(last.folder)
    again = train(base, rows, tmp_path, training=stopping)
    assert checkpoints(again.folder / "swift")[-1].step == last.step and again.adapter.digest == trained.adapter.digest


def test_the_kept_checkpoints_can_be_gone_on_from_and_a_finished_training_is_not_run_again(base: Path, rows: Dataset, plain: Trained) -> None:
    project = plain.folder.parents[2]
    log = next((project / ".tuneserve/logs").glob("*.log"))
    before = log.stat().st_mtime_ns
    assert train(base, rows, project).adapter == plain.adapter
    assert log.stat().st_mtime_ns == before
    plain.adapter.folder.rename(project / "kept")  # as if killed after the last checkpoint, before the adapter was taken out of it
    again = train(base, rows, project)
    assert again.adapter.digest == plain.adapter.digest


def test_preferences(base: Path, rows: Dataset, tmp_path: Path) -> None:
    pairs = tuple(dataclasses.replace(example, rejected="a grey thing") for example in rows.train)
    trained = train(base, dataclasses.replace(rows, train=pairs), tmp_path, method="dpo", dpo={"beta": 0.5}, training={"micro_batch_size": 4})
    first, last = trained.metrics[0][1], trained.metrics[-1][1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy starts as the reference: log 2"
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0


@pytest.mark.parametrize(
    "more", [{"gradient_checkpointing": True}, {"processes": 2, "micro_batch_size": 8, "deepspeed": "zero2"}], ids=["checkpointing", "zero2"]
)
def test_nf4_takes_the_routed_experts_and_leaves_the_adapter_as_it_is(base: Path, rows: Dataset, tmp_path: Path, more: dict[str, Any]) -> None:
    trained = train(base, rows, tmp_path, quantization="nf4", training=more)
    assert trained.modules == {f"language_model.layers.{layer}.self_attn.{name}" for layer in range(4) for name in ATTENTION}
    log = next((tmp_path / ".tuneserve/logs").glob("*.log")).read_text("utf-8")
    assert log.count("(experts): ParametrizedGlm4vMoeTextExperts(") >= 1, "as ms-swift shows the model"
    assert trained.metrics[-1][1]["loss"] < trained.metrics[0][1]["loss"]
    states = list(trained.folder.glob("swift/checkpoint-3/global_step3/*model_states.pt"))
    assert all(path.stat().st_size < 2 * 2**20 for path in states) and bool(states) == ("deepspeed" in more), "no frozen weights in checkpoints"


def test_row_weights(base: Path, rows: Dataset, plain: Trained, tmp_path: Path) -> None:
    light = tuple(dataclasses.replace(example, weight=0.01) for example in rows.train)
    unweighted = train(base, rows, tmp_path / "unweighted", training={"row_weights": True})
    for chunked, whole in zip(plain.metrics, unweighted.metrics, strict=True):
        assert chunked[1].get("loss") == pytest.approx(whole[1].get("loss"), rel=1e-5), "the chunked loss is ms-swift's own"
    assert "token_acc" in unweighted.metrics[0][1] and "token_acc" not in plain.metrics[0][1], "the chunked loss makes no logits"
    weighted = train(base, dataclasses.replace(rows, train=light), tmp_path / "weighted", training={"row_weights": True})
    loss, weighted_loss = plain.metrics[0][1]["loss"], weighted.metrics[0][1]["loss"]
    assert 0.01 * loss < weighted_loss < 0.5 * loss, "what is left is the end token's, which has no weight"
