"""What is looked at before anything starts: a recipe and its rows, for `tuneserve check` and for `tuneserve train`."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.basemodel import BaseModel, base_folder_at_hand, resolve_base_model
from pipeline.dataset import Check, Dataset, Deep, check_dataset, load_dataset
from pipeline.errors import Fault, InvalidInput
from pipeline.example import Example
from pipeline.progress import progress
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, Training, check_recipe, load_recipe


def check_recipe_and_rows(path: Path, project: Project, deep: bool) -> tuple[list[Fault], Check | None]:
    """The recipe's own faults, and what was found in its rows as far as it names them right. `deep` makes the tiny base model if it is missing."""
    faults, files = check_recipe(path)
    if not files or not deep:
        check = check_dataset(files, project, recipe=path) if files else None
        return [*faults, *_method_faults_of(path, faults, check)], check
    base, max_length_tokens, preferences = None, Training().max_length_tokens, False
    if not faults:  # else images only: which base model and which limit is not known
        recipe = load_recipe(path, FinetuneRecipe)
        max_length_tokens, preferences = recipe.training.max_length_tokens, recipe.method == "dpo"
        try:
            with progress("base model") as report:
                base = resolve_base_model(recipe.base_model, project, report).folder
        except InvalidInput as error:
            faults = list(error.faults)
    with progress(f"rows of {path}") as report:
        check = check_dataset(files, project, Deep(base, max_length_tokens, preferences), report, path)
    return [*faults, *_method_faults_of(path, faults, check)], check


def _method_faults_of(path: Path, faults: list[Fault], check: Check | None) -> list[Fault]:
    return method_faults(load_recipe(path, FinetuneRecipe), check.train) if check and not faults else []


def checked_rows(path: Path, recipe: FinetuneRecipe, project: Project) -> Dataset:
    """The rows of the recipe in the file `path`, their structure right; no image is looked into.

    Raises InvalidInput otherwise; then images and, with a base model at hand, tokens are looked at too, so that all is said at once.
    """
    try:
        rows = load_dataset(recipe.dataset, project, recipe=path)
    except InvalidInput:
        with progress("rows") as report:
            deep = Deep(base_folder_at_hand(recipe.base_model, project), recipe.training.max_length_tokens, recipe.method == "dpo")
            raise InvalidInput(check_dataset(recipe.dataset, project, deep, report, path).faults) from None
    if faults := method_faults(recipe, rows.train):
        raise InvalidInput(faults)
    return rows


def method_faults(recipe: FinetuneRecipe, train: Sequence[Example]) -> list[Fault]:
    """What the recipe's method asks of training rows and they do not have, or the other way round; one fault for all rows."""
    where = str(recipe.dataset.train)
    plain = [example.row for example in train if not example.rejected]
    weighted = [example.row for example in train if example.weight != 1]
    faults = []
    if recipe.method == "dpo" and plain:
        faults.append(Fault(where, f"row {plain[0]}.rejected_response", f"is missing, in {len(plain)} rows; method: dpo needs an answer that is worse"))
    if weighted and not recipe.training.row_weights:
        remedy = "set training.row_weights: true, or remove it" if recipe.method == "sft" else "remove it"
        faults.append(Fault(where, f"row {weighted[0]}.weight", f"is given, in {len(weighted)} rows, and not used; {remedy}"))
    return faults


def refuse_misfit(path: Path, recipe: FinetuneRecipe, base: BaseModel) -> None:
    """Raises InvalidInput if the recipe in the file `path` names what its base model or this machine does not have."""
    faults = []
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    layers = config.get("text_config", config).get("num_hidden_layers")
    if recipe.lora.layers and layers and recipe.lora.layers[1] >= layers:
        faults.append(Fault(str(path), "lora.layers", f"ends with layer {recipe.lora.layers[1]}; this base model has layers 0 to {layers - 1}"))
    if recipe.training.attention != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        faults.append(Fault(str(path), "training.attention", f"{recipe.training.attention} needs the package flash-attn; install it into .venv, or use sdpa"))
    if (recipe.training.deepspeed or "").endswith("_offload") and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        faults.append(
            Fault(str(path), "training.deepspeed", f"{recipe.training.deepspeed} builds its optimizer with a C++ compiler, and there is none: install g++")
        )
    if faults:
        raise InvalidInput(faults)
