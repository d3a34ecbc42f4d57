"""Prefect flows: thin, the same plain functions that the command line runs."""

import contextlib
from collections.abc import Iterator

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

FLUSH_SECONDS = 3.0


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Sends what Prefect has queued when the block ends: its server may be ours, and end before this process does."""
    try:
        yield
    finally:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=FLUSH_SECONDS)
