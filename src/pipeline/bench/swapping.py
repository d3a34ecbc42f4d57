"""`tuneserve bench swap`: how soon a version answers once the alias points to it, and what the streams beside it notice."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from pipeline.bench.figures import columns, request_of
from pipeline.bench.load import Answer, ask, chat_body, connections
from pipeline.bench.questions import Mix, question
from pipeline.bench.record import Record
from pipeline.errors import ServingError
from pipeline.progress import Report

FIRST_SECONDS = 60.0
"""How long a moved alias may take until the first token of its version; and how long each stream's first answer may."""
LOOK_SECONDS = 0.005
REFUSED_SECONDS = 0.2
"""A stream whose request failed waits so long: a server that refuses at once must not keep a core busy."""

MoveAlias = Callable[[str], tuple[float, float | None]]
"""Points the alias to a version by its label; when it was set (`time.perf_counter` seconds), and the seconds until every ready replica showed it, None if none was waited for."""


@dataclass(frozen=True)
class Target:
    """A version to move to: `label` is NAME/VERSION, `engine_name` what its answers call themselves."""

    label: str
    engine_name: str


@dataclass(frozen=True)
class Move:
    """One move and what came of it. Seconds since the alias was set: `first_token_seconds` until the first token of the new version in any stream, whose request was sent at
    `sent_seconds` (below 0: before). Gaps: the longest between two parts of one stream, from the call that moves the alias to that first token, and in as long a time right before the call;
    None where no stream was under way, or the move before reached into it. `was_loaded`: on the replicas, before; None if none could be asked.
    """

    number: int
    to: str
    was_loaded: bool | None
    first_token_seconds: float
    sent_seconds: float
    live_seconds: float | None
    gap_around_ms: float | None
    gap_between_ms: float | None


@dataclass(frozen=True)
class Plan:
    """`count` moves over `targets` in turn, `pause_seconds` and up to half as much again after each: then they meet the replicas' polls in every phase."""

    targets: tuple[Target, ...]
    count: int
    pause_seconds: float


class Streams:
    """Closed-loop clients in a thread with an event loop of its own, while the `with` block runs; they ask `models` in turn. `answers` grows meanwhile.

    Leaving the block by an error breaks their requests off; else each under way still ends.
    """

    def __init__(self, url: str, models: Sequence[str], count: int, answer_tokens: int, mix: Mix, seed: int, headers: Mapping[str, str]) -> None:
        self.url, self.models, self.count = url, tuple(models), count
        self.answers: list[Answer] = []
        self._answer_tokens, self._mix, self._seed, self._headers = answer_tokens, mix, seed, headers
        self._began = time.perf_counter()
        self._stop = threading.Event()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="streams", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if error is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])
        self._thread.join()

    def traffic(self) -> dict[str, Any]:
        """What became of the requests that are over, and these, as columns."""
        over = [answer for answer in self.answers if answer.end]
        failed = [answer.error for answer in over if answer.error is not None]
        requests = columns([request_of(answer, self._began) for answer in over])
        return {"ended": {"requests": len(over), "failed": len(failed), "first_error": failed[0] if failed else None}, "requests": requests}

    async def _run(self) -> None:
        self._loop, numbers = asyncio.get_running_loop(), itertools.count()
        async with connections(self._headers) as http:
            self._tasks = [asyncio.create_task(self._client(http, numbers)) for _ in range(self.count)]
            self._started.set()
            await asyncio.wait(self._tasks)

    async def _client(self, http: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        while not self._stop.is_set():
            number = next(numbers)
            asked = await asyncio.to_thread(question, self._mix, number, number, self._seed)  # making a picture must not hold up the clocks of the others
            answer = Answer(self.models[number % len(self.models)], asked.kind)
            body = chat_body(answer.model, asked, self._answer_tokens)
            self.answers.append(answer)
            await ask(http, self.url, body, answer)
            if answer.error is not None:
                await asyncio.sleep(REFUSED_SECONDS)


def measure(streams: Streams, move: MoveAlias, was_loaded: Callable[[str], bool | None], plan: Plan, record: Record, report: Report) -> None:
    """Moves the alias by the plan under running streams; each move is a line of the `record`, and the traffic is its last one, however this ends.

    Raises ServingError if the streams are not answered, or a version does not answer within FIRST_SECONDS.
    """
    dice = random.Random(plan.count)
    try:
        report("warming up", 0.0)
        _wait_warm(streams)
        before = time.perf_counter()
        time.sleep(plan.pause_seconds)
        for number in range(plan.count):
            target = plan.targets[number % len(plan.targets)]
            report(f"move {number + 1} of {plan.count}, to {target.label}", number / plan.count)
            loaded = was_loaded(target.label)
            under_way = max(0, len(streams.answers) - 2 * streams.count)
            called = time.perf_counter()
            set_at, live_seconds = move(target.label)
            first = _first_of(streams, target, set_at, under_way)
            over = first.first or set_at
            time.sleep(plan.pause_seconds * dice.uniform(1.0, 1.5))
            as_long_before = called - (over - called)
            between = longest_gap(streams.answers, as_long_before, called) if as_long_before >= before else None
            gaps = (longest_gap(streams.answers, called, over), between)
            found = Move(number, target.label, loaded, over - set_at, first.sent - set_at, live_seconds, *gaps)
            record.add({"move": {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(found).items()}})
            before = over
    finally:
        record.add(streams.traffic())


def _wait_warm(streams: Streams) -> None:
    """Returns once as many requests as there are streams were answered. Raises ServingError if as many fail first, or it takes too long."""
    deadline = time.perf_counter() + FIRST_SECONDS
    while True:
        over = [answer for answer in streams.answers if answer.end]
        if sum(answer.ok for answer in over) >= streams.count:
            return
        failed = [answer for answer in over if not answer.ok]
        if len(failed) >= streams.count:
            raise ServingError(f"{failed[0].model} at {streams.url} does not answer: {failed[0].error}")
        if time.perf_counter() > deadline:
            raise ServingError(
                f"{streams.url}: {len(over)} of {streams.count} first answers after {FIRST_SECONDS:.0f} s; use fewer --streams or --answer-tokens"
            )
        time.sleep(LOOK_SECONDS)


def _first_of(streams: Streams, target: Target, set_at: float, under_way: int) -> Answer:
    """The answer whose first token is the first of that version since `set_at`; requests before the number `under_way` are not looked at."""
    deadline = time.perf_counter() + FIRST_SECONDS
    while time.perf_counter() < deadline:
        found = [answer for answer in streams.answers[under_way:] if answer.first and answer.first >= set_at and answer.answered_by == target.engine_name]
        if found:
            return min(found, key=lambda answer: answer.first or 0.0)
        time.sleep(LOOK_SECONDS)
    raise ServingError(f"{target.label} answered nothing at {streams.url} within {FIRST_SECONDS:.0f} s after the alias was set; see why: tuneserve status")


def longest_gap(answers: Sequence[Answer], begin: float, end: float) -> float | None:
    """In ms, between two parts of one answer, of those gaps that reach into the time from `begin` to `end`; None if no answer was under way then."""
    gaps = []
    for answer in answers:
        parts = list(answer.parts)  # it may grow
        if parts and parts[-1] > begin and parts[0] < end:
            gaps += [after - before for before, after in itertools.pairwise(parts) if after > begin and before < end]
    return max(gaps) * 1000 if gaps else None


def seconds_of(moves: Sequence[Move]) -> dict[str, Any]:
    """From the alias to the first token of the new version; `sent_p50`: until the request that got it was sent, `live_p50`: until every ready replica showed it."""
    times = percentiles([move.first_token_seconds for move in moves])
    sent = percentiles([move.sent_seconds for move in moves])
    live = percentiles([move.live_seconds for move in moves if move.live_seconds is not None])
    return {"moves": len(moves), **times, "sent_p50": sent["p50"], "live_p50": live["p50"]}


def gaps_of(moves: Sequence[Move]) -> dict[str, dict[str, Any]]:
    """The longest gap of each move's time, and of the time right before it."""
    around = [move.gap_around_ms for move in moves if move.gap_around_ms is not None]
    between = [move.gap_between_ms for move in moves if move.gap_between_ms is not None]
    return {"around": {"windows": len(around), **percentiles(around)}, "between": {"windows": len(between), **percentiles(between)}}


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p95": None, "max": None}
    import numpy as np

    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": max(values)}


def read_move(said: Mapping[str, Any]) -> Move:
    """What a line of the record says."""
    return Move(**said)
