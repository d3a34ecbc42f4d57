"""Damaged and hostile adapters: what is done to a copy of a good one, and to its entry in MLflow."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file, save_file

from pipeline.adapter import adapter_digest
from pipeline.errors import AdapterInvalid
from pipeline.registry import Version
from pipeline.version import BASE_REVISION_TAG, DIGEST_TAG, TEMPLATE_DIGEST_TAG
from tests.acceptance.serving_environment import World

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, np.ndarray]


def leave(folder: Path) -> None:
    """Changes nothing."""


def configure(folder: Path, **values: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def rewrite(folder: Path, change: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> None:
    save_file(dict(change(key, value) for key, value in load_file(folder / WEIGHTS).items()), folder / WEIGHTS)


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def not_finite(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    next(value for key, value in sorted(weights.items()) if "lora_B" in key)[0, 0] = np.nan
    save_file(weights, folder / WEIGHTS)


def rank_64(folder: Path) -> None:
    def padded(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        rows, columns = value.shape
        return key, np.pad(value, ((0, 64 - rows), (0, 0)) if "lora_A" in key else ((0, 0), (0, 64 - columns)))

    rewrite(folder, padded)
    configure(folder, r=64, lora_alpha=128)


def foreign_keys(folder: Path) -> None:
    rewrite(folder, lambda key, value: (key.replace(".language_model.layers.", ".decoder.blocks."), value))


def dora(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    magnitudes = {key.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(value), np.float32) for key, value in weights.items() if "lora_B" in key}
    save_file(weights | magnitudes, folder / WEIGHTS)
    configure(folder, use_dora=True)


def pickle_beside(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04}.")  # an empty dict, pickled


def pickle_instead(folder: Path) -> None:
    pickle_beside(folder)
    (folder / WEIGHTS).unlink()


def fused_experts(folder: Path) -> None:
    """As peft 0.20 saves an adapter of rank 8 of the routed experts: 8 experts, gate and up fused at twice the rank."""
    dice = np.random.default_rng(7)
    shapes = {"base_layer.lora_A": (128, 128), "base_layer.lora_B": (128, 128), "lora_A": (64, 64), "lora_B": (128, 64)}
    prefix = "base_model.model.model.language_model.layers.1.mlp.experts"
    save_file({f"{prefix}.{key}.weight": dice.normal(0, 0.02, shape).astype(np.float32) for key, shape in shapes.items()}, folder / WEIGHTS)
    rank, alpha = {".*\\.gate_up_proj": 16}, {".*\\.gate_up_proj": 32}
    configure(folder, r=8, lora_alpha=16, target_modules=[], target_parameters=["down_proj", "gate_up_proj"], rank_pattern=rank, alpha_pattern=alpha)


def lose_weights(artifacts: Path) -> None:
    (artifacts / WEIGHTS).unlink()


def link_outside(artifacts: Path) -> None:
    """Links to a file outside MLflow's artifact root."""
    (artifacts / WEIGHTS).unlink()
    (artifacts / WEIGHTS).symlink_to("/etc/hostname")


def link_inside(artifacts: Path) -> None:
    """Links to another file of the same folder."""
    (artifacts / WEIGHTS).unlink()
    (artifacts / WEIGHTS).symlink_to(artifacts / CONFIG)


@dataclass(frozen=True)
class Animal:
    """One bad version. `codes` are the reasons that may be given for it."""

    kind: str
    codes: tuple[str, ...]
    change: Callable[[Path], None] = leave
    """What is done to its files before they are uploaded."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its version, in the place of the true ones."""
    spoil: Callable[[Path], None] = leave
    """What is done to its uploaded files on MLflow's disk."""


ZOO = (
    Animal("truncated safetensors", ("weights-unreadable",), truncate),
    Animal("NaN", ("not-finite",), not_finite),
    Animal("wrong base", ("wrong-base",), tags={BASE_REVISION_TAG: "tiny-000000000000"}),
    Animal("wrong template", ("wrong-template",), tags={TEMPLATE_DIGEST_TAG: "0" * 64}),
    Animal("rank too large", ("rank-too-large",), rank_64),
    Animal("keys that match nothing", ("keys-match-nothing",), foreign_keys),
    Animal("DoRA", ("dora",), dora),
    Animal("pickle beside", ("pickle",), pickle_beside),
    Animal("pickle instead", ("pickle",), pickle_instead),
    Animal("digest mismatch", ("digest-mismatch",), tags={DIGEST_TAG: "5" * 64}),
    Animal("artifact missing", ("files-missing",), spoil=lose_weights),
    Animal("link out of the store", ("link", "outside-the-store", "digest-mismatch"), spoil=link_outside),
    Animal("link in the folder", ("link", "digest-mismatch"), spoil=link_inside),
    Animal("3-D experts", ("experts-not-wrapped",), fused_experts),
)


def register(world: World, model: str, animal: Animal, number: int, folder: Path) -> Version:
    """Uploads and registers an animal by hand, past our own checks, as the next version of `model`. `number` makes its files differ from all others'."""
    shutil.copytree(world.adapter, folder)
    configure(folder, base_model_name_or_path=f"zoo-{number}")
    animal.change(folder)
    client = world.registry.client
    with world.registry.run("zoo", {}, {}) as run:
        client.log_artifacts(run.run_id, str(folder), "adapter")
    try:
        digest = adapter_digest(folder)
    except AdapterInvalid:  # it lacks a file
        digest = f"{number:064x}"
    tags = {DIGEST_TAG: digest, BASE_REVISION_TAG: world.trained.base_revision, TEMPLATE_DIGEST_TAG: world.trained.template_digest, **animal.tags}
    new_model(world, model)
    made = client.create_model_version(model, f"runs:/{run.run_id}/adapter", run.run_id, tags)
    animal.spoil(uploaded(world, run.run_id))
    return Version(model, str(made.version), tags[DIGEST_TAG], tags[BASE_REVISION_TAG], tags[TEMPLATE_DIGEST_TAG], run.run_id)


def new_model(world: World, model: str, tags: Mapping[str, str] | None = None) -> None:
    """A registered model of that name, unless there is one."""
    try:
        world.registry.client.create_registered_model(model, tags=dict(tags or {}))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def uploaded(world: World, run_id: str) -> Path:
    """A run's adapter on the embedded MLflow's disk."""
    return next((world.project.mlruns / "artifacts").glob(f"*/{run_id}/artifacts/adapter"))
