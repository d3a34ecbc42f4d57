"""`tuneserve` in this process: all that `python -m pipeline.cli` does, but for the seconds in which a new process imports. Some tests, and e2e, start the process."""

import contextlib
import contextvars
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

from pipeline.cli import main
from pipeline.journal import LOGGERS

UNWANTED = {"PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "TUNESERVE_PROJECT"}


def command_environment(**environment: str) -> dict[str, str]:
    """This process's environment without what points to other projects and servers, and with `environment`."""
    return {key: value for key, value in os.environ.items() if key not in UNWANTED} | environment


def tuneserve(cwd: Path, *args: str, **environment: str) -> CompletedProcess[str]:
    """Exit code, stdout and stderr of the command in that folder."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _as_before(),
        contextlib.chdir(cwd),
        patch.dict(os.environ, command_environment(**environment), clear=True),
        patch.object(sys, "argv", ["tuneserve", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        contextvars.copy_context().run(main)
    code = ended.value.code
    assert isinstance(code, int)
    return CompletedProcess(args, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Signals and loggers are what they were once the block ends; a journal that was opened in it is closed."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for logger, handlers, level, propagate in before:
            for opened in set(logger.handlers) - set(handlers):
                opened.close()
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
