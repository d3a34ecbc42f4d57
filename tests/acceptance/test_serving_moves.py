"""50 alias moves by polling alone, then 50 by `tuneserve promote`, under load: how soon the new version answers, what no request notices, and what it costs."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.registry import Version
from tests.acceptance.figures import interval, percentile, show
from tests.acceptance.load import Answer, Plan, loading
from tests.acceptance.serving_environment import Server, World, engine_name

MOVES = 50
REQUESTS = 5_000
POLLING_SECONDS, PROMOTE_SECONDS = 1.6, 0.8
PAUSE_SECONDS, PAUSE_BESIDE_COMMAND_SECONDS = 0.5, 1.0
"""Of each client between an answer and its next question. Without, eight clients alone fill two cores, and a move's first answer says how long answers take that wait for one another
(p95 1.6 s); longer while the command runs, which takes of the same cores and in production is on another host."""
NICE = 10
BEFORE, AFTER = 0.5, 1.6
"""Seconds around a move: requests that start in them may be under way while the replica looks, fetches, verifies and flips."""


@dataclass(frozen=True)
class Move:
    """`set_at`: when MLflow had set the alias; it did so after `began`. Unix seconds."""

    version: Version
    began: float
    set_at: float


def by_hand(world: World, version: Version) -> Move:
    return Move(version, *world.set_alias(version))


def move_all(move: Callable[[Version], Move], versions: tuple[Version, Version], pause: tuple[float, float], dice: random.Random) -> list[Move]:
    """MOVES moves to and fro, the pauses between them drawn anew each time, so that they meet the polls in every phase."""
    moves = []
    for number in range(MOVES):
        moves.append(move(versions[number % 2]))
        time.sleep(dice.uniform(*pause))
    return moves


def delays(moves: list[Move], until: float, answers: list[Answer]) -> list[float]:
    """For each move the seconds from the alias to the end of the first answer by the new version."""
    found = []
    for move, following in zip(moves, [*(move.began for move in moves[1:]), until], strict=True):
        ends = [answer.end for answer in answers if answer.model == engine_name(move.version) and move.set_at <= answer.end <= following]
        assert ends, f"nothing was answered by {move.version.label} between {move.set_at} and {following}"
        found.append(min(ends) - move.set_at)
    return found


def untimely(moves: list[Move], answers: list[Answer]) -> list[Answer]:
    """Answers by a version that was champion at no instant from their start minus 1.6 s to their end. `moves` begins with the first champion of all."""
    ends = [*(move.set_at for move in moves[1:]), float("inf")]
    periods = [(engine_name(move.version), move.began, end) for move, end in zip(moves, ends, strict=True)]
    return [answer for answer in answers if not any(name == answer.model and began <= answer.end and end >= answer.start - 1.6 for name, began, end in periods)]


def around_and_between(moves: list[Move], answers: list[Answer], dice: random.Random) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each move but the last the latencies around it, and of equally many requests between it and the next."""
    pairs = []
    for move, following in itertools.pairwise(moves):
        near = [answer.seconds for answer in answers if move.set_at - BEFORE <= answer.start <= move.set_at + AFTER]
        far = [answer.seconds for answer in answers if move.set_at + AFTER < answer.start < following.set_at - BEFORE]
        count = min(len(near), len(far))
        pairs.append((np.array(dice.sample(near, count)), np.array(dice.sample(far, count))))
    return pairs


def cost(moves: list[Move], answers: list[Answer], dice: random.Random) -> dict[str, float | int]:
    """p99 around moves against p99 between them, and the interval of their ratio, moves drawn with replacement."""
    pairs = around_and_between(moves, answers, dice)

    def p99s(drawn: np.ndarray) -> tuple[float, float]:
        return tuple(percentile(np.concatenate([pairs[index][side] for index in drawn]), 99) for side in (0, 1))

    def ratio(drawn: np.ndarray) -> float:
        near, far = p99s(drawn)
        return near / far

    near, far = p99s(np.arange(len(pairs)))
    low, high = interval(len(pairs), ratio)
    samples = sum(len(pair[0]) for pair in pairs)
    return {"samples": samples, "p99_around": near, "p99_between": far, "ratio": near / far, "ratio_low": low, "ratio_high": high}


def promoting(world: World, server: Server) -> Callable[[Version], Move]:
    """By a command that takes only what the servers leave of this machine's cores, as one on another host takes none: its four seconds of imports would fill one of two."""

    def promote(version: Version) -> Move:
        argv = [sys.executable, "-m", "pipeline.cli", "promote", version.label, "--force", "--json", "--replica", server.url]
        environment = world.sandbox.environment | {"MLFLOW_TRACKING_URI": world.mlflow}
        with subprocess.Popen(argv, cwd=world.sandbox.root, env=environment, stdout=subprocess.PIPE, start_new_session=True) as command:
            os.setpriority(os.PRIO_PROCESS, command.pid, NICE)
            with contextlib.suppress(OSError):
                Path(f"/proc/{command.pid}/autogroup").write_text(str(NICE), "utf-8")  # Linux weighs sessions first, where it is configured so
            try:
                out, _ = command.communicate(timeout=120)
            except BaseException:
                command.kill()
                raise
        assert command.returncode == 0
        at = json.loads(out.splitlines()[-1])["alias_set_at"]
        return Move(version, at, at)

    return promote


def test_fifty_moves_by_polling_and_fifty_by_promote_under_load(world: World, second: Version, tmp_path: Path) -> None:
    dice = random.Random(7)
    with world.serving("moves", follow=["catalog"]) as server:
        by_hand(world, world.trained)
        server.wait_live(world.trained)
        first = by_hand(world, second)  # both are loaded, as when an alias goes to and fro; a version that must be fetched first takes its load time longer
        server.wait_live(second)
        with loading(Plan(server.url, pause_seconds=PAUSE_SECONDS), tmp_path) as load:
            load.wait_for(100, seconds=120)
            polled = move_all(lambda version: by_hand(world, version), (world.trained, second), (3.5, 4.5), dice)
            answers = load.stop()
        until = time.time()
        with loading(Plan(server.url, pause_seconds=PAUSE_BESIDE_COMMAND_SECONDS), tmp_path) as load:
            load.wait_for(20, seconds=120)
            promoted = move_all(promoting(world, server), (world.trained, second), (1.5, 2.5), dice)
            load.wait_for(max(0, REQUESTS - len(answers)), seconds=1200)
            answers += load.stop()
    failed = [answer for answer in answers if not answer.ok]
    polling, through_promote = delays(polled, until, answers), delays(promoted, time.time(), answers)
    late = untimely([first, *polled, *promoted], [answer for answer in answers if answer.ok])
    costs = {"polling": cost(polled, answers, dice), "promote": cost(promoted, answers, dice)}
    show(
        requests=len(answers),
        failed=len(failed),
        untimely=len(late),
        polling={"moves": len(polling), "p50": percentile(polling, 50), "p95": percentile(polling, 95), "max": max(polling)},
        promote={"moves": len(through_promote), "p50": percentile(through_promote, 50), "p95": percentile(through_promote, 95), "max": max(through_promote)},
        alias_call_p50=percentile([move.set_at - move.began for move in polled], 50),
        cost=costs,
    )
    assert len(answers) >= REQUESTS and failed == []
    assert late == []
    assert percentile(polling, 95) <= POLLING_SECONDS
    assert percentile(through_promote, 95) <= PROMOTE_SECONDS
    assert costs["polling"]["ratio"] <= 2  # not asserted for promote: the command's own start takes a core, before its move
