"""`tuneserve feedback`: people's word on sampled answers, and what of it is trained on. cli.py holds the other commands, and what all promise."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pipeline.command import json_option, opened_project, recipe_argument
from pipeline.errors import TuneserveError

if TYPE_CHECKING:
    from pipeline.feedback import Judged, Rating, State

STATES = ("new", "given", "approved", "rejected", "refused")
sample_arguments = click.argument("samples", nargs=-1, required=True, metavar="SAMPLE...")


@click.group(short_help="Judge sampled answers, and train on what was approved.")
def feedback() -> None:
    """Answers that servers sampled (`sampling:` in a serving recipe): say what is right, approve it, and have it trained on.

    A SAMPLE is its id in the list, or the `id` of the answer as the application got it.
    """


@feedback.command("list", short_help="Show samples, the newest first.")
@click.option("--name", metavar="MODEL", help="Only those that this model answered.")
@click.option("--state", type=click.Choice(STATES), help="Only those of which nobody said anything (new), that wait to be approved (given), and so on.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="At most so many.")
@json_option
def list_(name: str | None, state: "State | None", limit: int, as_json: bool) -> None:
    """Show samples, the newest first, with what was said of each."""
    from pipeline.feedback import judged_samples
    from pipeline.project import find_project

    project = find_project()
    found = [each for each in judged_samples(project) if name in (None, each.sample.name) and state in (None, each.feedback.state)]
    shown = found[:limit]
    if as_json:
        click.echo(json.dumps({"samples": [each.as_dict(project) for each in shown], "total": len(found)}))
        return
    for each in shown:
        click.echo(each.line())
    if not found:
        click.echo("no such samples; servers keep them with `sampling:` in their recipe")
    if len(found) > len(shown):
        click.echo(f"{len(found) - len(shown)} more: --limit {len(found)}")


@feedback.command(short_help="Rate or correct an answer.")
@click.argument("sample")
@click.option("--rating", type=click.Choice(["good", "bad"]), help="good: the answer may be trained on, once that is approved.")
@click.option("--correction", metavar="TEXT", help="What it should have answered.")
@json_option
def give(sample: str, rating: "Rating | None", correction: str | None, as_json: bool) -> None:
    """Rate or correct an answer. It is trained on only once it was approved; what was said of it before counts no more."""
    from pipeline import feedback as said
    from pipeline.switch import user_at_host

    with opened_project(uses_caches=False) as project:
        found = said.find(said.judged_samples(project, [sample]), sample)
        said.give(project, found, rating, correction, user_at_host())
    _show([found], "given", as_json)


@feedback.command(short_help="Let feedback be trained on.")
@sample_arguments
@json_option
def approve(samples: tuple[str, ...], as_json: bool) -> None:
    """Approve what was given on these samples, so that `tuneserve feedback export` makes rows of it: all of them, or none if one cannot be."""
    _show(_decided(samples, "approved"), "approved", as_json)


@feedback.command(short_help="Keep feedback from being trained on.")
@sample_arguments
@click.option("--why", required=True, metavar="TEXT", help="Why; it is recorded with who and when.")
@json_option
def reject(samples: tuple[str, ...], why: str, as_json: bool) -> None:
    """Reject what was given on these samples. What was exported before stays in its file."""
    from pipeline.approval import checked_why

    _show(_decided(samples, "rejected", checked_why(why)), "rejected", as_json)


@feedback.command(short_help="Make training rows of what was approved.")
@recipe_argument
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Where the rows go, after those that are there; a shard of the recipe's dataset.train.",
)
@json_option
def export(recipe: Path, to: Path, as_json: bool) -> None:
    """Add the approved feedback on RECIPE's model to a file of rows, with pictures and provenance; what is there already is not added again.

    Refused, on record, and told with exit code 1 while the others are written: what asks what a held-out row asks, what contradicts a training row, and what cannot be a row.
    """
    from pipeline.feedback_rows import export as write
    from pipeline.recipe import FinetuneRecipe, load_recipe
    from pipeline.switch import user_at_host

    finetune_recipe = load_recipe(recipe, FinetuneRecipe)
    with opened_project() as project:
        done = write(project, finetune_recipe, project.resolve(to.resolve()), user_at_host())
        shown = project.relative(done.file)
    if as_json:
        click.echo(json.dumps({"file": shown, "written": list(done.written), "there": dict(done.there), "refused": dict(done.refused)}))
    else:
        click.echo(f"{len(done.written)} rows added to {shown}" + (f", {len(done.there)} were there" if done.there else ""))
    if done.refused:
        raise TuneserveError("\n".join([f"{len(done.refused)} refused:", *(f"{sample}: {why}" for sample, why in done.refused.items())]))


def _decided(samples: tuple[str, ...], state: Literal["approved", "rejected"], why: str = "") -> "list[Judged]":
    from pipeline import feedback as said
    from pipeline.switch import user_at_host

    with opened_project(uses_caches=False) as project:
        judged = said.judged_samples(project, samples)
        found = list({each.sample.id: each for each in (said.find(judged, sample) for sample in samples)}.values())
        said.decide(project, found, state, user_at_host(), why)
    return found


def _show(found: "list[Judged]", state: "State", as_json: bool) -> None:
    ids = [each.sample.id for each in found]
    click.echo(json.dumps({"samples": ids, "state": state}) if as_json else f"{state}: {', '.join(ids)}")
