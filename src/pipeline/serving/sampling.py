"""Keeps a share of the answered requests, for people to judge: what went over HTTP is handed to a process of its own (sample_writer.py), which reads, redacts and writes it.

On the event loop a sampled request costs references to its bytes, no other request anything. What cannot be handed over at once is dropped and counted.
"""

import contextlib
import json
import logging
import queue
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import IO, Literal, cast, get_args

from starlette.types import Message

from pipeline.errors import ServingError
from pipeline.serving.settings import SamplingSettings
from pipeline.serving.traffic import Request

Outcome = Literal["kept", "redacted", "unusable", "full", "failed", "busy", "too-large"]
"""kept; left out by the redaction hook; nothing to learn from (tools, remote pictures, broken off); no room on the disk's share; the writer failed; too many at a time; too long."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SAMPLED_PATH = "/v1/chat/completions"
MAX_WAITING = 64
"""Exchanges that wait for the writer."""
MAX_BYTES = 32 * 2**20
"""Of one request and its answer."""
MAX_HELD_BYTES = 256 * 2**20
"""Of all that are being recorded or wait."""
START_SECONDS = 30.0
"""Until the writer has loaded the redaction hook."""
RESTART_SECONDS = 60.0
"""Between two starts of a writer that ends by itself."""
READY = "ready"

logger = logging.getLogger("vllm.tuneserve")


@dataclass(frozen=True)
class Exchange:
    """A request and its whole answer. `at`: unix time of its arrival; `size`: bytes of both."""

    name: str
    at: float
    body: tuple[bytes, ...]
    answer: tuple[bytes, ...]
    size: int


class Sampler:
    """Chooses requests and hands their exchanges over. `begin` and what it returns are for the event loop alone; `count` is called from any thread."""

    def __init__(self, settings: SamplingSettings, count: Callable[[Outcome], None]) -> None:
        self._settings, self.count = settings, count
        self._waiting: queue.Queue[Exchange] = queue.Queue(MAX_WAITING)
        self._held = 0
        """Bytes taken by the event loop, less those that it let go itself."""
        self._released = 0
        """Those of `_held` that the thread is done with; each of the two is written on one thread only."""
        self._writer: Writer | None = None
        self._started = 0.0

    def start(self) -> None:
        """Starts writer and thread. Raises ServingError if the redaction hook cannot be loaded or the folder not be used."""
        if fault := self._start_writer():
            raise ServingError(f"sampling: {fault}")
        threading.Thread(target=self._work, name="tuneserve samples", daemon=True).start()

    def begin(self, path: str) -> "Recording | None":
        """A recording of the request that begins, if it is one of the share."""
        return Recording(self) if path == SAMPLED_PATH and random.random() < self._settings.share else None

    def hold(self, size: int) -> bool:
        """Whether so many bytes more may be held; then they are."""
        if self._held - self._released + size > MAX_HELD_BYTES:
            return False
        self._held += size
        return True

    def let_go(self, size: int) -> None:
        self._held -= size

    def offer(self, exchange: Exchange) -> None:
        try:
            self._waiting.put_nowait(exchange)
        except queue.Full:
            self.let_go(exchange.size)
            self.count("busy")

    def _work(self) -> None:
        while True:
            exchange = self._waiting.get()
            try:
                outcome = self._hand_over(exchange)
            except Exception:  # the thread must outlive whatever one exchange brings
                logger.exception("sample not written")
                outcome = "failed"
            self._released += exchange.size
            self.count(outcome)

    def _hand_over(self, exchange: Exchange) -> Outcome:
        """What the writer made of it."""
        if self._writer is None and (time.monotonic() - self._started < RESTART_SECONDS or self._start_writer()):
            return "failed"
        said = self._writer.take(exchange) if self._writer else ""
        for outcome in OUTCOMES:
            if said == outcome:
                return outcome
        logger.error("the writer of samples ended; it is started again after %.0f s", RESTART_SECONDS)
        self._end_writer()
        return "failed"

    def _start_writer(self) -> str | None:
        """Why it could not be started; None if it runs."""
        self._started = time.monotonic()
        self._writer = Writer(self._settings)
        if (said := self._writer.first_word()) == READY:
            return None
        self._end_writer()
        return said or "its writer ended at once; look at the server's log"

    def _end_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            writer.end()


class Writer:
    """The process that writes samples (sample_writer.py): takes one exchange at a time and says what became of it."""

    def __init__(self, settings: SamplingSettings) -> None:
        command = [sys.executable, "-m", "pipeline.serving.sample_writer", settings.model_dump_json()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stdin, self._stdout = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)

    def first_word(self) -> str:
        """READY, or why it cannot write."""
        if select.select([self._stdout], [], [], START_SECONDS)[0]:
            return self._word()
        return f"its writer said nothing for {START_SECONDS:.0f} s"

    def take(self, exchange: Exchange) -> str:
        """What became of it; '' if the process is gone."""
        sizes = {"body": sum(map(len, exchange.body)), "answer": sum(map(len, exchange.answer))}
        try:
            self._stdin.write(json.dumps({"name": exchange.name, "at": exchange.at, **sizes}).encode() + b"\n")
            self._stdin.writelines((*exchange.body, *exchange.answer))
            self._stdin.flush()
            return self._word()
        except OSError:
            return ""

    def _word(self) -> str:
        return self._stdout.readline().decode().strip()

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()


class Recording:
    """What goes over HTTP for one request. Never raises, changes nothing of it."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._body: list[bytes] = []
        self._answer: list[bytes] = []
        self._size = 0
        self._dropped: Outcome | None = None

    def heard(self, message: Message) -> None:
        """A message from the client."""
        if message["type"] == "http.request":
            self._add(self._body, message.get("body", b""))

    def said(self, message: Message) -> None:
        """A message to the client."""
        if message["type"] == "http.response.body":
            self._add(self._answer, message.get("body", b""))

    def _add(self, parts: list[bytes], part: bytes) -> None:
        if self._dropped or not part:
            return
        if self._size + len(part) > MAX_BYTES or not self._sampler.hold(len(part)):
            self._dropped = "too-large" if self._size + len(part) > MAX_BYTES else "busy"
            self._forget()
            return
        parts.append(part)
        self._size += len(part)

    def _forget(self) -> None:
        self._sampler.let_go(self._size)
        self._body, self._answer, self._size = [], [], 0

    def end(self, request: Request, status: int) -> None:
        """Hands it over if an adapter answered under its model's name. What was asked by a version's number is not users' traffic but an evaluation's."""
        if status != HTTPStatus.OK or request.lora_id is None or not request.by_name:
            self._forget()
        elif self._dropped:
            self._sampler.count(self._dropped)
        else:
            self._sampler.offer(Exchange(request.served, request.arrived_wall, tuple(self._body), tuple(self._answer), self._size))
