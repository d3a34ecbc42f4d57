"""A closed loop of streamed requests: so many at a time, the next as soon as one has ended, and when each one's parts came."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from pipeline.bench.questions import Question
from pipeline.serving.settings import KEEP_ALIVE_SECONDS

ANSWER_SECONDS = 300.0
"""Between two parts of an answer, waiting in the server's queue included."""
CONNECT_SECONDS = 10.0
TEMPERATURE = 1.0
"""Answers that are drawn, as a shop's are; a greedy one with ignore_eos may end in one token over and over."""
MAX_ERROR_CHARACTERS = 300


@dataclass
class Answer:
    """One request, filled in while its answer streams. Times are `time.perf_counter` seconds."""

    model: str
    kind: str
    sent: float = 0.0
    first: float | None = None
    """When the first part with text came."""
    parts: list[float] = field(default_factory=list)
    """When each part of the answer came, from the first with text on: one token, or a few where the server is faster than its stream."""
    end: float = 0.0
    """When it was over, well or not; 0 while it streams."""
    answered_by: str | None = None
    """What the answer calls its model."""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return bool(self.end) and self.error is None


def chat_body(model: str, question: Question, answer_tokens: int) -> bytes:
    """A streamed request whose answer has exactly `answer_tokens` tokens on servers that know vLLM's ignore_eos."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": TEMPERATURE}
    return json.dumps({"model": model, "messages": question.messages, "max_tokens": answer_tokens, **options}).encode()


@asynccontextmanager
async def connections(headers: Mapping[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """For requests that are timed. Meanwhile Python's garbage collector leaves alone what was there before: to go through all that a command has imported takes 90 ms, which would be taken for a
    gap in every stream.
    """
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers}
    async with httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=False) as http:
        gc.collect()
        gc.freeze()
        try:
            yield http
        finally:
            gc.unfreeze()


async def ask(http: httpx.AsyncClient, url: str, body: bytes, answer: Answer) -> None:
    """Sends a chat request to the server at `url` and fills in its `answer`; what goes wrong stands in its `error`. Nothing is asked again."""
    answer.sent = time.perf_counter()
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", content=body) as response:
            if response.status_code == httpx.codes.OK:
                answer.error = await _read(response, answer)
            else:
                said = (await response.aread()).decode("utf-8", "replace")
                answer.error = f"HTTP {response.status_code}: {said[:MAX_ERROR_CHARACTERS]}"
    except (httpx.HTTPError, ValueError, TypeError, LookupError, AttributeError) as error:  # the last four: a part that is no answer's
        answer.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
    answer.end = time.perf_counter()


async def _read(response: httpx.Response, answer: Answer) -> str | None:
    """Reads a stream of server-sent events to its end, so that the connection can be used again; what is wrong with it, or None."""
    rest, done, error = b"", False, None
    async for received in response.aiter_raw():
        now = time.perf_counter()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            done = done or data == b"[DONE]"
            if data and line.startswith(b"data:") and not done:
                error = error or _take(json.loads(data), now, answer)
    return error or (_fault(answer) if done else "the stream ended early")


def _take(part: Mapping[str, Any], now: float, answer: Answer) -> str | None:
    """One part of a stream; the error that it tells of, if it does."""
    if "error" in part:
        return str(part["error"])[:MAX_ERROR_CHARACTERS]
    if usage := part.get("usage"):
        answer.prompt_tokens, answer.answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if choices := part.get("choices"):
        delta = choices[0].get("delta") or {}
        if answer.first is None and (delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")):
            answer.answered_by = part.get("model")
            answer.first = now
        if answer.first is not None:
            answer.parts.append(now)
    return None


def _fault(answer: Answer) -> str | None:
    if answer.first is None:
        return "the answer has no text"
    if not answer.answer_tokens:
        return "the stream does not say how many tokens it has (stream_options.include_usage)"
    return None


async def closed_loop(
    http: httpx.AsyncClient, url: str, models: Sequence[str], asked: Sequence[Question], concurrency: int, answer_tokens: int
) -> list[Answer]:
    """The answers to all questions, in order: request i asks `models[i % len(models)]`. Bodies are made before the first is sent."""
    bodies = [chat_body(models[place % len(models)], question, answer_tokens) for place, question in enumerate(asked)]
    answers = [Answer(models[place % len(models)], question.kind) for place, question in enumerate(asked)]
    waiting = iter(range(len(asked)))

    async def client() -> None:
        for place in waiting:
            await ask(http, url, bodies[place], answers[place])

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(asked)))))
    return answers
