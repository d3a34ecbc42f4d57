"""The commands about retraining: retrain, approve, reject, schedule. cli.py holds the others, and what they promise."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli_serving import adapter_of, chosen_replicas, evaluate_on_option, evaluation_replica, fleet_options, must_reach_all, seconds_of, show_promotion
from pipeline.command import flow_servers, json_option, opened_project, recipe_argument
from pipeline.errors import Fault, InvalidInput, ServingError
from pipeline.schedule import FORGETS_LEASES, POOL, TRAINING_SECONDS, Overlap, Schedule, checked_timing, no_server

if TYPE_CHECKING:
    from pipeline.project import Project
    from pipeline.schedule import Scheduled

FLOW = "retrain"
"""The flow's name, without importing it, which takes MLflow along."""

watch_option = click.option(
    "--watch",
    "watch",
    metavar="TIME",
    help="Watch what was promoted for so long (90s, 10m, 1h), and take it out again if it breaks the rules, as `tuneserve promote` does.",
)


@click.command(short_help="Train and promote if something has changed.")
@recipe_argument
@click.option("--force", is_flag=True, help="Train anew, and from the start, even if nothing has changed. The gate stays as it is.")
@watch_option
@evaluate_on_option
@fleet_options
@json_option
def retrain(
    recipe: Path, force: bool, watch: str | None, evaluate_on: str | None, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool
) -> None:
    """Train RECIPE if its rows, base, prompt template or settings changed since its model's newest version, and promote that if it is better.

    Nothing to do is a success that says why; so is a version that is kept out. What was trained, compared or promoted already is not done again: run it
    again after a crash, and it goes on from the last finished stage. `tuneserve schedule` has it run by itself.

    With `promotion.approval: manual` in the recipe a better version asks for approval instead; this also acts on the answers: `tuneserve approve`, `tuneserve
    reject`, or the version's tag `tuneserve.approval` in MLflow. With `drift` in the recipe it asks the champion what people approved since its promotion
    (`tuneserve feedback`), and says whether it got worse. Replicas: as `tuneserve promote`.
    """
    from pipeline.recipe import FinetuneRecipe, load_recipe

    load_recipe(recipe, FinetuneRecipe)  # wrong input is refused before any server starts
    watch_seconds = seconds_of(watch) if watch is not None else None
    serving, urls = chosen_replicas(recipe_path, replica_urls)
    asked = evaluation_replica(serving, evaluate_on)
    with opened_project() as project, flow_servers(project):
        from flows.retrain import retrain as flow

        shown = project.relative(recipe.resolve())
        done = flow(
            shown,
            force=force,
            serving=project.relative(recipe_path.resolve()) if recipe_path else None,
            replicas=urls or None,
            evaluate_on=asked,
            watch_seconds=watch_seconds,
        )
        interrupted = bool(done.outcome and done.outcome.watched and done.outcome.watched[-1].ended == "interrupted")
    if interrupted:
        raise KeyboardInterrupt
    click.echo(json.dumps({"recipe": shown, **done.as_dict()}) if as_json else "\n".join(done.lines()))


@click.command(short_help="Say yes to a version that asks to be promoted.")
@click.argument("adapter", metavar="NAME/VERSION")
@watch_option
@fleet_options
@json_option
def approve(adapter: str, watch: str | None, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Approve a version that `tuneserve retrain` found better and that waits for it (`promotion.approval: manual`), and promote it now.

    It is not compared again; if another version became champion meanwhile, this says so and changes nothing. Who approved it stands in `tuneserve history NAME`.
    """
    name, version = _asking(adapter)
    watch_seconds = seconds_of(watch) if watch is not None else None
    serving, urls = chosen_replicas(recipe_path, replica_urls)
    with opened_project() as project, flow_servers(project) as (mlflow_uri, _):
        from flows.approve import approve as flow
        from pipeline import approval
        from pipeline.fleet import addresses_of
        from pipeline.registry import Registry
        from pipeline.switch import user_at_host

        registered = Registry(mlflow_uri)
        given = approval.approve(registered, registered.version(name, version), user_at_host())
        done = flow(
            name,
            version,
            given.request,
            given.answered_by,
            f"{given.request.reasons}; approved by {given.answered_by}",
            addresses_of(project, serving, urls),
            watch_seconds=watch_seconds,
            unreachable_fails=must_reach_all(serving),
        )
    if (last := done.watched[-1] if done.watched else None) and last.ended in ("breach", "moved"):
        raise ServingError(last.text)
    if last and last.ended == "interrupted":
        raise KeyboardInterrupt
    if done.promotion:
        show_promotion(done.promotion, mlflow_uri, True, as_json, watched=done.watched)


@click.command(short_help="Say no to a version that asks to be promoted.")
@click.argument("adapter", metavar="NAME/VERSION")
@click.option("--why", required=True, metavar="TEXT", help="Why; it is recorded with who and when.")
@json_option
def reject(adapter: str, why: str, as_json: bool) -> None:
    """Reject a version that `tuneserve retrain` found better and that waits for approval: the champion stays, and `tuneserve history NAME` says why."""
    from pipeline import services
    from pipeline.approval import checked_why
    from pipeline.progress import progress

    name, version = _asking(adapter)
    why = checked_why(why)
    with opened_project(uses_caches=False) as project, contextlib.ExitStack() as stack:
        with progress("MLflow"):
            uri = stack.enter_context(services.tracking(project))
        from pipeline import approval
        from pipeline.lineage import code_lineage
        from pipeline.lock import model_lock
        from pipeline.registry import Registry
        from pipeline.switch import user_at_host

        registered = Registry(uri)
        chosen = registered.version(name, version)
        given = approval.reject(registered, chosen, user_at_host(), why)
        grounds = given.request.grounds(given.answered_by, f"rejected: {why}", code_lineage(project.root)["git_commit"])
        approval.close(registered, chosen, model_lock(project, "promote", name), "rejected", grounds)
    said = {"name": name, "version": int(version), "rejected_by": given.answered_by, "why": why}
    click.echo(json.dumps(said) if as_json else f"{name}/{version} is rejected: {why}")


@click.command(short_help="Have a recipe retrained by itself.")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--cron", metavar="EXPR", help='When: minute hour day month weekday; "0 3 * * 1" is Mondays at 3:00.')
@click.option("--interval", "interval_seconds", type=click.IntRange(min=1), metavar="SECONDS", help="Or every so many seconds.")
@click.option("--timezone", metavar="ZONE", help="Whose clock --cron is by, for example Europe/Berlin; default: UTC.")
@click.option(
    "--overlap",
    type=click.Choice(["cancel-new", "enqueue"]),
    help="What becomes of a run that is due while one runs: it is cancelled (default), or waits; of several that wait, the first stands for all.",
)
@click.option("--timeout", metavar="TIME", help="End a training that takes longer (default 72h); the next run goes on from its last checkpoint.")
@click.option("--name", "name", metavar="NAME", help="What the schedule is called; default: the recipe's file name.")
@click.option("--pool", metavar="NAME", help=f"The Prefect work pool, of type process, that the worker polls; made if there is none. Default: {POOL}.")
@click.option("--list", "action", flag_value="list", help="Show every schedule: when, the next run, the last one, and whether a worker is there.")
@click.option("--pause", "action", flag_value="pause", help="No run of RECIPE's schedule starts until --resume.")
@click.option("--resume", "action", flag_value="resume", help="Take --pause back. What was missed is not made up for.")
@click.option("--remove", "action", flag_value="remove", help="Take RECIPE's schedule away. One that runs goes on.")
@watch_option
@evaluate_on_option
@fleet_options
@json_option
@click.pass_context
def schedule(
    context: click.Context,
    recipe: Path | None,
    cron: str | None,
    interval_seconds: int | None,
    timezone: str | None,
    overlap: Overlap | None,
    timeout: str | None,
    name: str | None,
    pool: str | None,
    action: str | None,
    watch: str | None,
    evaluate_on: str | None,
    recipe_path: Path | None,
    replica_urls: tuple[str, ...],
    as_json: bool,
) -> None:
    """Have `tuneserve retrain RECIPE` run by itself, as a deployment on your Prefect server ($PREFECT_API_URL). The same recipe again changes its schedule.

    A worker on the training host runs it: `prefect worker start --pool tuneserve`, in an environment with PREFECT_API_URL and whatever else the commands here
    need (MLFLOW_TRACKING_URI if you have your own). One run of a schedule at a time, and one training of this project at a time; after downtime one run stands for
    all that were missed. The recipe and its rows are checked first.
    """
    from pipeline.project import find_project

    project = find_project()
    if action:
        allowed = {"action", "recipe", "name", "as_json"} - ({"recipe", "name"} if action == "list" else set())
        if other := _first_given(context, allowed):
            raise InvalidInput([Fault(f"--{action}", "", f"goes without {other}; leave one of the two out")])
        if action != "list" and not (recipe or name):
            raise InvalidInput([Fault(f"--{action}", "", f"names no schedule; give its recipe, or --name NAME (tuneserve schedule --list): --{action} RECIPE")])
        _require_server(project)
        _manage(project, action, name or (recipe.stem if recipe else ""), as_json)
        return
    if recipe is None:
        raise InvalidInput([Fault("RECIPE", "", 'is missing; give a finetune recipe and when: tuneserve schedule RECIPE --cron "0 3 * * 1" (or --list)')])
    zone = checked_timing(cron, interval_seconds, timezone)
    training_seconds = seconds_of(timeout) if timeout else TRAINING_SECONDS
    watch_seconds = seconds_of(watch) if watch else None
    _, urls = chosen_replicas(recipe_path, replica_urls)
    asked = evaluation_replica(None, evaluate_on)  # each run reads the serving recipe anew
    _require_server(project)
    with opened_project() as opened:
        _check(recipe, opened)
        shown = opened.relative(recipe.resolve())
        parameters: dict[str, Any] = {"recipe_path": shown, "training_seconds": training_seconds}
        parameters |= {"serving": opened.relative(recipe_path.resolve())} if recipe_path else {}
        parameters |= {"replicas": urls} if urls else {}
        parameters |= {"evaluate_on": asked} if asked else {}
        parameters |= {"watch_seconds": watch_seconds} if watch_seconds else {}
        wanted = Schedule(name or recipe.stem, shown, parameters, cron, interval_seconds, zone, overlap or "cancel-new", pool or POOL)
        from flows.retrain import retrain as flow
        from flows.schedule import deploy, forgets_leases

        made = deploy(wanted, flow, opened)
        if forgets_leases():
            click.echo(f"warning: {FORGETS_LEASES}", err=True)
    if as_json:
        click.echo(json.dumps({**made.__dict__, "worker": _worker_command(made.pool)}))
        return
    click.echo(made.line())
    if not made.workers:
        click.echo(f"no worker polls {made.pool} yet; on the training host: {_worker_command(made.pool)}")


COMMANDS = (retrain, approve, reject, schedule)


def _asking(adapter: str) -> tuple[str, str]:
    name, version = adapter_of(adapter)
    if version is None:
        raise InvalidInput([Fault(adapter, "", "give NAME/VERSION, for example catalog/3; tuneserve history NAME says who asks")])
    return name, version


def _first_given(context: click.Context, allowed: set[str]) -> str | None:
    """The first option of the command line that is none of these."""
    given = (parameter for parameter in context.command.params if parameter.name and parameter.name not in allowed)
    return next((p.opts[0] for p in given if context.get_parameter_source(str(p.name)) == click.core.ParameterSource.COMMANDLINE), None)


def _require_server(project: "Project") -> None:
    if not os.environ.get("PREFECT_API_URL"):
        from pipeline import services

        running = services.find_service(project, services.PREFECT)
        raise no_server(running.url if running else None)


def _check(recipe: Path, project: "Project") -> None:
    """As `tuneserve check`: a recipe that cannot be trained is not scheduled."""
    from pipeline.preflight import check_recipe_and_rows
    from pipeline.recipe import FinetuneRecipe, load_recipe

    load_recipe(recipe, FinetuneRecipe)
    faults, checked = check_recipe_and_rows(recipe, project, deep=False)
    if faults := [*faults, *(checked.faults if checked else ())]:
        raise InvalidInput(list(dict.fromkeys(faults)))


def _manage(project: "Project", action: str, name: str, as_json: bool) -> None:
    project.use_environment()
    from flows import schedule as deployments

    if action == "list":
        _show(deployments.scheduled(), as_json)
        return
    if action == "remove":
        deployments.remove(FLOW, name)
        click.echo(json.dumps({"name": name, "removed": True}) if as_json else f"{name} is scheduled no more")
        return
    change: Callable[[str, str], Scheduled] = deployments.pause if action == "pause" else deployments.resume
    found = change(FLOW, name)
    click.echo(json.dumps(found.__dict__) if as_json else found.line())


def _show(found: "list[Scheduled]", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"schedules": [each.__dict__ for each in found]}))
        return
    click.echo("\n".join(each.line() for each in found) or 'nothing is scheduled; tuneserve schedule RECIPE --cron "0 3 * * 1"')


def _worker_command(pool: str) -> str:
    return f"prefect worker start --pool {pool}"
