"""Progress of long work on stderr: a bar on a terminal, else a plain line now and then."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.journal import failure_fields

logger = logging.getLogger(__name__)
LINE_SECONDS = 10.0
"""At most one plain line in this time where stderr is not a terminal."""

Report = Callable[[str, float], None]
"""Called with a short text and the fraction done (0 to 1)."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """Yields a `Report`; shows `title`, the bar, the latest text and the time since the start. A stage in the journal."""
    with _journalled(title), _shown(title) as report:
        yield report


@contextlib.contextmanager
def _journalled(title: str) -> Iterator[None]:
    began = time.monotonic()
    logger.info("stage started", extra={"stage": title})
    try:
        yield
    except BaseException as error:
        logger.warning("stage failed", extra={"stage": title, "seconds": round(time.monotonic() - began, 3), **failure_fields(error)})
        raise
    logger.info("stage ended", extra={"stage": title, "seconds": round(time.monotonic() - began, 3)})


@contextlib.contextmanager
def _shown(title: str) -> Iterator[Report]:
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=1.0, text="")
            yield lambda text, fraction: bar.update(task, completed=fraction, text=text)
            bar.update(task, completed=1.0)
        return
    began = shown = time.monotonic()
    print(f"{title} ...", file=sys.stderr, flush=True)

    def line(text: str, fraction: float) -> None:
        nonlocal shown
        if time.monotonic() - shown >= LINE_SECONDS:
            shown = time.monotonic()
            print(f"{title}: {fraction:4.0%} {text} ({shown - began:.0f} s)", file=sys.stderr, flush=True)

    yield line
    print(f"{title}: done ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
