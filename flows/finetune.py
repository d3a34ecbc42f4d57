"""recipe -> base, dataset -> adapter -> registered version. `tuneserve train RECIPE` runs it."""

import os
import sys
import time
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from pipeline import basemodel, dataset, lineage, registry, row_statistics, training
from pipeline.adapter import Adapter
from pipeline.basemodel import BaseModel
from pipeline.dataset import Dataset, Deep
from pipeline.progress import progress
from pipeline.project import Project, find_project
from pipeline.recipe import FinetuneRecipe, dump_recipe, load_recipe
from pipeline.registry import Registry, TrainingRun, Version


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="prepare_base {name}")
def prepare_base(name: str, project: Project) -> BaseModel:
    with progress("base model") as report:
        return basemodel.resolve_base_model(name, project, report)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="check the rows of {recipe.name}")
def load_dataset(recipe: FinetuneRecipe, base: BaseModel, project: Project) -> Dataset:
    with progress("rows") as report:
        rows = dataset.load_dataset(recipe.dataset, project, Deep(base.folder, recipe.training.max_length_tokens), report)
    print("\n".join([*(f"warning: {warning}" for warning in rows.warnings), row_statistics.table(dict(rows.statistics))]), file=sys.stderr)
    return rows


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="train {recipe.name}")
def train_adapter(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, run: TrainingRun, project: Project) -> Adapter:
    with progress(f"training {recipe.name}") as report:
        return training.train_adapter(recipe, base.folder, rows, project.runs / run.run_id, project, run.log_metrics, report)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="register {recipe.name}")
def register_adapter(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, adapter: Adapter, run: TrainingRun) -> Version:
    args = training.redacted(training.swift_args(recipe, base.folder, Path("train.jsonl"), Path("output")), base.revision, rows.digest)
    files = {"recipe.yaml": dump_recipe(recipe), "swift_args.json": training.dump_args(args)}
    return run.registry.register(recipe.name, run.run_id, adapter, files, base.revision, basemodel.template_digest())


@flow(name="finetune", flow_run_name="finetune {recipe_path}", persist_result=False)
def finetune(recipe_path: str) -> Version:
    project = find_project()
    recipe = load_recipe(Path(recipe_path), FinetuneRecipe)
    base = prepare_base(recipe.base_model, project)
    rows = load_dataset(recipe, base, project)
    with Registry(registry.tracking_uri()).run(recipe.name, registry.flat(recipe.model_dump(mode="json")), lineage_of(recipe, base, rows, project)) as run:
        run.log_metrics(0, rows.metrics())
        began = time.monotonic()
        adapter = train_adapter(recipe, base, rows, run, project)
        run.tag({"train_seconds": f"{time.monotonic() - began:.1f}", "digest": adapter.digest})
        return register_adapter(recipe, base, rows, adapter, run)


def lineage_of(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, project: Project) -> dict[str, str]:
    """All that an adapter comes from, as tags of its run."""
    inputs = {
        "recipe": recipe.name,
        "base_model": recipe.base_model,
        "base_revision": base.revision,
        "template_digest": basemodel.template_digest(),
        "dataset_digest": rows.digest,
        "dataset_train_rows": str(len(rows.train)),
        "dataset_eval_rows": str(len(rows.eval)),
        "user": os.environ.get("USER", "unknown"),
    }
    return inputs | lineage.code_lineage(project.root) | lineage.versions() | lineage.hardware(recipe.training.device)
