"""Work on many small things in parallel: one process per CPU that we may use, results in order, a bounded number of things under way."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.errors import TuneserveError

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 16
"""Things handed over at a time: enough that handing over costs little, few enough that large images do not all go to one worker."""
FEW = 256
"""Small things not worth starting processes for."""


class Workers:
    """Processes that start with the first work that is worth it."""

    def __init__(self) -> None:
        self._count = len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def map(self, function: Callable[[Sequence[T]], list[R]], things: Sequence[T], small: bool = True) -> Iterator[R]:
        """The result for each thing, in order; `function` does a chunk and must be importable by name. Few things that are `small` are done right here.

        Raises TuneserveError if a worker dies, as it does when memory runs out.
        """
        chunks = (things[start : start + CHUNK] for start in range(0, len(things), CHUNK))
        if (small and len(things) <= FEW) or self._count == 1:
            for chunk in chunks:
                yield from function(chunk)
            return
        # spawn: this process may have threads (Prefect's), which a fork would cut in half
        self._pool = self._pool or ProcessPoolExecutor(self._count, multiprocessing.get_context("spawn"), _begin)
        under_way: deque[Future[list[R]]] = deque()
        try:
            for chunk in chunks:
                under_way.append(_submitted(self._pool, function, chunk))
                if len(under_way) > 2 * self._count:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        except BrokenProcessPool as error:
            raise TuneserveError("a worker process died, most likely because memory ran out; free some, or make the largest images smaller") from error

    def end(self, at_once: bool) -> None:
        """Ends the processes; `at_once` whatever they are at."""
        if self._pool:
            if at_once:
                for child in set(multiprocessing.active_children()) - self._others:
                    child.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, function: Callable[[Sequence[T]], list[R]], chunk: Sequence[T]) -> Future[list[R]]:
    """Raises BrokenProcessPool if a worker has died; also if it does so, and the pool's pipes are closed, at the very moment when another is started for this chunk."""
    try:
        return pool.submit(function, chunk)
    except OSError as error:
        raise BrokenProcessPool(str(error)) from error


def _begin() -> None:
    """Runs first in each worker: Ctrl-C is the parent's to handle, and a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def workers() -> Iterator[Workers]:
    """Workers for the block; however it ends, they end with it."""
    hired = Workers()
    try:
        yield hired
    except BaseException:
        hired.end(at_once=True)
        raise
    hired.end(at_once=False)
