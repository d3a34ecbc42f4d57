"""Twenty promotions of different versions from two processes, and the alias moved by hand in between: one history, one champion, and every loser told why.

One process promotes by force; the other asks the gate, whose comparisons are void when the champion has changed meanwhile.
"""

import itertools
import multiprocessing
import subprocess
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.acceptance.figures import show
from tests.acceptance.serving_environment import World, engine_name, wait_until
from tests.acceptance.test_gate_kill import few_rows

MODEL = "crowd"
PROMOTIONS = 20
AT_ONCE = 2
"""At once in each process."""
COMMAND_SECONDS = 900
"""Those that wait for the lock wait for all that are before them."""

Outcome = tuple[str, int, str]
"""Label, exit code and stderr of one `tuneserve promote`."""


def promote_all(world: World, labels: list[str], url: str, options: tuple[str, ...]) -> list[Outcome]:
    """What one of the processes does."""

    def promote(label: str) -> Outcome:
        done: subprocess.CompletedProcess[str] = world.run("promote", label, *options, "--replica", url, "--json", seconds=COMMAND_SECONDS)
        return label, done.returncode, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(promote, labels))


def history(world: World) -> list[dict[str, Any]]:
    """Newest first."""
    entries: list[dict[str, Any]] = world.json("history", MODEL, "--limit", "1000", "--json")["entries"]
    return entries


def test_twenty_promotions_from_two_processes_and_a_move_by_hand(world: World, tmp_path: Path) -> None:
    *versions, outside = world.variants(MODEL, [0.5 + number / 50 for number in range(PROMOTIONS + 1)], tmp_path)
    labels = [version.label for version in versions]
    with world.serving(MODEL, follow=[MODEL], forget_after_seconds=1) as server:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            ways = (("--force",), ("--recipe", few_rows(world)))
            running = [pool.submit(promote_all, replace(world), labels[number::2], server.url, way) for number, way in enumerate(ways)]  # open connections stay
            wait_until(lambda: len(world.registry.entries(MODEL)) >= PROMOTIONS // 3, COMMAND_SECONDS, "a third of the promotions", every=0.5)
            world.set_alias(outside)  # wherever the others are: if one is about to move the alias, that one fails
            assert not any(each.done() for each in running), "the move must fall in between"
            outcomes = [outcome for each in running for outcome in each.result()]
        told = history(world)
        champion = world.registry.champion(MODEL)
        assert champion is not None
        server.wait_live(champion)
        assert server.answering(MODEL) == engine_name(champion)

    assert all(newer["before"] == older["after"] for newer, older in itertools.pairwise(told)) and told[-1]["before"] is None, "history is linear"
    assert not any(entry["open"] for entry in told)
    assert told[0]["after"] == champion.version
    moved = [(entry["version"], entry["after"]) for entry in told if entry["action"] == "moved-outside"]
    assert moved == [(outside.version, outside.version)] and 0 < [entry["action"] for entry in told].index("moved-outside") < len(told) - 1

    won = sorted(label for label, code, _ in outcomes if code == 0)
    lost = {label: said for label, code, said in outcomes if code == 1}
    assert len(won) + len(lost) == len({label for label, _, _ in outcomes}) == PROMOTIONS, outcomes
    assert sorted(f"{MODEL}/{entry['version']}" for entry in told if entry["action"] == "promoted") == won
    assert all("tuneserve: " in said for said in lost.values()), lost
    kept_out = {f"{MODEL}/{entry['version']}": entry["reasons"] for entry in told if entry["action"] in ("failed", "kept", "refused")}
    assert kept_out.keys() == lost.keys() and all(kept_out.values()), kept_out
    show(
        script="concurrent promotions",
        promoted=len(won),
        lost={label: said.strip().splitlines()[-1] for label, said in lost.items()},
        entries=Counter(entry["action"] for entry in told),
        champion=champion.label,
        moved_by_hand=outside.label,
    )
