"""The command about adapters: inspect. cli.py holds the others, and what they promise."""

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.adapter import ADAPTER_FILES, adapter_digest, name_fault
from pipeline.command import begin_journal, json_option, opened_project
from pipeline.errors import AdapterInvalid, Fault, InvalidInput, VersionRefused

if TYPE_CHECKING:
    from pipeline.conversion import ExpertsLayout
    from pipeline.examination import Target
    from pipeline.project import Project
    from pipeline.servable import Reason
    from pipeline.serving.wanted import RegisteredVersion

VERSION = re.compile(r"([^/]+)(?:/([1-9][0-9]*))?")
UNREADABLE = ("link", "config-unreadable", "weights-unreadable", "not-lora", "no-tensors", "bad-pattern")
NO_COPY = frozenset([*UNREADABLE, "digest-mismatch", "half-pair", "rank-shape-mismatch", "duplicate-module"])
"""Reasons that say that the files do not hold what was trained; what is made of them would not either."""
SHOWN = 20
"""Kinds of modules in the table."""


@click.command(short_help="What an adapter is, and whether a server can serve it.")
@click.argument("adapter", metavar="ADAPTER_DIR|NAME[/VERSION]")
@click.option(
    "--serving",
    "recipe_path",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="The serving recipe to hold it against. Default: the one in recipes/serving for the adapter's base, else vLLM's rules alone.",
)
@click.option(
    "--write", "out", type=click.Path(path_type=Path), metavar="OUT", help="Make the folder OUT with the same adapter, its keys renamed for the server."
)
@click.option("--experts", type=click.Choice(["2d", "3d"]), help="With --write: the layout of routed experts, one by one (2d) or fused (3d).")
@json_option
def inspect(adapter: str, recipe_path: Path | None, out: Path | None, experts: "ExpertsLayout | None", as_json: bool) -> None:
    """Say what an adapter is, and every reason why the server of a serving recipe could not serve it, each with a remedy.

    ADAPTER_DIR is a folder; NAME/VERSION a registered version (NAME: its newest). Exits 0 if it can be served, 1 if not, 2 for wrong input.

    --write makes what could not be served servable where that is exact: keys of a text-only class get the names of the served one, and routed experts change
    their layout. It then exits 0 if OUT is there and whole, and reports on OUT.
    """
    from pipeline.examination import server_of
    from pipeline.project import find_project

    if experts and not out:
        raise InvalidInput([Fault("", "--experts", "says how to convert; give --write OUT, too")])
    if out:
        _require_free(out)
    folder = _folder(adapter)
    project = find_project()
    project.use_environment()
    target = server_of(recipe_path, project) if recipe_path else None
    if folder:
        if project.state.is_dir():
            begin_journal(project)
        _inspect(folder, None, target, project, out, experts, as_json)
        return
    match = VERSION.fullmatch(adapter)
    if not match or name_fault(match[1]):
        raise InvalidInput([Fault(adapter, "", "no such folder, and no NAME or NAME/VERSION of a registered adapter, for example catalog/3")])
    from pipeline import services

    if "MLFLOW_TRACKING_URI" not in os.environ and not (project.mlruns / services.DATABASE).is_file():  # no server is started only to say so
        raise InvalidInput(
            [Fault(adapter, "", "no such folder, and no adapter is registered in this project; give a folder, or train one: tuneserve train RECIPE")]
        )
    with opened_project(uses_caches=False) as opened, tempfile.TemporaryDirectory(prefix="tuneserve-inspect-") as fetched:
        version, refused = _fetch(opened, match[1], match[2], Path(fetched), target)
        _inspect(Path(fetched), (version, refused), target, opened, out, experts, as_json)


COMMANDS = (inspect,)


def _folder(text: str) -> Path | None:
    """The adapter's folder; None if `text` is to be a registered name. Raises InvalidInput if a path leads to no adapter folder."""
    path = Path(text)
    if not (text and path.is_dir()):
        if text and path.exists():
            raise InvalidInput([Fault(text, "", f"is no folder; give the folder that holds {' and '.join(ADAPTER_FILES)}")])
        if text.startswith((".", "/")):
            raise InvalidInput([Fault(text, "", "no such folder; give an adapter's folder, or NAME/VERSION of a registered one")])
        return None
    if not any(name.name.startswith("adapter_") for name in path.iterdir()):
        raise InvalidInput([Fault(text, "", f"is no adapter's folder: it holds neither {' nor '.join(ADAPTER_FILES)}")])
    return path


def _require_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InvalidInput([Fault(str(out), "", "is there already; --write makes a new folder: give another name")])
    if not out.parent.is_dir():
        raise InvalidInput([Fault(str(out.parent), "", "no such folder; make it first, or give another --write")])


def _fetch(project: "Project", name: str, number: str | None, folder: Path, target: "Target | None") -> "tuple[RegisteredVersion, list[Reason]]":
    """The version as a replica reads it, its files now in `folder`, and why they cannot be had or are others than registered."""
    from pipeline import services
    from pipeline.examination import refusal
    from pipeline.progress import progress
    from pipeline.serving import local_adapters, registry_reader

    async def fetch(uri: str) -> "tuple[RegisteredVersion, list[Reason]]":
        limit = int(target.recipe.lora.max_adapter_gib * 2**30) if target and target.recipe else registry_reader.MAX_ADAPTER_BYTES
        reader = registry_reader.RegistryReader(uri, limit)
        try:
            version = await reader.version(name, number)
            if version is None:
                label = f"{name}/{number}" if number else name
                what = "version" if number else "folder, and no such model"
                raise InvalidInput([Fault(label, "", f"no such {what} at {uri}; look there for what is registered")])
            try:
                await reader.fetch(version, folder)
                if version.digest:
                    local_adapters.check(folder, version.digest)
            except VersionRefused as error:
                return version, [refusal(error)]
            return version, []
        finally:
            await reader.aclose()

    with progress("MLflow"), services.tracking(project) as uri:
        return asyncio.run(fetch(uri))


def _inspect(
    folder: Path,
    registered: "tuple[RegisteredVersion, list[Reason]] | None",
    target: "Target | None",
    project: "Project",
    out: Path | None,
    experts: "ExpertsLayout | None",
    as_json: bool,
) -> None:
    from pipeline.examination import entry_reasons, folder_reasons, likely_server, listed, verdict

    target = target or likely_server(folder, project)
    version, refused = registered or (None, [])
    label = version.label if version else str(folder)
    found = [*(entry_reasons(version, target, project) if version else []), *refused]
    if not refused or refused[0].code == "digest-mismatch":
        found += folder_reasons(folder, target, project)
    written: dict[str, Any] = {}
    if out:
        done = _write(folder, label, out, experts, [reason.code for reason in found if reason.code in NO_COPY or reason in refused])
        source = {"adapter": label, "digest": adapter_digest(folder), "reasons": listed(found)}
        written = {"written": {"folder": str(out), "conversions": done, "from": source}}
        folder, label, version, found = out, str(out), None, folder_reasons(out, target, project)
    said = verdict(found, _what_it_is(folder, version), target) | written
    if as_json:
        click.echo(json.dumps(said))
    else:
        _print(said, label, target.title)
    sys.exit(0 if out or said["servable"] else 1)


def _what_it_is(folder: Path, version: "RegisteredVersion | None") -> dict[str, Any]:
    from pipeline.anatomy import dissect

    entry = {}
    if version:
        entry = {"name": version.name, "version": version.version, "run_id": version.run_id, "registered_digest": version.digest}
        entry |= {"base_revision": version.base_revision, "template_digest": version.template_digest}
    return {**entry, **dissect(folder).as_dict()}


def _write(folder: Path, label: str, out: Path, experts: "ExpertsLayout | None", broken: Sequence[str]) -> list[str]:
    """Writes the converted adapter to `out` and says what was done. Raises AdapterInvalid if it cannot be exactly the same one, InvalidInput if it is so already.

    `broken` are codes of reasons why the files are not what was trained.
    """
    from pipeline import conversion

    if broken:
        raise AdapterInvalid(f"{label}: not converted, since its files are not what was trained ({', '.join(broken)}); restore them first")
    content, done = conversion.convert(conversion.read_content(folder), experts)
    if not done:
        wanted = "; its experts can change their layout with --experts 2d or 3d" if experts is None else f", its routed experts (if any) in {experts}"
        raise InvalidInput([Fault(label, "", f"nothing to convert: its keys are the served class's already{wanted}")])
    conversion.write_content(content, out)
    if conversion.read_content(out).tensors.keys() != content.tensors.keys():
        raise AdapterInvalid(f"{out}: not what was written; check the disk, remove it and try again")
    return done


def _print(said: Mapping[str, Any], label: str, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    adapter = said["adapter"]
    if written := said.get("written"):
        console.print(f"wrote {written['folder']}: {', '.join(written['conversions'])}", soft_wrap=True)
    ranks = ", ".join(map(str, adapter["ranks"])) or "unknown"
    types = ", ".join(adapter["dtypes"]) or "unknown type"
    console.print(f"{label}: rank {ranks}, {adapter['parameters']:,} parameters ({types}), {adapter['bytes']:,} bytes, layout {adapter['layout'] or 'unknown'}")
    console.print(f"digest {adapter['digest'] or 'none'}; base named in its configuration: {adapter['base_model'] or 'none'}", soft_wrap=True)
    if "run_id" in adapter:
        run, base, template = (_plain(str(adapter[key])) for key in ("run_id", "base_revision", "template_digest"))
        console.print(f"run {run}, base revision {base}, template {template}", soft_wrap=True)
    table = Table("modules", "layers", "number", "rank", "scaling", "parameters", "|A|", "|B|", "|update|")
    for name, group in list(adapter["modules"].items())[:SHOWN]:
        norms = (f"{norm:.4g}" if norm is not None else "-" for norm in (group["norm_a"], group["norm_b"], group["norm_update"]))
        figures = (", ".join(map(str, group["ranks"])), ", ".join(f"{scaling:.4g}" for scaling in group["scalings"]), f"{group['parameters']:,}")
        table.add_row(_plain(name), _ranges(group["layers"]), str(group["modules"]), *figures, *norms)
    if adapter["modules"]:
        console.print(table)
    if (more := len(adapter["modules"]) - SHOWN) > 0:
        console.print(f"and {more} more kinds of modules (--json has all)")
    for note in said["against"]["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{'can be served' if said['servable'] else 'cannot be served'}: {title}", soft_wrap=True)
    for reason in said["reasons"]:
        console.print(f"  {reason['code']}: {reason['message']}\n    -> {reason['remedy']}", soft_wrap=True)


def _plain(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) or "-"
