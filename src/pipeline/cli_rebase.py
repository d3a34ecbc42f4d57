"""The command for when the base changes: rebase. cli.py holds the others, and what they promise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli_serving import chosen_replicas, evaluate_on_option, evaluation_replica, fleet_options, must_reach_all
from pipeline.command import flow_servers, json_option, opened_project
from pipeline.errors import Fault, InvalidInput, RegistryError, ServingError

if TYPE_CHECKING:
    from pipeline.project import Project
    from pipeline.rebasing import Bound
    from pipeline.recipe import FinetuneRecipe
    from pipeline.registry import Registry


@click.command(short_help="Bring live adapters onto a new base, all or none.")
@click.argument("recipes", nargs=-1, type=click.Path(path_type=Path))
@click.option("--list", "listing", is_flag=True, help="Only say which champions are bound to what, and what each needs. So without RECIPE.")
@click.option("--to", "to", metavar="FOLDER", help="List against the base model in FOLDER, instead of the one that each recipe names.")
@evaluate_on_option
@fleet_options
@json_option
def rebase(
    recipes: tuple[Path, ...], listing: bool, to: str | None, evaluate_on: str | None, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool
) -> None:
    """Bring the champions of RECIPE... onto the base model that these name now, with the prompt template and the libraries that are here, as one batch.

    A champion of another base or template is trained again, one that only libraries have changed for is looked at again. Each must be served as it was trained
    (parity), and be as good on its held-out rows as the champion was there on record, by the replicas of --replica or --serving: start these on the new base first, beside
    the old ones, which go on serving. Aliases move only when all are through; if one does not, all go back. Run it again after a crash, and it goes on.
    """
    serving, urls = chosen_replicas(recipe_path, replica_urls)
    asked = evaluation_replica(serving, evaluate_on)
    if not recipes or listing or to is not None:
        if recipes:
            raise InvalidInput([Fault("--to" if to is not None else "--list", "", "only lists; leave it out to rebase, or RECIPE to list")])
        if serving or urls or evaluate_on:
            raise InvalidInput(
                [Fault("RECIPE", "", "is missing, so nothing would be asked of replicas; name the recipes of the batch, or leave the replicas out to list")]
            )
        _list(to, as_json)
        return
    from pipeline.recipe import FinetuneRecipe, load_recipe

    for path in recipes:
        load_recipe(path, FinetuneRecipe)  # wrong input is refused before any server starts
    with opened_project() as project, flow_servers(project):
        from flows.rebase import rebase as flow
        from pipeline.fleet import addresses_of

        addresses = addresses_of(project, serving, urls)
        done = flow([str(path) for path in recipes], addresses, evaluate_on=asked, unreachable_fails=must_reach_all(serving))
    if not as_json:
        click.echo("\n".join(done.lines()))
    if done.kept_back:
        raise ServingError(done.kept_back)
    if as_json:
        click.echo(json.dumps(done.as_dict()))


def _list(to: str | None, as_json: bool) -> None:
    from pipeline import services
    from pipeline.progress import progress

    with opened_project() as project:
        target = _target(to, project) if to is not None else None
        with progress("MLflow"), services.tracking(project) as uri:
            from pipeline.registry import Registry

            found = list(_champions(Registry(uri), project, to, target))
    if as_json:
        click.echo(json.dumps({"to": to, "champions": [each.as_dict() for each in found]}))
        return
    due = [each for each in found if each.need.step != "nothing"]
    click.echo("\n".join([line for each in found for line in each.lines()] or ["no model has a champion, so nothing is live"]))
    if due:
        click.echo(f"{len(due)} of {len(found)} need something; once servers of the new base are up: tuneserve rebase RECIPE... --replica URL")


def _target(to: str, project: "Project") -> str:
    """The revision of the base in that folder."""
    from pipeline.basemodel import TINY, base_folder_at_hand, read_base_model
    from pipeline.progress import progress

    folder = base_folder_at_hand(to, project) if to == TINY else project.resolve(Path(to))
    if folder is None:
        raise InvalidInput([Fault("--to", "", "the tiny base of now is not made yet; give a folder, or make it: tuneserve quickstart")])
    with progress("base model"):
        return read_base_model(folder, project.bases / "digests.json").revision


def _champions(registered: "Registry", project: "Project", to: str | None, target: str | None) -> "Iterator[Bound]":
    from pipeline import lineage, rebasing
    from pipeline.basemodel import base_folder_at_hand, template_digest
    from pipeline.decision import Reason
    from pipeline.examination import revision
    from pipeline.registry import flat
    from pipeline.version import REBASE_TAG

    template, libraries = template_digest(), rebasing.libraries_of(lineage.versions())
    recipes = _recipes(project)
    revisions: dict[str, str | None] = {}

    def at_hand(base: str) -> str | None:
        if base not in revisions:
            folder = base_folder_at_hand(base, project)
            revisions[base] = revision(folder, project) if folder else None
        return revisions[base]

    for name, number in registered.live():
        own = {file: {key: str(value) for key, value in flat(recipe.model_dump(mode="json")).items()} for file, recipe in recipes.get(name, {}).items()}
        try:
            version = registered.version(name, number)
            origin = registered.lineage(version)
            passed = rebasing.read_passed(registered.tags(version).get(REBASE_TAG))
        except RegistryError as error:
            now = rebasing.Binding(target, template, libraries)
            why = Reason("not-ours", str(error).partition("\n")[0])
            yield rebasing.Bound(name, number, None, now, rebasing.Need("unknown", (why,)), tuple(sorted(own)))
            continue
        files = rebasing.recipe_of(origin, own)
        base = recipes[name][files[0]].base_model if len(files) == 1 else origin.get("base_model", "")
        now = rebasing.Binding(target if to is not None else at_hand(base), template, libraries)
        then = rebasing.bound(version.base_revision, version.template_digest, origin, passed)
        yield rebasing.Bound(name, number, then, now, rebasing.need(then, now), files)


def _recipes(project: "Project") -> "dict[str, dict[str, FinetuneRecipe]]":
    """The project's finetune recipes by model and file; those that are none, or wrong, are left out."""
    from pipeline.recipe import FinetuneRecipe, load_recipe

    found: dict[str, dict[str, FinetuneRecipe]] = {}
    for path in sorted((project.root / "recipes").rglob("*.yaml")):
        try:
            recipe = load_recipe(path, FinetuneRecipe)
        except InvalidInput:
            continue
        found.setdefault(recipe.name, {})[project.relative(path)] = recipe
    return found
