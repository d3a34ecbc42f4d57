"""`tuneserve status`: the registry against each replica. cli.py says what all commands promise."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli_serving import adapter_of, chosen_replicas, fleet_options, must_reach_all
from pipeline.command import begin_journal, json_option
from pipeline.errors import RegistryError

if TYPE_CHECKING:
    from pipeline.fleet_status import FleetStatus, ReplicaReport
    from pipeline.project import Project
    from pipeline.recipe import ServingRecipe
    from pipeline.serving.wanted import Wanted

LAG_SECONDS = 1.5
"""A replica that is behind is looked at once more after this: it polls once a second, and so it may be for a moment after every change."""
QUESTIONS = 8
"""To MLflow at a time."""


@click.command(short_help="The registry against each replica.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@fleet_options
@json_option
def status(names: tuple[str, ...], recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Show what the registry wants and what each replica serves: wanted, live, verified, canary, switched off, refused, and the seconds since it read MLflow.

    Exits 1 if a ready replica lags or fails, none is ready though one should be, or the registry cannot be read. Changes nothing and starts nothing.
    """
    from pipeline.project import find_project

    for name in names:
        adapter_of(name, versioned=False)
    recipe, urls = chosen_replicas(recipe_path, replica_urls)
    project = find_project()
    project.use_environment()
    if project.state.is_dir():
        begin_journal(project)
    found = _observe(project, names, recipe, urls)
    if found.lags:
        time.sleep(LAG_SECONDS)
        found = _observe(project, names, recipe, urls)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        _print_status(found)
    sys.exit(0 if found.ok else 1)


def _observe(project: "Project", names: Sequence[str], recipe: "ServingRecipe | None", urls: Sequence[str]) -> "FleetStatus":
    from pipeline.fleet import addresses_of, open_fleet
    from pipeline.fleet_status import compare

    with open_fleet(project, addresses_of(project, recipe, urls)) as fleet:
        looks = fleet.looks()
        listed = fleet.listed
    asked: Sequence[str] = names or (recipe.follow if recipe else ())
    followed = set() if names else {name for seen in looks if seen.status for name in seen.status.models}
    follow_tag = recipe.follow_tag if recipe and not names else None
    tagged: list[str] = []
    registry: dict[str, Wanted | str] = {}
    error = None
    try:
        tagged, registry = asyncio.run(_read_registry(_mlflow(project), {*asked, *followed}, follow_tag))
    except RegistryError as failure:
        error = str(failure)
    required = {*asked, *tagged} if recipe or (listed and names) else set()
    shown = sorted({*asked, *tagged, *followed})
    return compare(shown, registry, error, looks, required=required, expected=recipe is not None, unreachable_fails=must_reach_all(recipe))


def _mlflow(project: "Project") -> str:
    """Where MLflow is, if it runs."""
    from pipeline import services

    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if running := services.find_service(project, services.MLFLOW):
        return running.url
    raise RegistryError("the embedded MLflow does not run, so nobody can follow it; start it: tuneserve up, or set MLFLOW_TRACKING_URI to yours")


async def _read_registry(uri: str, names: set[str], follow_tag: str | None) -> "tuple[list[str], dict[str, Wanted | str]]":
    """The models with that tag, and what is wanted of them and of `names`, or why that cannot be read: all as replicas read it.

    Raises RegistryError if MLflow tells nothing at all.
    """
    from pipeline.serving.registry_reader import RegistryReader

    reader, turns = RegistryReader(uri), asyncio.Semaphore(QUESTIONS)

    async def read(name: str) -> "Wanted | str":
        async with turns:
            try:
                return await reader.read(name)
            except RegistryError as error:
                return str(error)

    try:
        key, _, value = (follow_tag or "").partition("=")
        tagged = await reader.tagged(key, value) if follow_tag else []
        ordered = sorted({*names, *tagged})
        found = await asyncio.gather(*map(read, ordered))
    finally:
        await reader.aclose()
    if found and all(isinstance(each, str) for each in found):
        raise RegistryError(str(found[0]))
    return tagged, dict(zip(ordered, found, strict=True))


def _print_status(found: "FleetStatus") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    models = Table("model", "champion", "candidate", "switched off", title="registry", title_justify="left")
    for name, entry in found.as_dict()["registry"].items():
        champion, candidate, off = entry["champion"], entry["candidate"], entry["disabled"]
        shares = f"{candidate['version']} at {candidate['percent']:g} %" if candidate else "-"
        switched = [*(["the name"] if off and off["model"] else []), *((off or {}).get("versions", ()))]
        models.add_row(name, f"{champion['version']}  {(champion['digest'] or 'no digest')[:8]}" if champion else "-", shares, ", ".join(switched) or "-")
    if found.names:
        console.print(models)
    replicas = Table("replica", "state", "model", "live", "verified", "candidate", "off", "lag", "slots", "cache", title="replicas", title_justify="left")
    for replica in found.replicas:
        for row in _rows(replica):
            replicas.add_row(*row)
    if found.replicas:
        console.print(replicas)
    for problem in found.problems:
        console.print(f"{'problem' if problem.fails else 'note'}: {problem.text}", soft_wrap=True)
    if found.ok:
        console.print("every ready replica is as the registry says" if any(replica.look.state == "ready" for replica in found.replicas) else "nothing is wrong")


def _rows(replica: "ReplicaReport") -> list[list[str]]:
    """The table's rows for one replica: a row for each model; what is the replica's own stands in the first."""
    status = replica.look.status
    age = status.last_sync_age_seconds if status else None
    slots = status.slots if status else None
    places = (
        f"{slots.resident if slots.resident is not None else '?'}/{slots.max_cpu_loras or '?'}" + (f", {slots.waits} waits" if slots.waits else "")
        if slots
        else "-"
    )
    cache = f"{status.cache.bytes / 2**20:.0f} MiB" if status else "-"
    own = [f"{age:.1f} s" if age is not None else "-", places, cache]
    rows = []
    for name, report in replica.models.items():
        live, candidate, off = report.served.live, report.served.live_candidate, report.served.off
        switched = [*(["the name"] if off.model else []), *sorted(off.versions)]
        shown = (live.version if live else "none") + (" LAGS" if report.lagging else "")
        shares = f"{candidate.version} at {candidate.percent or 0:g} %" if candidate else "-"
        rows.append([name, shown, "yes" if report.verified else "no", shares, ", ".join(switched) or "-"])
    rows = rows or [["-"] * 5]
    return [[replica.look.url, replica.look.state, *row, *own] if index == 0 else ["", "", *row, "", "", ""] for index, row in enumerate(rows)]
