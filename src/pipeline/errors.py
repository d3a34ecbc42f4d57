"""Errors that a user can act on; each message says where, what is wrong and what to do.

TuneserveError                      exit code 1
├── InvalidInput    (+ ValueError)  exit code 2: a recipe, a dataset or an argument is wrong; carries every fault found
├── ProcessFailed   (+ RuntimeError)  a child process (training or a server) failed; names its log
├── RegistryError   (+ RuntimeError)  MLflow could not do, or does not hold, what was asked
├── AdapterInvalid  (+ ValueError)  an adapter folder is not what we accept
└── ServingError    (+ RuntimeError)  vLLM did not serve what it should
    └── VersionRefused                a replica does not serve a version; carries a code for programs
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the input: `file`, the dotted `path` inside it ('' for the file itself) and a `message` with the remedy."""

    file: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.path, self.message) if part)

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class TuneserveError(Exception):
    """Base of every error that tuneserve raises on purpose."""

    exit_code = 1


class InvalidInput(TuneserveError, ValueError):
    """The input is wrong; `faults` holds all that was found, not only the first."""

    exit_code = 2

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class ProcessFailed(TuneserveError, RuntimeError):
    """A child process failed; the message ends with its log's tail and names the log."""


class RegistryError(TuneserveError, RuntimeError):
    """MLflow could not do, or does not hold, what was asked."""


class AdapterInvalid(TuneserveError, ValueError):
    """An adapter folder is not what we accept."""


class ServingError(TuneserveError, RuntimeError):
    """vLLM did not serve what it should."""


class VersionRefused(ServingError):
    """A replica does not serve a version; `code` names the kind of reason in kebab-case, for status and metrics."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)
