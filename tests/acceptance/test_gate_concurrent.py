"""Twenty promotions of different versions from two processes, and the alias moved by hand in between: one history, one champion, and every loser told why."""

import itertools
import multiprocessing
import subprocess
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.process import locked
from pipeline.promotion import lock_file
from pipeline.registry import Version
from tests.acceptance.figures import show
from tests.acceptance.serving_environment import World, engine_name, wait_until

MODEL = "crowd"
PROMOTIONS = 20
PROCESSES, AT_ONCE = 2, 2
"""At once in each process."""
COMMAND_SECONDS = 900
"""Those that wait for the lock wait for all that are before them."""

Outcome = tuple[str, int, str]
"""Label, exit code and stderr of one `tuneserve promote`."""


def promote_all(world: World, labels: list[str], url: str) -> list[Outcome]:
    """What one of the processes does."""

    def promote(label: str) -> Outcome:
        done: subprocess.CompletedProcess[str] = world.run("promote", label, "--force", "--replica", url, "--json", seconds=COMMAND_SECONDS)
        return label, done.returncode, done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(promote, labels))


def history(world: World) -> list[dict[str, Any]]:
    """Newest first."""
    entries: list[dict[str, Any]] = world.json("history", MODEL, "--limit", "1000", "--json")["entries"]
    return entries


def move_by_hand(world: World, version: Version) -> None:
    """Between two promotions: their lock is held, else the move might fall into one, which then fails and says so in its own entry."""
    with locked(lock_file(world.project, MODEL)):
        world.set_alias(version)


def test_twenty_promotions_from_two_processes_and_a_move_by_hand(world: World, tmp_path: Path) -> None:
    *versions, outside = world.variants(MODEL, [0.5 + number / 50 for number in range(PROMOTIONS + 1)], tmp_path)
    labels = [version.label for version in versions]
    with world.serving(MODEL, follow=[MODEL], forget_after_seconds=1) as server:
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(promote_all, replace(world), labels[number::PROCESSES], server.url) for number in range(PROCESSES)]  # open connections stay
            wait_until(lambda: len(world.registry.entries(MODEL)) >= PROMOTIONS // 3, COMMAND_SECONDS, "a third of the promotions", every=0.5)
            move_by_hand(world, outside)
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
    failed = {f"{MODEL}/{entry['version']}": entry["reasons"] for entry in told if entry["action"] == "failed"}
    assert failed.keys() <= lost.keys() and all(failed.values()), failed
    show(
        script="concurrent promotions",
        promoted=len(won),
        lost={label: said.strip().splitlines()[-1] for label, said in lost.items()},
        entries=Counter(entry["action"] for entry in told),
        champion=champion.label,
        moved_by_hand=outside.label,
    )
