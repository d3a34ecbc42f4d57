"""What is looked at before anything starts: a recipe and its rows, for `tuneserve check` and for `tuneserve train`."""

from pathlib import Path

from pipeline.basemodel import base_folder_at_hand, resolve_base_model
from pipeline.dataset import Check, Deep, check_dataset
from pipeline.errors import Fault, InvalidInput
from pipeline.progress import progress
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, Training, check_recipe, load_recipe


def check_recipe_and_rows(path: Path, project: Project, deep: bool) -> tuple[list[Fault], Check | None]:
    """The recipe's own faults, and what was found in its rows as far as it names them right. `deep` makes the tiny base model if it is missing."""
    faults, files = check_recipe(path)
    if not files or not deep:
        return faults, check_dataset(files, project, recipe=path) if files else None
    base, max_length_tokens = None, Training().max_length_tokens
    if not faults:  # else images only: which base model and which limit is not known
        recipe = load_recipe(path, FinetuneRecipe)
        max_length_tokens = recipe.training.max_length_tokens
        try:
            with progress("base model") as report:
                base = resolve_base_model(recipe.base_model, project, report).folder
        except InvalidInput as error:
            faults = list(error.faults)
    with progress(f"rows of {path}") as report:
        return faults, check_dataset(files, project, Deep(base, max_length_tokens), report, path)


def refuse_bad_rows(path: Path, recipe: FinetuneRecipe, project: Project) -> None:
    """Raises InvalidInput if a row's structure is wrong; then images and, with a base model at hand, tokens are looked at too, so that all is said at once."""
    if not check_dataset(recipe.dataset, project, recipe=path).faults:
        return
    with progress("rows") as report:
        deep = Deep(base_folder_at_hand(recipe.base_model, project), recipe.training.max_length_tokens)
        raise InvalidInput(check_dataset(recipe.dataset, project, deep, report, path).faults)
