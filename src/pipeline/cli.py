"""The command `tuneserve`. Every command takes --json, exits 0 only when the thing asked for is true, 1 on a failure, 2 on wrong input.

Heavy packages (torch, vllm, mlflow, prefect, openai) are imported inside the commands that need them: help and `check` stay instant.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pipeline import cli_adapters, cli_bench, cli_evaluation, cli_feedback, cli_plan, cli_rebase, cli_retraining, cli_serving, cli_status
from pipeline.cli_plan import ignore_plan_option, refuse_what_cannot_fit
from pipeline.command import SERVING_RECIPE, begin_journal, flow_servers, json_option, opened_project, recipe_argument, using_caches
from pipeline.errors import Fault, InvalidInput, TuneserveError
from pipeline.journal import failure_fields

if TYPE_CHECKING:
    from pipeline.disk import Known
    from pipeline.project import Project
    from pipeline.registry import Version

FINETUNE_RECIPE = "recipes/finetune/catalog-tiny.yaml"
logger = logging.getLogger("pipeline.cli")  # not __name__, which may be __main__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tuneserve")
def cli() -> None:
    """Fine-tune GLM-4.5V with LoRA, register the adapter, and promote it into running vLLM servers without merging weights."""


ELSEWHERE = (
    cli_plan.plan,
    cli_status.status,
    cli_bench.bench,
    cli_feedback.feedback,
    cli_rebase.rebase,
    *cli_adapters.COMMANDS,
    *cli_evaluation.COMMANDS,
    *cli_retraining.COMMANDS,
    *cli_serving.COMMANDS,
)
for command in ELSEWHERE:
    cli.add_command(command)


@cli.command(short_help="Validate recipes and their data.")
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Also decode every image, count every row's tokens and look for pictures that are in both splits.")
@json_option
def check(recipes: tuple[Path, ...], deep: bool, as_json: bool) -> None:
    """Validate recipes and their data: no GPU, no network. `train` checks as --deep does."""
    from pipeline.preflight import check_recipe_and_rows
    from pipeline.project import find_project
    from pipeline.row_statistics import table

    project = find_project()
    faults: list[Fault] = []
    warnings: list[Fault] = []
    statistics: dict[str, Any] = {}
    with using_caches(project):
        for path in recipes:
            found, checked = check_recipe_and_rows(path, project, deep)
            faults += found
            if checked:
                faults += checked.faults
                warnings += checked.warnings
                statistics |= {str(path): checked.statistics} if checked.statistics else {}
    faults, warnings = list(dict.fromkeys(faults)), list(dict.fromkeys(warnings))  # recipes may share their rows
    if as_json:
        answer: dict[str, Any] = {"ok": not faults, "errors": [fault.as_dict() for fault in faults], "warnings": [each.as_dict() for each in warnings]}
        figures = {recipe: {name: split.as_dict() for name, split in splits.items()} for recipe, splits in statistics.items()}
        click.echo(json.dumps(answer | ({"statistics": figures} if deep else {})))
    else:
        for line in [*(f"warning: {warning}" for warning in warnings), *map(str, faults)]:
            click.echo(line, err=True)
        if not faults:
            for recipe, splits in statistics.items():
                click.echo(f"{recipe}\n{table(splits)}")
            click.echo(f"{len(recipes)} recipe{'s' if len(recipes) > 1 else ''} checked, no fault found")
    sys.exit(InvalidInput.exit_code if faults else 0)


@cli.command(short_help="Train an adapter and register it.")
@recipe_argument
@click.option("--force", is_flag=True, help="Train anew even if a version from the same inputs is registered, and from the start.")
@ignore_plan_option
@json_option
def train(recipe: Path, force: bool, ignore_plan: bool, as_json: bool) -> None:
    """Train the adapter of a finetune recipe and register it as a version; refused if it cannot fit the GPUs that are here (`tuneserve plan`).

    The same inputs (rows, base, settings, libraries) give the version that is there already; a training that was cut short goes on from its last checkpoint.
    """
    from pipeline.recipe import FinetuneRecipe, load_recipe

    finetune_recipe = load_recipe(recipe, FinetuneRecipe)  # a wrong recipe is refused before any server starts
    with opened_project() as project:
        version = _trained_already(project, recipe, look=not force)
        if trained := version is None:
            refuse_what_cannot_fit(recipe, finetune_recipe, project, ignore_plan)
            with flow_servers(project):
                from flows.finetune import finetune

                done = finetune(str(recipe), force)
            version, trained = done.version, done.trained
    if as_json:
        result = {"name": version.name, "version": int(version.version), "digest": version.digest, "mlflow_run_id": version.run_id, "trained": trained}
        click.echo(json.dumps(result))
        return
    if trained:
        click.echo(f"registered {version.label}, digest {version.digest[:12]}, run {version.run_id}")
    else:
        click.echo(f"{version.label} (digest {version.digest[:12]}) was trained from these inputs: nothing to do; --force trains anew")
    files = project.runs / version.run_id
    click.echo("look at it: tuneserve up" + (f"   (files: {project.relative(files)})" if files.is_dir() else ""))
    click.echo(f"serve it: tuneserve promote {version.label}")


def _trained_already(project: "Project", path: Path, look: bool) -> "Version | None":
    """The version of the recipe's inputs, read from the registry without starting a server; None if there is none, if it cannot be known so, or not to `look`.

    Refuses wrong rows before any server starts.
    """
    from pipeline import basemodel, lineage, services
    from pipeline.errors import RegistryError
    from pipeline.preflight import checked_rows
    from pipeline.progress import progress
    from pipeline.recipe import FinetuneRecipe, load_recipe

    recipe = load_recipe(path, FinetuneRecipe)
    rows = checked_rows(path, recipe, project)
    if not look:
        return None
    with progress("base model") as report:
        base = basemodel.resolve_base_model(recipe.base_model, project, report)
    digest = lineage.inputs_of(recipe, base, rows).digest
    with services.registry_at_rest(project) as uri:
        if uri is None:
            return None
        from pipeline.registry import Registry

        try:
            return Registry(uri).trained(recipe.name, digest)
        except RegistryError as error:  # the flow asks again, through a server
            logger.info("registry not read", extra=failure_fields(error))
            return None


@cli.command(short_help="Run a vLLM server that follows the registry.")
@recipe_argument
@ignore_plan_option
@json_option
def serve(recipe: Path, ignore_plan: bool, as_json: bool) -> None:
    """Run a vLLM server that follows the registry, in the foreground until Ctrl-C; refused if it cannot fit the GPUs that are here (`tuneserve plan`)."""
    from pipeline import services
    from pipeline.basemodel import resolve_base_model
    from pipeline.errors import ServingError
    from pipeline.progress import progress
    from pipeline.recipe import ServingRecipe, load_recipe
    from pipeline.serving.launch import SERVICE_PREFIX, replica

    serving = load_recipe(recipe, ServingRecipe)
    with opened_project() as project, contextlib.ExitStack() as stack:
        if running := services.find_service(project, SERVICE_PREFIX + serving.name):
            raise ServingError(f"{serving.name} already runs at {running.url} (log {running.log}); end it with Ctrl-C where it runs, or `tuneserve down`")
        refuse_what_cannot_fit(recipe, serving, project, ignore_plan)
        with progress("base model") as report:
            base = resolve_base_model(serving.base_model, project, report)
        mlflow_uri = stack.enter_context(services.tracking(project))
        with progress(f"vLLM {serving.name}") as report:
            up = stack.enter_context(replica(project, serving, base, mlflow_uri, lambda: report("starting", 0.0)))
        followed = ", ".join([*serving.follow, *([f"every model tagged {serving.follow_tag}"] if serving.follow_tag else [])])
        if as_json:
            click.echo(json.dumps({"url": up.url, "mlflow": mlflow_uri, "log": up.log}))
        else:
            click.echo(f"serving {serving.served_name} at {up.url}/v1, following {followed} in {mlflow_uri}; log {up.log}; Ctrl-C ends it")
        while up.alive():
            time.sleep(0.5)
        raise ServingError(f"vLLM {serving.name} ended; its log is {up.log}")


@cli.command(short_help="Start MLflow and Prefect and leave them up.")
@json_option
def up(as_json: bool) -> None:
    """Start the embedded MLflow and Prefect servers and leave them up."""
    from pipeline import services
    from pipeline.progress import progress

    with opened_project() as project, progress("MLflow and Prefect"), services.mlflow_server(project) as mlflow, services.prefect_server(project) as prefect:
        for server in (mlflow, prefect):
            services.keep(server)
    if as_json:
        click.echo(json.dumps({server.name: server.url for server in (mlflow, prefect)}))
    else:
        click.echo(f"MLflow {mlflow.url}   Prefect {prefect.url}   (end them: tuneserve down)")


@cli.command()
@json_option
def down(as_json: bool) -> None:
    """End every server that was left up in this project."""
    from pipeline import services
    from pipeline.project import find_project

    project = find_project()
    if project.state.is_dir():
        begin_journal(project)
    found = sorted(services.find_services(project), key=lambda server: server.name, reverse=True)  # vLLM before the registry it follows
    ended = [server.name for server in found if services.release(server)]
    used = [server.name for server in found if server.name not in ended]
    if as_json:
        click.echo(json.dumps({"ended": ended, "in_use": used}))
    else:
        click.echo(f"ended: {', '.join(ended) or 'nothing was running'}")
    if used:
        raise TuneserveError(f"still used by another tuneserve command: {', '.join(used)}; end that command first (Ctrl-C where it runs)")


@cli.command(short_help="The whole main job on a tiny GLM-4.5V.")
@click.option("--keep", is_flag=True, help="Leave the servers up at the end; `tuneserve down` ends them.")
@click.option("--no-promote", is_flag=True, help="Leave the alias as it is: the new version is not served, and the command fails. Shows what promotion is for.")
@json_option
def quickstart(keep: bool, no_promote: bool, as_json: bool) -> None:
    """The whole main job on a tiny GLM-4.5V: train, register, serve, promote, ask. Minutes on two CPU cores."""
    from pipeline.project import find_project
    from pipeline.recipe import FinetuneRecipe, ServingRecipe, load_recipe

    root = find_project().root  # where there are no recipes, nothing is made or started
    load_recipe(root / FINETUNE_RECIPE, FinetuneRecipe)
    load_recipe(root / SERVING_RECIPE, ServingRecipe)
    began = time.monotonic()
    with opened_project() as project, flow_servers(project) as (mlflow_uri, prefect_url):
        seconds = {"servers": time.monotonic() - began}
        from flows import quickstart as job

        result = job.quickstart(project, Path(FINETUNE_RECIPE), Path(SERVING_RECIPE), seconds, move_alias=not no_promote, keep=keep)
        urls = {"mlflow": mlflow_uri, "prefect": prefect_url.removesuffix("/api"), "openai": result.openai_url}
        summary = job.summary(result, urls, keep)
    click.echo(json.dumps(result.as_dict() | {"urls": urls}) if as_json else summary)
    if result.failure:
        raise TuneserveError(result.failure)


@cli.command(short_help="Show what fills the disk; --delete frees it.")
@click.option("--delete", is_flag=True, help="Remove what is listed as removable.")
@click.option(
    "--older-than",
    "older_than_days",
    type=click.IntRange(min=0),
    default=7,
    show_default=True,
    metavar="DAYS",
    help="Age at which an unfinished training, and what a run without a version left in the registry's files, may go.",
)
@click.option(
    "--unregistered", is_flag=True, help="Let trainings of that age go too whose adapter is there and was never registered; only if the registry has the run."
)
@json_option
def gc(delete: bool, older_than_days: int, unregistered: bool, as_json: bool) -> None:
    """List what fills this project's disk and what of it may go, and why; with --delete, remove that.

    Nothing goes that runs, that a tuneserve command may be using, or that cannot be made again. An adapter never goes because a registry does not know it.
    """
    from pipeline import disk
    from pipeline.project import find_project

    here = find_project()
    if not (here.state.is_dir() or here.mlruns.is_dir()):
        raise TuneserveError(f"{here.root}: nothing of tuneserve lies here; run this in your project's folder")
    with opened_project(uses_caches=False) as project:
        known, unknown = _ask_registry(project)
        ours = "MLFLOW_TRACKING_URI" not in os.environ
        limits = disk.Limits(older_than_days, unregistered)
        entries = disk.survey(project, known, unknown=unknown, artifacts_ours=ours, limits=limits)
        removal = disk.remove(project, entries) if delete else None
    if as_json:
        removed = {"removed": [project.relative(path) for path in removal.removed], "freed_bytes": removal.freed_bytes} if removal else {}
        removable_bytes = sum(entry.size_bytes for entry in entries if entry.removable)
        click.echo(json.dumps({"entries": [entry.as_dict(project) for entry in entries], "removable_bytes": removable_bytes, **removed}))
    else:
        click.echo(disk.summary(project, entries, removal))
    if removal and removal.left:
        left = "; ".join(f"{project.relative(path)}: {reason}" for path, reason in removal.left.items())
        raise TuneserveError(f"not removed: {left}")


def _ask_registry(project: "Project") -> "tuple[Known | None, str]":
    """What the registry knows of what lies here; None, and why, if it need not or cannot be asked: a full disk may keep it from starting."""
    from pipeline import disk, services
    from pipeline.progress import progress

    if not disk.concerns_registry(project):
        return None, ""
    if "MLFLOW_TRACKING_URI" not in os.environ and not (project.mlruns / services.DATABASE).is_file():
        return None, f"the registry that could say what it is is missing (mlruns/{services.DATABASE})"
    run_ids = disk.run_ids(project)
    try:
        with progress("MLflow"), services.tracking(project) as uri:
            from pipeline.registry import Registry

            return disk.know(Registry(uri), run_ids), ""
    except (TuneserveError, OSError) as error:
        return None, f"the registry cannot be asked ({str(error).partition(chr(10))[0]})"


def main() -> NoReturn:
    """Runs a command; turns every expected failure into one message and its exit code."""
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    logging.getLogger("pipeline").addHandler(logging.NullHandler())  # until the journal is open; else logging itself prints warnings
    began, code = time.monotonic(), 1
    try:
        code = _run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    except BaseException as error:
        logger.error("command failed", extra=failure_fields(error))
        raise
    finally:
        logger.info("command ended", extra={"exit_code": code, "seconds": round(time.monotonic() - began, 3)})
    sys.exit(code)


def _run() -> int:
    try:
        code = cli(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TuneserveError as error:
        return _fail(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(TuneserveError(f"{where}{error.strerror or error}; check the disk's space and the folder's permissions"))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: everything that was started has been ended", err=True)
        return 130


def _exit_on_sigterm(*_: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _fail(error: TuneserveError) -> int:
    logger.error("command failed", extra=failure_fields(error))
    if "--json" in sys.argv:
        faults = error.faults if isinstance(error, InvalidInput) else (Fault("", "", str(error)),)
        click.echo(json.dumps({"ok": False, "errors": [fault.as_dict() for fault in faults]}))
    click.echo(f"tuneserve: {error}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
