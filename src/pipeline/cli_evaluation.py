"""The commands about how good a version is, and what became of it: evaluate, history. cli.py holds the others, and what they promise."""

import json
from pathlib import Path

import click

from pipeline.cli_serving import adapter_of, chosen_replicas, evaluate_on_option, evaluation_replica, finetune_option, fleet_options
from pipeline.command import flow_servers, json_option, opened_project


@click.command(short_help="Score a version against the champion and the base.")
@click.argument("adapter", metavar="NAME[/VERSION]")
@finetune_option
@click.option("--baselines", is_flag=True, help="Also score the base with a few training rows in its prompt: what a prompt alone buys.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only N of the held-out rows, evenly spread.")
@evaluate_on_option
@fleet_options
@json_option
def evaluate(
    adapter: str,
    finetune_path: Path | None,
    baselines: bool,
    limit: int | None,
    evaluate_on: str | None,
    recipe_path: Path | None,
    replica_urls: tuple[str, ...],
    as_json: bool,
) -> None:
    """Ask a version (default: the newest), the champion and the base the recipe's held-out questions, and say what its `promotion:` rules decide.

    The version is served on every replica meanwhile, as name/version only: nobody else is answered by it. Changes nothing else.
    Every answer and the decision go to MLflow and, as an artifact, to Prefect.
    """
    from pipeline.recipe import FinetuneRecipe, load_recipe

    name, version = adapter_of(adapter)
    serving, urls = chosen_replicas(recipe_path, replica_urls)
    asked = evaluation_replica(serving, evaluate_on)
    if finetune_path is not None:
        load_recipe(finetune_path, FinetuneRecipe)  # a wrong recipe is refused before any server starts
    with opened_project() as project, flow_servers(project) as (mlflow_uri, _):
        from flows.evaluate import evaluate as flow
        from pipeline.fleet import addresses_of

        recipe = str(finetune_path) if finetune_path else None
        found = flow(name, version, addresses_of(project, serving, urls), recipe_path=recipe, baselines=baselines, limit=limit, evaluate_on=asked)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    click.echo("\n".join(found.lines()))
    click.echo(f"every answer: run {found.run_id} in MLflow at {mlflow_uri}")


@click.command(short_help="Who moved the champion, when and why.")
@click.argument("name")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="The newest N entries.")
@json_option
def history(name: str, limit: int, as_json: bool) -> None:
    """Show what became of the versions of NAME: promoted, kept out, refused, rolled back, or moved outside tuneserve; newest first."""
    from pipeline import services
    from pipeline.progress import progress

    adapter_of(name, versioned=False)
    with opened_project(uses_caches=False) as project, progress("MLflow"), services.tracking(project) as uri:
        from pipeline.history import history as entries_of
        from pipeline.history import lines
        from pipeline.registry import Registry

        entries = entries_of(Registry(uri), name)[:limit]
    click.echo(json.dumps({"name": name, "entries": [entry.as_dict() for entry in entries]}) if as_json else "\n".join(lines(name, entries)))


COMMANDS = (evaluate, history)
