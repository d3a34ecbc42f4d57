"""From a benchmark's record to what people read: result.json, a table in Markdown and, where matplotlib is installed, a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.bench import plot
from pipeline.bench.figures import CONFIDENCE, LATENCIES, METRICS, THROUGHPUT, Figures, Ratio, figures, ratios, read_run
from pipeline.bench.record import RESULT, TABLE, read_record
from pipeline.bench.steps import ArmFigures, arm_figures, read_training
from pipeline.bench.swapping import Move, gaps_of, read_move, seconds_of

TITLES = {
    THROUGHPUT: "output tokens/s",
    "first_token_p50_ms": "first token p50",
    "first_token_p95_ms": "p95",
    "per_token_p50_ms": "per token p50",
    "per_token_p95_ms": "p95",
    "end_to_end_p50_ms": "end to end p50",
    "end_to_end_p95_ms": "p95",
}
SHORT = 0.98
"""Answers with less than this share of the tokens that were asked for make arms differ in more than speed."""


def write_results(folder: Path) -> tuple[dict[str, Any], str]:
    """Makes the results of a folder's record anew, as far as it got: what result.json says, and the table. Raises InvalidInput if there is no record."""
    header, lines = read_record(folder)
    said, table = {"serve": _serve, "swap": _swap, "train": _train}[header["kind"]](header, lines)
    whole = said | _raw(header, lines)
    if not plot.draw(folder, whole):
        said["notes"].append("no plot: matplotlib is not installed here; where it is, `tuneserve bench report FOLDER` makes it")
    (folder / RESULT).write_text(json.dumps(whole) + "\n", "utf-8")
    (folder / TABLE).write_text(table, "utf-8")
    return said, table


def _raw(header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every request, as columns: of each run, or of the streams; or every step."""
    if header["kind"] == "serve":
        return {"runs": list(lines)}
    if header["kind"] == "train":
        return {"trainings": list(lines)}
    return {"requests": next((line["requests"] for line in lines if "requests" in line), None)}


def _serve(header: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    runs = [read_run(line) for line in lines]
    settings = header["settings"]
    compared, measured = ratios(runs, settings["against"]), figures(runs)
    complete = len(runs) == settings["planned_runs"]
    notes = [*header["notes"], *_serve_notes(measured, settings)]
    notes += [] if complete else [f"cut short: {len(runs)} of {settings['planned_runs']} runs were measured"]
    said = {"kind": "serve", "complete": complete, "ratios": [asdict(each) for each in compared], "figures": [asdict(each) for each in measured]}
    table = [*_ratio_table(compared, settings["against"]), "", *_figure_table(measured), "", *_setting_lines(header), *(f"- {note}" for note in notes)]
    return said | {key: value for key, value in header.items() if key != "kind"} | {"notes": notes}, "\n".join(table) + "\n"


def _serve_notes(measured: Sequence[Figures], settings: Mapping[str, Any]) -> list[str]:
    notes = []
    for each in measured:
        if each.failed:
            notes.append(f"{each.arm}, {each.concurrency} at a time: {each.failed} of {each.requests} requests failed, the first with: {each.first_error}")
        if each.answer_tokens is not None and each.answer_tokens < SHORT * settings["answer_tokens"]:
            notes.append(
                f"{each.arm}, {each.concurrency} at a time: answers had {each.answer_tokens:.1f} tokens instead of {settings['answer_tokens']}, "
                "so the server does not know ignore_eos; compare times per token, not end to end"
            )
    return notes


def _ratio_table(compared: Sequence[Ratio], against: str) -> list[str]:
    if not compared:
        return ["Nothing to compare: one arm was measured."]
    by_row: dict[tuple[int, str], dict[str, Ratio]] = {}
    for each in compared:
        by_row.setdefault((each.concurrency, each.arm), {})[each.metric] = each
    head = [f"| at a time | against {against} |", *(f" {TITLES[metric]} |" for metric in METRICS)]
    rows = [f"| {level} | {arm} |" + "".join(f" {_ratio(found.get(metric))} |" for metric in METRICS) for (level, arm), found in by_row.items()]
    return [
        f"Ratios [{CONFIDENCE:.0%} interval]; above 1 is faster for tokens/s, slower for times.",
        "",
        "".join(head),
        "|---|---|" + "---|" * len(METRICS),
        *rows,
    ]


def _ratio(found: Ratio | None) -> str:
    return "-" if found is None else _interval(found.ratio, found.low, found.high)


def _interval(ratio: float | None, low: float | None, high: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _figure_table(measured: Sequence[Figures]) -> list[str]:
    head = f"| at a time | arm | {TITLES[THROUGHPUT]} |" + "".join(f" {TITLES[metric]} ms |" for metric in LATENCIES) + " prompt tokens | requests | failed |"
    rows = []
    for each in measured:
        cells = [_number(each.values[metric]) for metric in METRICS]
        rows.append(
            f"| {each.concurrency} | {each.arm} | {' | '.join(cells)} | {_number(each.prompt_tokens)} | {each.requests} in {each.rounds} rounds | {each.failed} |"
        )
    return [head, "|---|---|" + "---|" * (len(METRICS) + 3), *rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _setting_lines(header: Mapping[str, Any]) -> list[str]:
    settings, machine = header["settings"], header["machine"]
    servers = [f"{found['url']}: vLLM {found['version']}" if found["version"] else f"{found['url']}: says no vLLM version" for found in header["servers"]]
    arms = [f"{arm['name']} = {', '.join(arm['models'])}" + (f" at {arm['url']}" if len(servers) > 1 else "") for arm in settings["arms"]]
    asked = f"mix {settings['mix']}, {settings['answer_tokens']} answer tokens, seed {settings['seed']}"
    return [f"- {header['began']}, {_machine(machine)}", f"- {'; '.join(servers)}", f"- {asked}; {'; '.join(arms)}"]


def _machine(machine: Mapping[str, Any]) -> str:
    gpus = [f"{machine['gpus'].count(name)} x {name}" for name in dict.fromkeys(machine["gpus"])]
    return ", ".join([*gpus, f"{machine['cpus']} CPUs {machine['architecture']}", f"{machine['memory_gib']} GiB", f"Python {machine['python']}"])


def _swap(header: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    moves = [read_move(line["move"]) for line in lines if "move" in line]
    settings = header["settings"]
    ended = next((line["ended"] for line in lines if "ended" in line), None)
    complete = len(moves) == settings["moves"] and ended is not None
    notes = list(header["notes"])
    if ended and ended["failed"]:
        notes.append(f"{ended['failed']} of {ended['requests']} requests failed, the first with: {ended['first_error']}")
    notes += [] if complete else [f"cut short: {len(moves)} of {settings['moves']} moves were measured"]
    loaded, fetched = ([move for move in moves if move.was_loaded is known] for known in (True, False))
    seconds = {"all": seconds_of(moves), "loaded_before": seconds_of(loaded), "loaded_for_the_move": seconds_of(fetched)}
    said = {"kind": "swap", "complete": complete, "first_token_seconds": seconds, "longest_gap_ms": gaps_of(moves), "traffic": ended}
    table = [*_swap_table(moves, seconds), "", *_gap_table(moves), "", *_swap_setting_lines(header, ended), *(f"- {note}" for note in notes)]
    return said | {"moves": [asdict(move) for move in moves]} | {key: value for key, value in header.items() if key != "kind"} | {"notes": notes}, "\n".join(
        table
    ) + "\n"


def _swap_table(moves: Sequence[Move], seconds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = [
        "| alias set to first token of the new version, s | moves | p50 | p95 | max | of it until the request was sent p50 | live on every replica p50 |",
        "|---|---|---|---|---|---|---|",
    ]
    titles = {"all": "all moves", "loaded_before": "to a version that was loaded", "loaded_for_the_move": "to one that was fetched and loaded for it"}
    rows = []
    for key, title in titles.items():
        found = seconds[key]
        if found["moves"]:
            cells = [_seconds(found[name]) for name in ("p50", "p95", "max", "sent_p50", "live_p50")]
            rows.append(f"| {title} | {found['moves']} | {' | '.join(cells)} |")
    return [*head, *rows] if rows else ["No move was measured."]


def _gap_table(moves: Sequence[Move]) -> list[str]:
    found = gaps_of(moves)
    rows = [
        f"| {title} | {found[key]['windows']} | {' | '.join(_number(found[key][name]) for name in ('p50', 'p95', 'max'))} |"
        for key, title in (("around", "around a move"), ("between", "between moves, for as long"))
    ]
    return ["| longest gap between parts of a stream, ms | windows | p50 | p95 | max |", "|---|---|---|---|---|", *rows]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _swap_setting_lines(header: Mapping[str, Any], ended: Mapping[str, Any] | None) -> list[str]:
    settings = header["settings"]
    servers = [f"{found['url']}: vLLM {found['version'] or 'of unknown version'}" for found in header["servers"]]
    told = "replicas are told of each move" if settings["told"] else "replicas find each move by polling"
    asked = f"{settings['streams']} streams of {settings['answer_tokens']} tokens, mix {settings['mix']}, asking {', '.join(settings['asked'])}"
    counted = [f"- {ended['requests']} requests, {ended['failed']} failed"] if ended else []
    moved = f"{settings['champion']} to {', '.join(settings['others'])} and back"
    return [f"- {header['began']}, {_machine(header['machine'])}", f"- {'; '.join(servers)}", f"- {moved}; {told}; {asked}", *counted]


def _train(header: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    settings = header["settings"]
    measured = arm_figures([read_training(line) for line in lines], settings["against"], settings["step_tokens"])
    planned = settings["rounds"] * len(settings["arms"])
    notes = [*header["notes"], *([] if len(lines) == planned else [f"cut short: {len(lines)} of {planned} trainings were measured"])]
    said = {"kind": "train", "complete": len(lines) == planned, "figures": [asdict(each) for each in measured]}
    table = [*_train_table(measured, settings["against"]), "", *_train_setting_lines(header), *(f"- {note}" for note in notes)]
    return said | {key: value for key, value in header.items() if key != "kind"} | {"notes": notes}, "\n".join(table) + "\n"


def _train_table(measured: Sequence[ArmFigures], against: str) -> list[str]:
    rows = []
    for each in measured:
        cells = [
            _interval(each.ratio, each.low, each.high),
            f"{each.step_p50_seconds:.3f}",
            f"{each.step_p95_seconds:.3f}",
            _number(each.tokens_per_second),
            _number(each.memory_gib),
        ]
        rows.append(f"| {each.arm} | {' | '.join(cells)} | {each.steps} in {each.rounds} rounds |")
    head = [
        f"| arm | tokens/s against {against} [{CONFIDENCE:.0%} interval] | a step p50 s | p95 s | tokens/s | reserved GiB of a GPU | steps |",
        "|---" * 7 + "|",
    ]
    return [*head, *rows] if rows else ["No step was measured."]


def _train_setting_lines(header: Mapping[str, Any]) -> list[str]:
    settings = header["settings"]
    tokens = "of unknown length" if settings["step_tokens"] is None else f"{settings['step_tokens']:.0f} tokens in the mean"
    steps = f"{settings['recipe']}: {settings['steps']} steps of {settings['rows']} rows a training, {tokens}, after {settings['untimed_steps']} that are not counted"
    planned = "" if settings["planned_gib"] is None else f"; planned {settings['planned_gib']:.1f} GiB a GPU"
    return [
        f"- {header['began']}, {_machine(header['machine'])}",
        f"- {steps}{planned}",
        f"- {', '.join(f'{key} {value}' for key, value in settings['versions'].items())}",
    ]
