"""Requests as clients send them. Run as a program it is a load of closed-loop clients in a process of its own, so that measuring does not disturb what is measured:
`python -m tests.acceptance.load PLAN OUT` appends one JSON line to OUT for each answer, until SIGTERM; then every request under way still ends."""

import asyncio
import contextlib
import functools
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx

from pipeline.dataset import read_examples
from pipeline.evaluation import openai_messages
from pipeline.project import Project

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
END_SECONDS = 90.0
"""The longest that a request may take, and so that a load may take to end."""
Body = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Who asks what. Each client asks `models` in turn, one question after the other."""

    url: str
    models: tuple[str, ...] = ("catalog",)
    clients: int = 8
    max_tokens: int = 24
    streaming: float = 0.5
    """Share of requests that are streamed."""
    ignore_eos: bool = False
    """Answers of exactly max_tokens."""
    pause_seconds: float = 0.0
    """Between an answer and the next question."""
    rounds: int | None = None
    """Requests of each client; None: until SIGTERM."""


@dataclass(frozen=True)
class Answer:
    """One request and what became of it; times are unix seconds."""

    asked: str
    start: float
    first: float | None
    """When a streamed answer's first text came."""
    end: float
    status: int
    """0 when there was no HTTP answer, or it broke off."""
    models: tuple[str, ...]
    """What the answer calls its model; one name, unless its parts disagree."""
    finish: str | None
    error: str | None

    @property
    def ok(self) -> bool:
        """Answered in full, by one version."""
        return self.status == httpx.codes.OK and self.error is None and self.finish in ("stop", "length") and len(self.models) == 1

    @property
    def model(self) -> str:
        return self.models[0] if self.models else ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@functools.cache
def questions() -> tuple[list[Body], ...]:
    """The chat messages of every held-out question of the catalog, each with its image."""
    return tuple(openai_messages(example) for example in read_examples(ROOT / "data/catalog/eval.jsonl", Project(ROOT)))


async def ask(http: httpx.AsyncClient, body: Body, headers: Mapping[str, str]) -> Answer:
    """The answer to one chat request; a transport error is an answer with status 0."""
    start = time.time()
    parts = Parts()
    content = json.dumps(body).encode()
    try:
        async with http.stream("POST", CHAT, content=content, headers={"Content-Type": "application/json", **headers}) as response:
            parts.status = response.status_code
            if response.status_code != httpx.codes.OK:
                parts.error = (await response.aread()).decode("utf-8", "replace")[:300]
            elif body.get("stream"):
                async for line in response.aiter_lines():
                    parts.take(line)
                parts.error = parts.error or (None if parts.done else "the stream ended early")
            else:
                parts.merge(json.loads(await response.aread()))
    except (httpx.HTTPError, ValueError) as error:
        parts.status, parts.error = 0, repr(error)
    return Answer(body["model"], start, parts.first, time.time(), parts.status, tuple(sorted(parts.models)), parts.finish, parts.error)


class Parts:
    """What was received of one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.first: float | None = None
        self.models: set[str] = set()
        self.finish: str | None = None
        self.error: str | None = None
        self.done = False

    def take(self, line: str) -> None:
        """A line of a stream of server-sent events."""
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
        elif data != line:
            self.first = self.first or time.time()
            self.merge(json.loads(data))

    def merge(self, answer: Body) -> None:
        if "error" in answer:
            self.error = str(answer["error"])[:300]
            return
        self.models.add(answer["model"])
        for choice in answer["choices"]:
            self.finish = choice.get("finish_reason") or self.finish


def ask_all(url: str, requests: Sequence[tuple[Body, Mapping[str, str]]], clients: int = 8) -> list[Answer]:
    """The answers to chat requests (body, headers), in order, `clients` at a time."""
    return asyncio.run(_ask_all(url, requests, clients))


async def _ask_all(url: str, requests: Sequence[tuple[Body, Mapping[str, str]]], clients: int) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for number, (body, headers) in waiting:
            answers[number] = await ask(http, body, headers)

    async with connections(url) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return [answer for answer in answers if answer]


def post_all(url: str, path: str, posts: Sequence[tuple[bytes, Mapping[str, str]]], clients: int = 8) -> list[int]:
    """The statuses of the answers to raw POSTs (body, headers), in order, `clients` at a time; 0 where there was none."""
    return asyncio.run(_post_all(url, path, posts, clients))


async def _post_all(url: str, path: str, posts: Sequence[tuple[bytes, Mapping[str, str]]], clients: int) -> list[int]:
    statuses = [0] * len(posts)
    waiting = iter(enumerate(posts))

    async def client(http: httpx.AsyncClient) -> None:
        for number, (body, headers) in waiting:
            with contextlib.suppress(httpx.TransportError):
                statuses[number] = (await http.post(path, content=body, headers=headers)).status_code

    async with connections(url) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return statuses


def connections(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)  # the server closes an idle one after 5 s, perhaps just when it is used again
    return httpx.AsyncClient(base_url=url, timeout=END_SECONDS, trust_env=False, limits=limits)


def request_body(plan: Plan, model: str, dice: random.Random) -> Body:
    body: Body = {"model": model, "messages": dice.choice(questions()), "max_tokens": plan.max_tokens, "temperature": 0}
    return body | {"stream": dice.random() < plan.streaming} | ({"ignore_eos": True} if plan.ignore_eos else {})


async def run(plan: Plan, out: TextIO) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def client(http: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(number)
        for turn in itertools.count() if plan.rounds is None else range(plan.rounds):
            if stop.is_set():
                return
            answer = await ask(http, request_body(plan, plan.models[(number + turn) % len(plan.models)], dice), {})
            out.write(json.dumps(asdict(answer)) + "\n")
            if plan.pause_seconds or answer.status == 0:  # one that is refused at once must not keep a core busy
                await asyncio.sleep(plan.pause_seconds or 0.2)

    async with connections(plan.url) as http:
        await asyncio.gather(*(client(http, number) for number in range(plan.clients)))


@dataclass(frozen=True)
class Load:
    """A running load."""

    process: subprocess.Popen[bytes]
    out: Path

    def answers(self) -> list[Answer]:
        """Every answer so far."""
        lines = self.out.read_text("utf-8").splitlines(keepends=True)
        return [read_answer(line) for line in lines if line.endswith("\n")]  # the last one may be half written

    def wait_for(self, count: int, seconds: float) -> None:
        """Returns once there are `count` answers; fails if the load has ended, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while (got := len(self.answers())) < count:
            assert self.process.poll() is None, f"the load ended with {got} answers"
            assert time.monotonic() < deadline, f"{got} answers after {seconds:.0f} s, wanted {count}"
            time.sleep(0.5)

    def stop(self) -> list[Answer]:
        """Ends the load, once every request under way is answered; all its answers."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.ended()

    def ended(self) -> list[Answer]:
        """All answers of a load that ends by itself."""
        assert self.process.wait(timeout=2 * END_SECONDS) == 0
        return self.answers()


def read_answer(line: str) -> Answer:
    fields = json.loads(line)
    return Answer(**fields | {"models": tuple(fields["models"])})


@contextlib.contextmanager
def loading(plan: Plan, folder: Path) -> Iterator[Load]:
    """A load by `plan` while the block runs, its files in `folder`. The first answer is there when the block begins, if the plan has no end of its own."""
    stem = f"load-{time.time_ns()}"
    out, plan_file = folder / f"{stem}.jsonl", folder / f"{stem}.plan"
    plan_file.write_text(json.dumps(asdict(plan)), "utf-8")
    out.touch()
    load = Load(subprocess.Popen([sys.executable, "-m", "tests.acceptance.load", str(plan_file), str(out)], cwd=ROOT), out)
    try:
        if plan.rounds is None:
            load.wait_for(1, seconds=60)
        yield load
    finally:
        if load.process.poll() is None:
            load.process.terminate()
            try:
                load.process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                load.process.kill()
                load.process.wait()


def main() -> None:
    plan_file, out = map(Path, sys.argv[1:])
    fields = json.loads(plan_file.read_text("utf-8"))
    questions()
    with out.open("a", buffering=1, encoding="utf-8") as lines:
        asyncio.run(run(Plan(**fields | {"models": tuple(fields["models"])}), lines))


if __name__ == "__main__":
    main()
