"""recipe -> base, dataset -> adapter -> registered version. `tuneserve train RECIPE` runs it."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from pipeline import basemodel, dataset, journal, lineage, registry, row_statistics, training
from pipeline.adapter import Adapter
from pipeline.basemodel import BaseModel
from pipeline.dataset import Dataset, Deep
from pipeline.errors import Fault, InvalidInput, ProcessFailed
from pipeline.lineage import Inputs
from pipeline.preflight import checked_rows, refuse_misfit
from pipeline.process import locked
from pipeline.progress import progress
from pipeline.project import Project, find_project
from pipeline.recipe import FinetuneRecipe, dump_recipe, load_recipe
from pipeline.reference import REFERENCE_FILE
from pipeline.registry import Registry, TrainingRun, Version

logger = logging.getLogger(__name__)
NO_REFERENCE_WARNING = (
    "the adapter is registered without a parity reference, so that nothing can prove that servers answer as training did; to have one, train again with --force"
)
WAITING = "another tuneserve trains {} from the same inputs; waiting for its version"


@dataclass(frozen=True)
class Finetuned:
    """The version of a recipe's inputs; `trained` is False if it was there already."""

    version: Version
    trained: bool


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="prepare_base {name}")
def prepare_base(name: str, project: Project) -> BaseModel:
    with progress("base model") as report:
        return basemodel.resolve_base_model(name, project, report)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="check the rows of {recipe.name}")
def load_dataset(recipe: FinetuneRecipe, base: BaseModel, project: Project) -> Dataset:
    with progress("rows") as report:
        rows = dataset.load_dataset(recipe.dataset, project, Deep(base.folder, recipe.training.max_length_tokens, recipe.method == "dpo"), report)
    print("\n".join([*(f"warning: {warning}" for warning in rows.warnings), row_statistics.table(dict(rows.statistics))]), file=sys.stderr)
    return rows


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="train {recipe.name}")
def train_adapter(recipe: FinetuneRecipe, base: BaseModel, rows: Dataset, run: TrainingRun, project: Project) -> Adapter:
    with progress(f"training {recipe.name}") as report:
        return training.train_adapter(recipe, base.folder, rows, project.runs / run.run_id, project, run.log_metrics, report)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="parity reference of {recipe.name}")
def make_reference(recipe: FinetuneRecipe, base: BaseModel, adapter: Adapter, rows: Dataset, run: TrainingRun, project: Project) -> str | None:
    """None if it cannot be made: an adapter that took days is registered all the same, and the gate says what it lacks."""
    try:
        with progress("parity reference") as report:
            report("loading the base", 0.0)
            return training.make_reference(recipe, base, adapter, rows, project.runs / run.run_id, project)
    except (OSError, ProcessFailed) as error:
        logger.error("parity reference failed", extra={"digest": adapter.digest})
        print(f"warning: {error}\n{NO_REFERENCE_WARNING}", file=sys.stderr)
        return None


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="register {recipe.name}")
def register_adapter(recipe: FinetuneRecipe, inputs: Inputs, adapter: Adapter, reference: str | None, run: TrainingRun) -> Version:
    files = {"recipe.yaml": dump_recipe(recipe), "swift_args.json": training.dump_args(inputs.args)}
    files |= {REFERENCE_FILE: reference} if reference else {}
    return run.registry.register(recipe.name, run.run_id, adapter, files, inputs.base.revision, basemodel.template_digest(), inputs.digest)


@flow(name="finetune", flow_run_name="finetune {recipe_path}", persist_result=False)
def finetune(recipe_path: str, force: bool = False) -> Finetuned:
    project = find_project()
    recipe = load_recipe(Path(recipe_path), FinetuneRecipe)
    given = checked_rows(Path(recipe_path), recipe, project)
    base = prepare_base(recipe.base_model, project)
    refuse_misfit(Path(recipe_path), recipe, base)
    inputs = lineage.inputs_of(recipe, base, given)
    registered = Registry(registry.tracking_uri())
    with locked(project.runs / f"{recipe.name}-{inputs.digest[:16]}.lock", lambda: print(WAITING.format(recipe.name), file=sys.stderr)):
        if not force and (found := registered.trained(recipe.name, inputs.digest)):
            logger.info("nothing to train", extra={"model": found.name, "version": found.version, "digest": found.digest})
            registered.close(found.run_id)  # open still if its command was killed right after it had registered
            return Finetuned(found, trained=False)
        rows = load_dataset(recipe, base, project)
        if not rows.is_of(given):  # else the version would stand for rows that it was not trained on
            raise InvalidInput([Fault(str(recipe.dataset.train), "", "the rows changed while training was prepared; run it again")])
        left = [] if force else [run_id for run_id in registered.unfinished(recipe.name, inputs.digest) if (project.runs / run_id).is_dir()]
        params, tags = registry.flat(recipe.model_dump(mode="json")), lineage.lineage_of(recipe, inputs, project.root)
        with registered.run(recipe.name, params, tags, resume=next(iter(left), None)) as run, journal.about(run_id=run.run_id, model=recipe.name):
            (project.runs / run.run_id).mkdir(parents=True, exist_ok=True)  # from here on a killed training is found again
            run.log_metrics(0, rows.metrics())
            began = time.monotonic()
            adapter = train_adapter(recipe, base, rows, run, project)
            run.tag({"train_seconds": f"{time.monotonic() - began:.1f}", "digest": adapter.digest})
            began = time.monotonic()
            reference = make_reference(recipe, base, adapter, rows, run, project)
            run.tag({"parity_reference": f"{time.monotonic() - began:.1f} s" if reference else "none"})
            return Finetuned(register_adapter(recipe, inputs, adapter, reference, run), trained=True)
