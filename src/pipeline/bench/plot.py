"""A benchmark's result as plot.png and plot.svg."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench.figures import THROUGHPUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("plot.png", "plot.svg")
DOTS_PER_INCH = 150
RATIOS = ((THROUGHPUT, "output tokens/s"), ("first_token_p50_ms", "time to first token, p50"), ("per_token_p50_ms", "time per token, p50"))
"""What is drawn as a ratio, each in a panel of its own."""


def draw(folder: Path, result: Mapping[str, Any]) -> bool:
    """Writes FILES into the folder; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    size = (4.2 * (1 + len(RATIOS)), 3.8) if result["kind"] == "serve" else (9.0, 3.8)
    figure = Figure(figsize=size, layout="constrained")
    if result["kind"] == "serve":
        _draw_serve(list(figure.subplots(1, 1 + len(RATIOS))), result)
    elif result["kind"] == "train":
        _draw_train(figure.subplots(), result)
    else:
        _draw_swap(list(figure.subplots(1, 2)), result)
    for name in FILES:
        figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    return True


def _draw_serve(panels: "list[Axes]", result: Mapping[str, Any]) -> None:
    """Tokens/s of every arm, then the ratios with their intervals."""
    names = [arm["name"] for arm in result["settings"]["arms"]]
    against = result["settings"]["against"]
    for place, name in enumerate(names):
        points = [(each["concurrency"], each["values"][THROUGHPUT]) for each in result["figures"] if each["arm"] == name]
        panels[0].plot([level for level, _ in points], [speed for _, speed in points], marker="o", label=name, color=f"C{place}")
    panels[0].set_title("output tokens/s")
    panels[0].set_ylim(bottom=0)
    for panel, (metric, title) in zip(panels[1:], RATIOS, strict=True):
        panel.axhline(1.0, color="0.6", linestyle="--", linewidth=1)
        for place, name in enumerate(names):
            found = [each for each in result["ratios"] if (each["arm"], each["metric"]) == (name, metric)]
            if found:
                below, above = ([abs(each["ratio"] - (each["ratio"] if each[end] is None else each[end])) for each in found] for end in ("low", "high"))
                levels, values = [each["concurrency"] for each in found], [each["ratio"] for each in found]
                panel.errorbar(levels, values, yerr=[below, above], marker="o", capsize=3, label=name, color=f"C{place}")
        panel.set_title(f"{title}\nagainst {against}")
    for panel in panels:
        panel.set_xscale("log", base=2)
        levels = [each["concurrency"] for each in result["settings"]["levels"]]
        panel.set_xticks(levels, [str(level) for level in levels])
        panel.minorticks_off()
        panel.set_xlabel("requests at a time")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()


def _draw_swap(panels: "list[Axes]", result: Mapping[str, Any]) -> None:
    """Each move's time to the first token of the new version, and the longest gaps of other streams around it and right before it."""
    for known, label, colour in ((True, "was loaded", "C0"), (False, "fetched and loaded for it", "C1"), (None, "", "C2")):
        points = [(move["number"] + 1, move["first_token_seconds"]) for move in result["moves"] if move["was_loaded"] is known]
        if points:
            panels[0].plot([number for number, _ in points], [seconds for _, seconds in points], "o", label=label or None, color=colour)
    panels[0].set_title("alias set to first token\nof the new version, s")
    for key, label, colour in (("gap_around_ms", "around the move", "C0"), ("gap_between_ms", "right before it", "0.6")):
        points = [(move["number"] + 1, move[key]) for move in result["moves"] if move[key] is not None]
        panels[1].plot([number for number, _ in points], [gap for _, gap in points], "o", label=label, color=colour)
    panels[1].set_title("longest gap in a stream, ms")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", integer=True)
        panel.set_xlabel("move")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()


def _draw_train(panel: "Axes", result: Mapping[str, Any]) -> None:
    """Every timed step of every training, side by side."""
    for place, arm in enumerate(result["settings"]["arms"]):
        for training in (each for each in result["trainings"] if each["arm"] == arm):
            steps, label = training["step_seconds"], arm if training["round"] == 0 else None
            panel.plot(range(1, len(steps) + 1), steps, marker=".", label=label, color=f"C{place}", alpha=0.7)
    panel.set_title("seconds a step")
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="x", integer=True)
    panel.set_xlabel("timed step")
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
