"""`tuneserve bench serve`: arms side by side against running servers, interleaved, so that what drifts hits all of them alike."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import httpx

from pipeline.bench.arms import Arm
from pipeline.bench.figures import Run, request_of
from pipeline.bench.load import closed_loop, connections
from pipeline.bench.questions import Mix, questions
from pipeline.bench.record import Record
from pipeline.errors import ServingError
from pipeline.progress import Report

WARM_UP = -1
"""The number of a round that is not kept."""


@dataclass(frozen=True)
class Load:
    """What every arm is asked. `levels` maps each concurrency to the requests of an arm in one round; `seed` makes the pictures."""

    levels: Mapping[int, int]
    rounds: int
    answer_tokens: int
    mix: Mix
    seed: int

    def plan(self, arms: Sequence[Arm]) -> list[tuple[int, int, Arm]]:
        """Every run as (round, concurrency, arm), in order: each round has every level, and each level its arms, to and fro (A B C, C B A, ...)."""
        return [(number, level, arm) for number in range(self.rounds) for level in self.levels for arm in (arms if number % 2 == 0 else arms[::-1])]


def measure(arms: Sequence[Arm], load: Load, headers: Mapping[str, str], record: Record, report: Report) -> None:
    """Warms every arm up at every concurrency, then measures by the load's plan; each run is a line of the `record` as soon as it is over.

    Raises ServingError if a whole run is not answered: what was measured until then is on record.
    """
    asyncio.run(_measure(arms, load, headers, record, report))


async def _measure(arms: Sequence[Arm], load: Load, headers: Mapping[str, str], record: Record, report: Report) -> None:
    warm_ups = [(level, arm, max(level, len(arm.models))) for level in load.levels for arm in arms]
    plan = load.plan(arms)
    total = sum(count for _, _, count in warm_ups) + sum(load.levels[level] for _, level, _ in plan)
    asked = 0
    async with connections(headers) as http:
        for level, arm, count in warm_ups:
            report(f"warming up {arm.name}, {level} at a time", asked / total)
            _refuse_unanswered(await _run(http, arm, level, WARM_UP, load, asked, count), arm)
            asked += count
        for number, level, arm in plan:
            report(f"round {number + 1} of {load.rounds}: {arm.name}, {level} at a time", asked / total)
            run = await _run(http, arm, level, number, load, asked, load.levels[level])
            asked += len(run.requests)
            record.add(run.as_dict())
            _refuse_unanswered(run, arm)


async def _run(http: httpx.AsyncClient, arm: Arm, level: int, number: int, load: Load, first: int, count: int) -> Run:
    """`first`: how many questions were asked before, so that none is asked twice."""
    asked = questions(load.mix, first, count, load.seed)
    answers = await closed_loop(http, arm.url, arm.models, asked, level, load.answer_tokens)
    began = min(answer.sent for answer in answers)
    seconds = max(answer.end for answer in answers) - began
    return Run(arm.name, level, number, round(seconds, 6), tuple(request_of(answer, began) for answer in answers))


def _refuse_unanswered(run: Run, arm: Arm) -> None:
    if not run.answered:
        raise ServingError(f"{arm.name}: none of {len(run.requests)} requests to {', '.join(arm.models)} at {arm.url} was answered: {run.requests[0].error}")


def settings_of(arms: Sequence[Arm], load: Load, against: str) -> dict[str, object]:
    """As the record's header has them."""
    return {
        "arms": [asdict(arm) for arm in arms],
        "against": against,
        "levels": [{"concurrency": level, "requests": requests} for level, requests in load.levels.items()],
        "rounds": load.rounds,
        "answer_tokens": load.answer_tokens,
        "mix": load.mix,
        "seed": load.seed,
        "planned_runs": len(load.plan(arms)),
    }
