"""The commands that change what is served: promote, canary, rollback, disable, enable. cli_status.py shows it; cli.py holds the others, and what they promise."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.command import flow_servers, json_option, opened_project
from pipeline.errors import Fault, InvalidInput, ServingError

if TYPE_CHECKING:
    from pipeline.assessment import Assessment
    from pipeline.convergence import Reach
    from pipeline.fleet import Fleet
    from pipeline.lock import Lock
    from pipeline.promotion import Promotion
    from pipeline.recipe import ServingRecipe
    from pipeline.registry import Registry
    from pipeline.watch import Watched

SHOWN = "it is so on"


finetune_option = click.option(
    "--recipe",
    "finetune_path",
    type=click.Path(path_type=Path),
    help="Whose held-out rows and `promotion:` rules count; default: the recipe that it was trained by.",
)


evaluate_on_option = click.option(
    "--evaluate-on",
    metavar="URL",
    help="The replica that is asked the held-out questions; default: the serving recipe's `evaluation_replica:`, else the first that follows NAME.",
)


def fleet_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which replicas a command is about."""
    serving = click.option(
        "--serving",
        "recipe_path",
        type=click.Path(path_type=Path),
        metavar="RECIPE",
        help="A serving recipe: its `replicas:`, else its server in this project.",
    )
    replica = click.option(
        "--replica", "replica_urls", multiple=True, metavar="URL", help="A replica (http://HOST:PORT or dns://HOST:PORT); may be given several times."
    )
    return serving(replica(command))


@click.command(short_help="Make a version champion, or a canary.")
@click.argument("adapter", metavar="NAME[/VERSION]")
@click.option(
    "--canary",
    metavar="PERCENT[,PERCENT]...",
    help="Give the version this share of the name's requests instead, beside the champion; 10% for example. Several (5%,25%,50%): one after the other, with --watch.",
)
@click.option(
    "--watch",
    "watch",
    metavar="TIME",
    help="Watch its failures and speed for so long (90s, 10m, 1h) under its users' requests, or at each canary step, and take it out again if they break the rules.",
)
@click.option("--wait/--no-wait", default=True, help="Wait until every ready replica serves it (default), or only move the alias.")
@click.option("--force", is_flag=True, help="Do not compare it with the champion; recorded as such. Replicas still refuse what they cannot serve.")
@finetune_option
@evaluate_on_option
@fleet_options
@json_option
def promote(
    adapter: str,
    canary: str | None,
    watch: str | None,
    wait: bool,
    force: bool,
    finetune_path: Path | None,
    evaluate_on: str | None,
    recipe_path: Path | None,
    replica_urls: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a version (default: the newest) the champion if it is better, and return once every ready replica serves it; if one refuses, the alias goes back.

    Better is what its recipe's `promotion:` rules say of its answers to the held-out questions, against the champion's (as `tuneserve evaluate`). If it is not,
    nothing changes and this exits 1. A canary is not compared: its users do that. `tuneserve history NAME` tells what became of each version.

    Replicas: --replica, else --serving, else every running server of this project that follows NAME. Those that cannot be reached are reported: they look at
    the registry before they are ready. A promotion ends the model's canary.

    With --watch it then compares failures and times with the champion's, by the replicas' own counters and the recipe's `promotion.watch` rules. A breach makes the
    champion before it champion again, or ends the canary, and exits 1. Time in which too few requests came does not count; it ends after three times TIME in any case.
    """
    name, version = adapter_of(adapter)
    percents = _percents(canary) if canary is not None else None
    watch_seconds = seconds_of(watch) if watch is not None else None
    if percents and not wait:
        raise InvalidInput([Fault("--no-wait", "", "a canary is always waited for; leave --no-wait or --canary out")])
    if evaluate_on and (force or percents):
        raise InvalidInput([Fault("--evaluate-on", "", "nothing is evaluated with --force or --canary; leave --evaluate-on or that out")])
    if watch_seconds and not wait:
        raise InvalidInput([Fault("--no-wait", "", "what is watched must be live first; leave --no-wait or --watch out")])
    if percents and len(percents) > 1 and not watch_seconds:
        raise InvalidInput([Fault("--canary", "", f"{canary} are steps, and each is watched before the next; say for how long: --watch 10m")])
    recipe, urls = chosen_replicas(recipe_path, replica_urls)
    asked = evaluation_replica(recipe, evaluate_on)
    with opened_project() as project, flow_servers(project) as (mlflow_uri, _):
        from flows.promote import promote as flow
        from pipeline.fleet import addresses_of

        addresses, fails = addresses_of(project, recipe, urls), must_reach_all(recipe)
        rows = str(finetune_path) if finetune_path else None
        done = flow(
            name,
            version,
            addresses,
            canary_percents=percents,
            watch_seconds=watch_seconds,
            unreachable_fails=fails,
            wait=wait,
            force=force,
            recipe_path=rows,
            evaluate_on=asked,
        )
    if done.assessment and not as_json:
        click.echo("\n".join(done.assessment.lines()))
    if done.promotion is None:
        raise ServingError(done.kept_out)
    if (last := done.watched[-1] if done.watched else None) and last.ended == "interrupted":
        click.echo(last.text, err=True)
        raise KeyboardInterrupt
    if last and (last.ended in ("breach", "moved") or len(done.watched) < len(percents or [])):
        raise ServingError(last.text)
    show_promotion(done.promotion, mlflow_uri, wait, as_json, done.assessment, done.watched)


@click.command(short_help="Make the champion before this one champion again.")
@click.argument("name")
@click.option("--to", "to", metavar="VERSION", help="The version to go back to; default: the champion before the one of now.")
@click.option("--wait/--no-wait", default=True, help="Wait until every ready replica serves it (default), or only move the alias.")
@fleet_options
@json_option
def rollback(name: str, to: str | None, wait: bool, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Make the champion before the one of now champion again; as `promote`. Called twice it goes further back. Works while NAME is switched off, too."""
    adapter_of(name, versioned=False)
    name, version = adapter_of(f"{name}/{to}" if to is not None else name)
    recipe, urls = chosen_replicas(recipe_path, replica_urls)
    with opened_project() as project, flow_servers(project) as (mlflow_uri, _):
        from flows.promote import rollback as flow
        from pipeline.fleet import addresses_of

        done = flow(name, version, addresses_of(project, recipe, urls), unreachable_fails=must_reach_all(recipe), wait=wait)
    show_promotion(done, mlflow_uri, wait, as_json)


@click.command(short_help="Change a canary's share, or end it.")
@click.argument("name")
@click.argument("share", metavar="PERCENT|end")
@fleet_options
@json_option
def canary(name: str, share: str, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Change the share of requests that NAME's canary gets (25% for example), or end it; returns once every ready replica does so.

    Start one: tuneserve promote NAME/VERSION --canary 10%.
    """
    name, _ = adapter_of(name, versioned=False)
    percent = None if share == "end" else _percent(share)

    def change(registry: "Registry", fleet: "Fleet", lock: "Lock") -> None:
        from pipeline import promotion

        if percent is not None:
            show_promotion(promotion.set_canary(registry, name, percent, fleet, lock), registry.uri, True, as_json)
            return
        ended = promotion.end_canary(registry, name, fleet, lock)
        label = f"{name}/{ended.candidate}" if ended.candidate else None
        text = f"the canary {label} is ended" if label else f"{name}: no canary runs"
        _show({"name": name, "ended_canary": label, **_reach(ended.reach)}, [text, *(_reach_lines(ended.reach, SHOWN) if label else [])], as_json)

    _change(name, recipe_path, replica_urls, change)


@click.command(short_help="Switch a name or a version off, now.")
@click.argument("adapter", metavar="NAME|NAME/VERSION")
@click.option("--reason", required=True, metavar="TEXT", help="Why; it is recorded with who and when, and shown to whoever finds it off.")
@fleet_options
@json_option
def disable(adapter: str, reason: str, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Switch a served name, or one version of it, off on every replica, until `enable`.

    Its requests then get a clear error, or another answer if the serving recipe says so (`disabled_answers`). Returns once every ready replica shows it.
    It is recorded in the registry even if this fails because a replica does not.
    """
    from pipeline.switch import switched_off_now

    name, version = adapter_of(adapter)
    switched_off_now(reason)  # a wrong reason is said before any server starts

    def change(registry: "Registry", fleet: "Fleet", lock: "Lock") -> None:
        from pipeline import promotion

        done = promotion.disable(registry, name, version, reason, fleet)
        said = {"name": name, "version": int(version) if version else None, "disabled": done.record.__dict__, "changed": done.changed, **_reach(done.reach)}
        _show(said, [f"{done.label} is switched off: {done.record}; take it back: tuneserve enable {done.label}", *_reach_lines(done.reach, SHOWN)], as_json)

    _change(name, recipe_path, replica_urls, change)


@click.command(short_help="Take `disable` back.")
@click.argument("adapter", metavar="NAME|NAME/VERSION")
@fleet_options
@json_option
def enable(adapter: str, recipe_path: Path | None, replica_urls: tuple[str, ...], as_json: bool) -> None:
    """Switch a name, or a version, on that was switched off; returns once every ready replica shows it."""
    name, version = adapter_of(adapter)

    def change(registry: "Registry", fleet: "Fleet", lock: "Lock") -> None:
        from pipeline import promotion

        done = promotion.enable(registry, name, version, fleet)
        said = {"name": name, "version": int(version) if version else None, "disabled": None, "changed": done.changed, **_reach(done.reach)}
        _show(said, [f"{done.label} is switched on" if done.changed else f"{done.label} was not switched off", *_reach_lines(done.reach, SHOWN)], as_json)

    _change(name, recipe_path, replica_urls, change)


COMMANDS = (promote, canary, rollback, disable, enable)


def adapter_of(text: str, *, versioned: bool = True) -> tuple[str, str | None]:
    """NAME and VERSION of `NAME[/VERSION]`."""
    name, slash, version = text.partition("/")
    if not name or (slash and not (versioned and version.isascii() and version.isdecimal())):
        raise InvalidInput([Fault(text, "", "give NAME or NAME/VERSION, for example catalog/3" if versioned else "give a NAME, for example catalog")])
    return name, version or None


def _percent(text: str) -> float:
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:  # also for NaN
        raise InvalidInput([Fault(text, "", "a share of requests is 0% to 100%, for example 10% or 2.5%")])
    return percent


def _percents(text: str) -> list[float]:
    """The shares of `10%` or `5%,25%,50%`, each larger than the one before."""
    percents = [_percent(part) for part in text.split(",")]
    if any(after <= before for before, after in itertools.pairwise(percents)):
        raise InvalidInput([Fault(text, "", "a canary's steps are shares that grow, for example 5%,25%,50%")])
    return percents


def seconds_of(text: str) -> float:
    """The duration `90s`, `10m` or `1h`, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not seconds:
        raise InvalidInput([Fault(text, "", "is no duration; give one in seconds, minutes or hours, for example 90s, 10m or 1h")])
    return seconds


def chosen_replicas(recipe_path: Path | None, urls: Sequence[str]) -> "tuple[ServingRecipe | None, list[str]]":
    """The recipe and the addresses that a command was given, checked."""
    from pipeline.recipe import ServingRecipe, load_recipe

    checked = _checked(urls)
    return load_recipe(recipe_path, ServingRecipe) if recipe_path else None, checked


def evaluation_replica(recipe: "ServingRecipe | None", url: str | None) -> str | None:
    """The address of the replica that is asked the held-out questions, checked: `url`, else the recipe's; None: any of those chosen."""
    return _checked([url])[0] if url else recipe.evaluation_replica if recipe else None


def _checked(urls: Sequence[str]) -> list[str]:
    from pydantic import TypeAdapter, ValidationError

    from pipeline.recipe import ReplicaAddress

    checked = [url.rstrip("/") for url in urls]
    try:
        TypeAdapter(list[ReplicaAddress]).validate_python(checked)
    except ValidationError as error:
        wrong = [str(found["input"]) for found in error.errors()]
        raise InvalidInput(
            [Fault(url, "", "is no replica's address; give http://HOST:PORT, or dns://HOST:PORT for every address of a name") for url in wrong]
        ) from None
    return checked


def must_reach_all(recipe: "ServingRecipe | None") -> bool:
    """Whether a replica that cannot be reached fails a change."""
    return recipe is not None and recipe.unreachable_replicas == "fail"


def _change(name: str, recipe_path: Path | None, urls: Sequence[str], change: "Callable[[Registry, Fleet, Lock], None]") -> None:
    """Runs `change` with the registry, the replicas and the file that holds back other changes; needs no Prefect."""
    recipe, checked = chosen_replicas(recipe_path, urls)
    from pipeline import services
    from pipeline.progress import progress

    with opened_project(uses_caches=False) as project, contextlib.ExitStack() as stack:
        with progress("MLflow"):
            uri = stack.enter_context(services.tracking(project))
        from pipeline.fleet import addresses_of, open_fleet
        from pipeline.lock import model_lock
        from pipeline.registry import Registry

        fleet = stack.enter_context(open_fleet(project, addresses_of(project, recipe, checked), unreachable_fails=must_reach_all(recipe)))
        change(Registry(uri), fleet, model_lock(project, "promote", name))


def _show(said: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    click.echo(json.dumps(said) if as_json else "\n".join(lines))


def show_promotion(
    done: "Promotion", mlflow_uri: str, waited: bool, as_json: bool, assessment: "Assessment | None" = None, watched: "Sequence[Watched]" = ()
) -> None:
    version, previous = done.version, f"{done.version.name}/{done.previous}" if done.previous else None
    ended = f"{version.name}/{done.ended_canary}" if done.ended_canary else None
    said = {"name": version.name, "version": int(version.version), "previous": previous, "alias_set_at": done.alias_set_at, "ended_canary": ended}
    said |= {"canary_percent": done.percent} if done.percent is not None else {}
    said |= {"assessment": assessment.as_dict()} if assessment else {}
    said |= {"watched": [each.as_dict() for each in watched]} if watched else {}
    what = "champion" if done.percent is None else f"the canary at {done.percent:g}%"
    lines = [f"{version.label} is {what} in {mlflow_uri} (before: {previous or 'none'})", *([f"the canary {ended} is ended"] if ended else [])]
    lines += _reach_lines(done.reach) if waited else ["replicas follow by themselves: tuneserve status"]
    lines += [each.text for each in watched]
    lines += [f"make it the champion: tuneserve promote {version.label}"] if watched and done.percent is not None else []
    _show(said | _reach(done.reach), lines, as_json)


def _reach(reach: "Reach") -> dict[str, Any]:
    away = [{"url": seen.url, "state": seen.state, "why": seen.why} for seen in reach.unreachable]
    return {"replicas": list(reach.replicas), "unreachable": away, "seconds": round(reach.seconds, 3)}


def _reach_lines(reach: "Reach", what: str = "live on") -> list[str]:
    away = [f"not asked: {seen.why}; it reads the registry before it is ready" for seen in reach.unreachable]
    if reach.replicas:
        return [f"{what} {', '.join(reach.replicas)} after {reach.seconds:.1f} s", *away]
    return away or ["no replica is running; each reads the registry when it starts: tuneserve serve RECIPE"]
