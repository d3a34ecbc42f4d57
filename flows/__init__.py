"""Prefect flows: thin, the same plain functions that the command line runs."""

import contextlib
from collections.abc import Iterator

import click
from prefect import tags
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from pipeline import services
from pipeline.command import opened_project
from pipeline.project import Project, find_project
from pipeline.schedule import TAG

FLUSH_SECONDS = 3.0


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Sends what Prefect has queued when the block ends: its server may be ours, and end before this process does."""
    try:
        yield
    finally:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=FLUSH_SECONDS)


@contextlib.contextmanager
def at_work() -> Iterator[Project]:
    """The project, with what a command sets up around a flow where a worker started it: journal, caches kept, MLflow up. Within a command it is there already."""
    if click.get_current_context(silent=True):
        yield find_project()
        return
    with opened_project() as project, services.tracking(project), tags(TAG):  # on runs within this one, so that they are not left running if it is killed
        yield project
