"""The journal: one JSON object a line for each thing that tuneserve's commands do, in .tuneserve/logs/tuneserve.jsonl.

Modules write to it through the standard library: `logging.getLogger(__name__).info("alias moved", extra={"model": ..., "version": ...})`.
The message is the `event`; `model` is written as `name` (logging keeps that word for itself). `about` adds fields to all lines of a block.
No row, no credential and no text of a child process belongs in it.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from pipeline import process
from pipeline.errors import InvalidInput, TuneserveError

LOGGERS = ("pipeline", "flows")
FILE = "tuneserve.jsonl"
MAX_BYTES, BACKUPS = 5_000_000, 3
CREDENTIALS = re.compile(r"://(\S*)@")
"""What stands before the last @ of a URL: a password that nobody encoded may hold @ and / itself."""

_context: ContextVar[Mapping[str, object]] = ContextVar("journal", default=MappingProxyType({}))


@contextlib.contextmanager
def about(**fields: object) -> Iterator[None]:
    """Every line written in the block carries `fields` (run_id, version, ...): also from threads and tasks that copy the context."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def open_journal(logs: Path, **fields: object) -> None:
    """From now on this process's lines go to the journal in the folder `logs`, and nowhere else; each carries `fields`."""
    _context.set({**_context.get(), **fields})
    handler = JournalFile(logs / FILE)
    handler.setFormatter(formatter())
    handler.addFilter(_add_context)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(found, JournalFile) and found.path == handler.path for found in logger.handlers):
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # Prefect and MLflow print what reaches the root


def write_to_stderr(logger: logging.Logger) -> None:
    """Has `logger` print its records as such lines: for servers, whose stderr is their log."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter())
    logger.handlers, logger.propagate = [handler], False


class Lines(JsonFormatter):
    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """`time`, `level` and `event` first. A record whose `extra` names its event keeps its text as `message`."""
        message = without_credentials(log_data.pop("message"))
        log_data = {key: _clean(value) for key, value in log_data.items()}
        texts = {"message": message} if "event" in log_data else {"event": message}
        ordered = {key: {**log_data, **texts}[key] for key in ("time", "level", "event")}
        return ordered | texts | log_data


def formatter() -> JsonFormatter:
    """A record as one JSON object: time (UTC, ISO 8601), level, event, pid and whatever `extra` and `about` gave."""
    renamed = {"levelname": "level", "process": "pid", "model": "name"}
    return Lines("%(levelname)s %(message)s %(process)d", rename_fields=renamed, timestamp="time", json_ensure_ascii=False)


def failure_fields(error: BaseException) -> dict[str, object]:
    """An error as fields: its class, and of our own the first line without credentials. What may quote rows is left out: faults of the input, others' errors.

    Our errors name a row by file and number; another program's words about it stand in a later line.
    """
    if isinstance(error, InvalidInput):
        return {"error": type(error).__name__, "faults": len(error.faults)}
    if not isinstance(error, TuneserveError):
        return {"error": type(error).__name__}
    return {"error": type(error).__name__, "reason": without_credentials(str(error).partition("\n")[0])[:500]}


def without_credentials(text: str) -> str:
    """`text` with no user nor password in its URLs; of one whose password was not encoded nothing follows, since libraries split it elsewhere and quote the parts."""
    for found in CREDENTIALS.finditer(text):
        if {"/", "@"} & set(found[1]):
            text = f"{text[: found.end()]}{text[found.end() :].partition(' ')[0].rstrip(':,;')} ..."
            break
    return CREDENTIALS.sub("://", text)


def _clean(value: object) -> object:
    if isinstance(value, str):
        return without_credentials(value)
    return [_clean(each) for each in value] if isinstance(value, (list, tuple)) else value


def _add_context(record: logging.LogRecord) -> bool:
    for key, value in _context.get().items():
        if not hasattr(record, key):
            setattr(record, key, value)
    return True


class JournalFile(RotatingFileHandler):
    """A bounded file that several processes append to: one writes or rotates at a time. A journal that cannot be written stops nobody."""

    def __init__(self, path: Path) -> None:
        self.path, self._complained = path, False
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8", delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with process.locked(self.path.with_name(f".{self.path.name}.lock")):
                self._reopen_if_rotated()
                super().emit(record)
        except OSError:
            self.handleError(record)

    def _reopen_if_rotated(self) -> None:
        """Another process may have given our open file a backup's name."""
        if self.stream is not None and not (self.path.exists() and self.path.samefile(f"/proc/self/fd/{self.stream.fileno()}")):
            self.stream.close()
            self.stream = None  # as logging itself does: it opens anew at the next write

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            print(f"tuneserve: {self.path}: cannot be written ({sys.exc_info()[1]}); free the disk (tuneserve gc) or correct its rights", file=sys.stderr)
