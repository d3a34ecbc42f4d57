"""`tuneserve bench`: what users measure on their own machines. cli.py says what all commands promise.

`bench serve` and `bench report` need no MLflow, Prefect, torch or vLLM here: they run beside any server.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli_plan import ignore_plan_option, plan_here, refuse_what_cannot_fit
from pipeline.cli_serving import adapter_of, chosen_replicas, fleet_options, must_reach_all
from pipeline.command import begin_journal, json_option, opened_project, recipe_argument
from pipeline.errors import Fault, InvalidInput, ServingError
from pipeline.gpus import GIB

if TYPE_CHECKING:
    from pipeline.bench.arms import Arm, Server
    from pipeline.bench.questions import Mix
    from pipeline.bench.record import BenchKind, Record
    from pipeline.fleet import Fleet
    from pipeline.project import Project
    from pipeline.recipe import ServingRecipe
    from pipeline.registry import Registry, Version

LEAST_REQUESTS = 8
"""Of an arm in a round, and at least three for each that is asked at a time: else most of a run is its beginning and its end."""

mix_option = click.option(
    "--mix",
    type=click.Choice(["image", "mixed", "text"]),
    default="image",
    show_default=True,
    help="Questions with one picture of 448x448, without one, or mixed: half with one, 3 in 10 without, 2 in 10 with two.",
)
answer_tokens_option = click.option("--answer-tokens", type=click.IntRange(min=2), default=64, show_default=True, metavar="N", help="Of every answer.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Makes the pictures; default: other ones each time, as a server's cache must not know them."
)
key_option = click.option("--api-key-env", metavar="VARIABLE", help="The environment variable with the key that the servers want.")
out_option = click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the result goes; default: .tuneserve/bench/KIND-TIME.")


@click.group(short_help="Measure served models, alias moves and training.")
def bench() -> None:
    """Measure on your own machine: what adapters cost against the base, how soon a moved alias answers, how fast a recipe trains.

    A result is a folder: result.md (tables, ratios first), result.json (all of it, with every request), plot.png and plot.svg. What was measured is written at once, so that an interrupted
    benchmark, or a lost machine, leaves what there is.
    """


@bench.command(short_help="Arms side by side: base, one adapter, many, other servers.")
@click.option("--url", required=True, help="The server, for example http://127.0.0.1:8000; normally one that `tuneserve serve` started.")
@click.option(
    "--arm",
    "arm_texts",
    multiple=True,
    metavar="NAME[=[URL#]MODEL,...]",
    help="What to measure; may be given several times. base, one (adapter) and mixed (up to 8 in turn) are found out from the server, and are what is measured without this. "
    "Others say which models they ask in turn, elsewhere if need be: merged=http://127.0.0.1:9000#shop.",
)
@click.option("--against", metavar="NAME", help="The arm that the others are divided by; default: base, else the first.")
@click.option("--concurrency", default="1,4,16,64", show_default=True, metavar="N[,N]...", help="Requests at a time.")
@click.option(
    "--requests",
    metavar="N[,N]...",
    help=f"Of each arm in each round; one number, or one for each concurrency. Default: three for each at a time, at least {LEAST_REQUESTS}.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="How often each arm is measured; the intervals need at least two."
)
@answer_tokens_option
@mix_option
@seed_option
@key_option
@out_option
@json_option
def serve(
    url: str,
    arm_texts: tuple[str, ...],
    against: str | None,
    concurrency: str,
    requests: str | None,
    rounds: int,
    answer_tokens: int,
    mix: "Mix",
    seed: int | None,
    api_key_env: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure running OpenAI-compatible servers with product questions in a closed loop: output tokens/s, time to first token, per token and end to end.

    Every arm is warmed up at each concurrency; then they take turns (A B C, C B A, ...), so that whatever drifts hits all alike, and ratios come from one run. Failed requests are counted,
    and asked once. Other users' requests disturb it, and it disturbs them. Exits 1 if an arm is not answered at all.
    """
    from pipeline.bench.arms import base_url, choose_arms, parse_arm, read_server
    from pipeline.bench.serving import Load, measure, settings_of

    url = base_url(url)
    given = [parse_arm(text, url) for text in arm_texts]
    levels = _levels(concurrency, requests)
    headers = _headers(api_key_env)
    with _project_beside() as project:
        folder = _folder(project, "serve", out)
        urls = dict.fromkeys([*([url] if not given or any(isinstance(arm, str) or arm.url == url for arm in given) else []), *_urls(given)])
        servers = {each: read_server(each, headers) for each in urls}
        arms = choose_arms(given, url, servers)
        _refuse_long_answers(answer_tokens, servers.values())
        reference = _reference(arms, against)
        load = Load(levels, rounds, answer_tokens, mix, _seed(seed))
        header = _header("serve", servers.values(), settings_of(arms, load, reference), [] if given else _missing(arms))
        with _recorded(folder, header, "bench serve", as_json) as (record, report):
            measure(arms, load, headers, record, report)


def _urls(given: "Sequence[Arm | str]") -> list[str]:
    return [arm.url for arm in given if not isinstance(arm, str)]


def _reference(arms: "Sequence[Arm]", against: str | None) -> str:
    names = [arm.name for arm in arms]
    if against is None:
        return "base" if "base" in names else names[0]
    if against not in names:
        raise InvalidInput([Fault("--against", "", f"{against} is none of the arms: {', '.join(names)}")])
    return against


def _refuse_long_answers(answer_tokens: int, servers: "Iterable[Server]") -> None:
    if short := [server for server in servers if server.max_tokens is not None and server.max_tokens <= answer_tokens]:
        limits = [f"{server.url} takes {server.max_tokens} tokens of prompt and answer together; ask for fewer than {answer_tokens}" for server in short]
        raise InvalidInput([Fault("--answer-tokens", "", limit) for limit in limits])


def _missing(arms: "Sequence[Arm]") -> list[str]:
    """Which of the arms that are found out from a server it does not have, as a note."""
    names = {arm.name for arm in arms}
    missing = [name for name in ("one", "mixed") if name not in names]
    return [f"{' and '.join(missing)} not measured: the server has {'one adapter' if 'one' in names else 'no adapter'}"] if missing else []


@bench.command(short_help="How soon a moved alias answers, and what others notice.")
@click.argument("adapters", nargs=-1, required=True, metavar="NAME/VERSION...")
@click.option(
    "--moves", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Of the alias: to each named version in turn, and to the champion."
)
@click.option("--streams", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Requests at a time, streamed.")
@click.option(
    "--pause",
    "pause_seconds",
    type=click.FloatRange(min=0.1),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Between a version's first token and the next move, at least.",
)
@click.option(
    "--poll",
    is_flag=True,
    help="Tell no replica of a move: each finds it when it next reads the registry. Default: they are told, as `tuneserve promote` does.",
)
@click.option("--ask", "asked", multiple=True, metavar="MODEL", help="Also ask these in turn with NAME; may be given several times. Default: NAME alone.")
@click.option("--url", help="Where the streams ask; default: the first replica.")
@click.option("--yes", is_flag=True, help="Needed: the alias is moved for real, and whoever asks NAME meanwhile is answered by the version it points to.")
@answer_tokens_option
@mix_option
@seed_option
@key_option
@out_option
@fleet_options
@json_option
def swap(
    adapters: tuple[str, ...],
    moves: int,
    streams: int,
    pause_seconds: float,
    poll: bool,
    asked: tuple[str, ...],
    url: str | None,
    yes: bool,
    answer_tokens: int,
    mix: "Mix",
    seed: int | None,
    api_key_env: str | None,
    out: Path | None,
    recipe_path: Path | None,
    replica_urls: tuple[str, ...],
    as_json: bool,
) -> None:
    """Move NAME's champion to a version and back, over and over, under streaming requests; measure the time from the alias to the version's first token, and the longest gaps in streams.

    The alias is really moved, in the registry that replicas follow: while this runs, NAME answers with the named versions too, without any gate. So it wants --yes, is refused while a canary runs or a
    version is switched off, holds back promotions of NAME, and makes the champion of now champion again at its end, on Ctrl-C too. History gets one entry. Best on a model that nobody else asks.
    """
    from pipeline.bench.arms import base_url, read_server
    from pipeline.bench.swapping import Plan, Streams, Target, measure

    name, numbers = _versions(adapters)
    recipe, urls = chosen_replicas(recipe_path, replica_urls)
    asked_at = base_url(url) if url else None
    headers = _headers(api_key_env)
    if not yes:
        told = (
            f"the alias champion of {name} moves {moves} times, also to {', '.join(adapters)}, and whoever asks {name} meanwhile is answered by these, ungated"
        )
        raise InvalidInput([Fault("--yes", "", f"is missing: {told}; give --yes if that may be, or measure a model that nobody asks")])
    with opened_project(uses_caches=False) as project, contextlib.ExitStack() as stack:
        folder = _folder(project, "swap", out)
        registry, fleet = _registry_and_fleet(project, stack, recipe, urls)
        others = [registry.version(name, number) for number in numbers]
        _refuse_champion(registry.champion_number(name), others)
        server = read_server(asked_at or _follower_url(fleet, name), headers)
        if unknown := [model for model in (name, *asked) if model not in server.names]:
            raise InvalidInput([Fault("--ask", "", f"{', '.join(unknown)} not served at {server.url}; it serves {', '.join(sorted(server.names))}")])

        from pipeline import promotion
        from pipeline.history import Grounds
        from pipeline.lock import model_lock
        from pipeline.switch import user_at_host

        grounds = Grounds(user_at_host(), f"tuneserve bench swap: {moves} moves, also to {', '.join(adapters)}; then back")
        lock = model_lock(project, "promote", name)
        moving = stack.enter_context(contextlib.ExitStack())
        champion, move = moving.enter_context(promotion.swapping(registry, others, fleet, lock, grounds, tell=not poll))
        versions = {version.label: version for version in (*others, champion)}
        plan = Plan(tuple(Target(version.label, f"{version.label}@{version.digest[:8]}") for version in versions.values()), moves, pause_seconds)
        pictures = _seed(seed)
        settings = {"champion": champion.label, "others": list(adapters), "moves": moves, "streams": streams, "pause_seconds": pause_seconds, "told": not poll}
        settings |= {"asked": [name, *asked], "answer_tokens": answer_tokens, "mix": mix, "seed": pictures}
        with _recorded(folder, _header("swap", [server], settings, []), "bench swap", as_json) as (record, report):
            clients = Streams(server.url, (name, *asked), streams, answer_tokens, mix, pictures, headers)
            with clients, moving.pop_all():  # the champion is back before streams end and results are made
                measure(clients, lambda label: move(versions[label]), lambda label: _is_loaded(fleet, versions[label]), plan, record, report)


def _versions(adapters: Sequence[str]) -> tuple[str, list[str]]:
    """The model, and the numbers of its versions."""
    found = [adapter_of(adapter) for adapter in adapters]
    names = {name for name, _ in found}
    if len(names) > 1 or any(number is None for _, number in found):
        raise InvalidInput([Fault(" ".join(adapters), "", "give versions of one model, each as NAME/VERSION, for example catalog/3")])
    if len(set(adapters)) < len(adapters):
        raise InvalidInput([Fault(" ".join(adapters), "", "a version is named twice; name each once, they are taken in turn")])
    return names.pop(), [number for _, number in found if number]


def _registry_and_fleet(project: "Project", stack: contextlib.ExitStack, recipe: "ServingRecipe | None", urls: Sequence[str]) -> "tuple[Registry, Fleet]":
    from pipeline import services
    from pipeline.progress import progress

    with progress("MLflow"):
        uri = stack.enter_context(services.tracking(project))
    from pipeline.fleet import addresses_of, open_fleet
    from pipeline.registry import Registry

    return Registry(uri), stack.enter_context(open_fleet(project, addresses_of(project, recipe, urls), unreachable_fails=must_reach_all(recipe)))


def _refuse_champion(champion: str | None, others: "Sequence[Version]") -> None:
    for version in others:
        if version.version == champion:
            raise InvalidInput([Fault(version.label, "", "is the champion, which is moved away from and back to in any case; name other versions")])


def _follower_url(fleet: "Fleet", name: str) -> str:
    """The first ready replica that follows `name`."""
    looks = fleet.looks()
    for look in looks:
        if look.state == "ready" and look.status and name in look.status.models:
            return look.url
    why = "; ".join(look.why for look in looks if look.why) or f"none of this project's follows {name}"
    raise ServingError(f"no replica is ready that follows {name} ({why}); start one: tuneserve serve RECIPE, or name it: --replica URL")


def _is_loaded(fleet: "Fleet", version: "Version") -> bool | None:
    """Whether all replicas that say anything of the model have the version, if only because it is not forgotten yet; None if none does."""
    said = [look.status for look in fleet.looks() if look.status and version.name in look.status.models]
    return all(version.digest in status.slots.digests for status in said) if said else None


@bench.command(short_help="Seconds a step, against ms-swift alone.")
@recipe_argument
@click.option(
    "--arm",
    "arms",
    type=click.Choice(["train", "bare"]),
    multiple=True,
    default=("train", "bare"),
    show_default=True,
    help="train: as `tuneserve train` does; bare: ms-swift alone with the same arguments. May be given twice.",
)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Timed ones of each training; two more come first.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="How often each arm trains; an interval needs at least two."
)
@ignore_plan_option
@out_option
@json_option
def train(recipe: Path, arms: tuple[str, ...], steps: int, rounds: int, ignore_plan: bool, out: Path | None, as_json: bool) -> None:
    """Measure how fast a finetune recipe trains here, and what it takes of the GPUs: short trainings on its own rows, of which nothing is kept or registered.

    With both arms they take turns (A B, B A, ...), each from its start, model loading included, which is not timed. Other work on the machine disturbs it. Refused, as `tuneserve train`,
    if the recipe cannot fit the GPUs that are here.
    """
    from pipeline.recipe import FinetuneRecipe, load_recipe

    wanted = load_recipe(recipe, FinetuneRecipe)
    chosen = tuple(dict.fromkeys(arms))
    with opened_project() as project:
        refuse_what_cannot_fit(recipe, wanted, project, ignore_plan)
        from pipeline.basemodel import resolve_base_model
        from pipeline.bench.training import measure, settings_of, shortened
        from pipeline.dataset import Deep, load_dataset
        from pipeline.preflight import checked_rows, refuse_misfit
        from pipeline.progress import progress

        folder = _folder(project, "train", out)
        checked_rows(recipe, wanted, project)
        with progress("base model") as report:
            base = resolve_base_model(wanted.base_model, project, report)
        refuse_misfit(recipe, wanted, base)
        with progress("rows") as report:
            rows = load_dataset(wanted.dataset, project, Deep(base.folder, wanted.training.max_length_tokens, wanted.method == "dpo"), report)
        planned = None if wanted.training.device == "cpu" else plan_here(wanted, project)
        settings = settings_of(str(recipe), wanted, rows, chosen, steps, rounds, planned.total / GIB if planned else None)
        with _recorded(folder, _header("train", (), settings, ()), "bench train", as_json) as (record, told):
            measure(shortened(wanted, steps), base, rows, project, chosen, rounds, record, told)


@bench.command(short_help="Make a result's tables and plots anew.")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def report(folder: Path, as_json: bool) -> None:
    """Make result.json, result.md and the plots from what a benchmark wrote while it ran (rounds.jsonl): after a machine was lost, or where matplotlib is installed."""
    with _project_beside():
        _show(folder, as_json)


@contextlib.contextmanager
def _project_beside() -> "Iterator[Project]":
    """The project, its environment set; its journal is opened only if there is one: a server may run where no project is."""
    from pipeline.project import find_project

    project = find_project()
    project.use_environment()
    if project.state.is_dir():
        begin_journal(project)
    yield project


@contextlib.contextmanager
def _recorded(folder: Path, header: dict[str, Any], title: str, as_json: bool) -> "Iterator[tuple[Record, Callable[[str, float], None]]]":
    """The folder's record, and the progress; the results are made and shown however the block ends."""
    from pipeline.bench.record import Record
    from pipeline.progress import progress

    record = Record(folder, header)
    try:
        with progress(title) as report:
            yield record, report
    except BaseException:
        with contextlib.suppress(Exception):  # what ended it counts
            _show(folder, as_json=False, err=True)
        raise
    _show(folder, as_json)


def _show(folder: Path, as_json: bool, *, err: bool = False) -> None:
    from pipeline.bench.results import write_results

    said, table = write_results(folder)
    click.echo(json.dumps({"folder": str(folder), **said}) if as_json else f"{table}\nwritten to {folder}", err=err)


def _folder(project: "Project", kind: "BenchKind", out: Path | None) -> Path:
    from pipeline.bench.record import new_folder, refuse_used

    if out is not None:
        refuse_used(out)
    return out if out is not None else new_folder(project.state / "bench", kind)


def _header(kind: "BenchKind", servers: "Iterable[Server]", settings: Mapping[str, object], notes: Sequence[str]) -> dict[str, Any]:
    from pipeline.bench.machine import machine

    asked = [{"url": server.url, "version": server.version, "models": sorted(server.names)} for server in servers]
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return {"kind": kind, "began": began, "machine": machine(), "servers": asked, "settings": settings, "notes": list(notes)}


def _levels(concurrency: str, requests: str | None) -> dict[int, int]:
    """The requests of an arm in a round for each concurrency."""
    levels = _counts("--concurrency", concurrency)
    if len(set(levels)) < len(levels):
        raise InvalidInput([Fault("--concurrency", "", f"{concurrency} names one twice; name each once")])
    if requests is None:
        return {level: max(LEAST_REQUESTS, 3 * level) for level in levels}
    counts = _counts("--requests", requests)
    if len(counts) not in (1, len(levels)):
        raise InvalidInput([Fault("--requests", "", f"{requests} are {len(counts)} numbers for {len(levels)} concurrencies; give one, or one for each")])
    found = dict(zip(levels, counts * len(levels) if len(counts) == 1 else counts, strict=True))
    if faults := [
        Fault("--requests", "", f"{count} cannot be asked {level} at a time; give at least {level}") for level, count in found.items() if count < level
    ]:
        raise InvalidInput(faults)
    return found


def _counts(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput([Fault(option, "", f"'{text}' are no numbers from 1 on; give for example 16 or 1,4,16")])
    return [int(part) for part in parts]


def _headers(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise InvalidInput([Fault("--api-key-env", "", f"{api_key_env} is not set; put the servers' key into that variable")])
    return {"Authorization": f"Bearer {key}"}


def _seed(given: int | None) -> int:
    return int(time.time()) if given is None else given
