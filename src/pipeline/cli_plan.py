"""`tuneserve plan`, and what `train` and `serve` do with it before they start anything. cli.py says what all commands promise."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.command import json_option, recipe_argument
from pipeline.errors import Fault, InvalidInput

if TYPE_CHECKING:
    from pipeline.capacity import Plan
    from pipeline.gpus import Gpu
    from pipeline.project import Project
    from pipeline.recipe import Recipe

ignore_plan_option = click.option("--ignore-plan", is_flag=True, help="Start although `tuneserve plan` says that it does not fit these GPUs.")


@click.command(short_help="Memory per GPU: does a recipe fit?")
@recipe_argument
@click.option("--gpu", "gpu_name", metavar="KIND", help="Such as a100-80gb, h100-80gb or h200-141gb; default: the GPUs in this machine.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="GPUs of that kind; default: as many as the recipe uses.")
@click.option(
    "--answer-tokens", type=click.IntRange(min=1), metavar="N", help="The longest answer in the training rows (`check --deep` counts); default: a whole row."
)
@click.option("--image-tokens", type=click.IntRange(min=0), metavar="N", help="The most image tokens of a row; counts only if the vision tower trains.")
@json_option
def plan(recipe: Path, gpu_name: str | None, count: int | None, answer_tokens: int | None, image_tokens: int | None, as_json: bool) -> None:
    """Show what a finetune or serving recipe takes of each GPU, by item, whether it fits, and the nearest change that makes it fit; exits 1 if it does not.

    Needs no GPU and no weights: sizes come from the base model's config.json, or are GLM-4.5V's published ones if its folder is not here yet. A recipe for the CPU is
    held against this machine's memory. `train` and `serve` do this first, on the GPUs that are here.
    """
    from pipeline.capacity import Assumed, architecture_of
    from pipeline.capacity import plan as make_plan
    from pipeline.project import find_project
    from pipeline.recipe import load_either

    loaded = load_either(recipe)
    gpu, available = _gpu_for(recipe, loaded, gpu_name, count)
    found = make_plan(loaded, architecture_of(loaded.base_model, find_project()), gpu, available, Assumed(answer_tokens, image_tokens))
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    sys.exit(0 if found.fits else 1)


def _gpu_for(path: Path, recipe: "Recipe", name: str | None, count: int | None) -> "tuple[Gpu, int | None]":
    """What a plan is made for, and how many there are; None: as many as the recipe uses."""
    from pipeline.capacity import host_memory
    from pipeline.gpus import gpus_here, known_gpu
    from pipeline.recipe import FinetuneRecipe

    if name:
        return known_gpu(name), count
    if _on_cpu(recipe):
        return host_memory(recipe.training.processes if isinstance(recipe, FinetuneRecipe) else 1), None
    here, why_none = gpus_here()
    if not here:
        raise InvalidInput([Fault(str(path), "", f"is for GPUs, and none is here: {why_none}; name a kind, such as --gpu h100-80gb")])
    return min(here, key=lambda gpu: gpu.bytes), count or len(here)


def _on_cpu(recipe: "Recipe") -> bool:
    from pipeline.recipe import FinetuneRecipe

    return (recipe.training.device if isinstance(recipe, FinetuneRecipe) else recipe.device) == "cpu"


def refuse_what_cannot_fit(path: Path, recipe: "Recipe", project: "Project", ignore_plan: bool) -> None:
    """Raises InvalidInput with the plan's verdict if the recipe in the file `path` does not fit the GPUs that are here; the table goes to stderr.

    Says nothing of recipes for the CPU, and nothing where nvidia-smi sees no GPU or the base model's folder is not there: what starts next says that better.
    """
    found = None if ignore_plan or _on_cpu(recipe) else plan_here(recipe, project)
    if found is None or found.fits:
        return
    click.echo("\n".join(found.lines()), err=True)
    remedy = f"change {found.change}" if found.change else "use more or larger GPUs"
    raise InvalidInput([Fault(str(path), "", f"{found.verdict}; {remedy}, or start it all the same with --ignore-plan")])


def plan_here(recipe: "Recipe", project: "Project") -> "Plan | None":
    """The plan on this machine's GPUs (the smallest counts); None if it cannot be made."""
    from pipeline.basemodel import TINY
    from pipeline.capacity import architecture_of
    from pipeline.capacity import plan as make_plan
    from pipeline.gpus import gpus_here

    here, _ = gpus_here()
    if not here or (recipe.base_model != TINY and not (project.resolve(Path(recipe.base_model)) / "config.json").is_file()):
        return None
    return make_plan(recipe, architecture_of(recipe.base_model, project), min(here, key=lambda gpu: gpu.bytes), len(here))
