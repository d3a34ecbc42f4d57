"""Child processes that never outlive us: each runs under its own supervisor and lease, and writes to a log that errors name."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from pipeline.errors import ProcessFailed

GRACE_SECONDS = 4.0
"""From SIGTERM to SIGKILL; with the supervisor's poll this keeps the end of everything under 10 s."""

END_SECONDS = 30.0
"""What a command may take to end once its holders are dead."""
LEASE_VARIABLE = "TUNESERVE_LEASE"
"""In the environment of a command and of all that it starts: the path of its lease. By it what a killed supervisor left behind is found."""
EXCEPTION_LINE = re.compile(r"\b[A-Z]\w*(Error|Exception): .+")


@dataclass(frozen=True)
class Child:
    """A running command. `lease` is our share in its life: closing it (or dying) ends the command when no one else holds a share."""

    name: str
    log: Path
    lease: IO[bytes]
    supervisor: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        """The command's exit code (128 + signal if a signal ended it), or None while it or one of its descendants runs; negative if its supervisor was killed."""
        return self.supervisor.poll()

    def end(self) -> int:
        """Ends the command and all its descendants; returns its exit code once none is left. No effect on one that has ended."""
        if self.supervisor.poll() is None:
            self.supervisor.terminate()
        code = self.supervisor.wait()
        if code < 0:  # killed itself, it could end nothing
            end_orphans(self.lease.name)
        self.lease.close()
        return code

    def killed(self) -> bool:
        """Whether a signal ended the command or its supervisor: someone, or the kernel for want of memory, and not its own doing."""
        code = self.poll()
        return code is not None and (code < 0 or 128 < code < 128 + signal.NSIG)

    def failure(self, what: str) -> ProcessFailed:
        """The error for a command that went wrong: what, its exit code, the first error in its log and the log's end."""
        return failure(f"{what} (exit code {self.poll()})", self.log)


def new_lease(lease: Path) -> IO[bytes]:
    """Makes the file `lease` and takes a share in it."""
    lease.parent.mkdir(parents=True, exist_ok=True)
    file = lease.open("w+b")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def join_lease(lease: Path) -> IO[bytes]:
    """Takes a share in a lease that exists. Raises BlockingIOError or FileNotFoundError if its command is ending or has ended."""
    file = lease.open("r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        lease.stat()  # gone if the supervisor ended between our two steps
        return file
    except OSError:
        file.close()
        raise


def is_leased(lease: Path) -> bool:
    """Whether some process holds a share in the command of `lease`."""
    try:
        file = lease.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            pass
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False  # its supervisor is ending it


def supervised(lease_prefix: str) -> bool:
    """Whether a supervisor runs, or still ends, a command whose lease's path starts so."""
    return any(argument.startswith(lease_prefix) for found in psutil.process_iter(["cmdline"]) for argument in (found.info["cmdline"] or [])[:5])


def end_orphans(lease_prefix: str) -> None:
    """Kills every process of commands whose lease's path starts so; for those whose supervisor was killed with its holders or before them."""
    while left := list(_members(lease_prefix)):
        for found in left:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares the time of its start, so that no other process is meant
                found.kill()
        psutil.wait_procs(left, timeout=1.0)


def _members(lease_prefix: str) -> Iterator[psutil.Process]:
    for found in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, a zombie, or another user's
            if found.environ().get(LEASE_VARIABLE, "").startswith(lease_prefix) and found.status() != psutil.STATUS_ZOMBIE:
                yield found


def wait_ended(lease: Path, timeout_seconds: float = END_SECONDS) -> None:
    """Returns once nothing of the command of `lease` runs any more, whose holders are dead; what a killed supervisor left is ended. Raises ProcessFailed if it does not end."""
    deadline = time.monotonic() + timeout_seconds
    while supervised(str(lease)):
        if time.monotonic() > deadline:
            raise ProcessFailed(f"an earlier command of {lease} still runs; if no other tuneserve uses it, end its supervisor (pipeline.supervisor {lease})")
        time.sleep(0.1)
    end_orphans(str(lease))
    lease.unlink(missing_ok=True)  # left behind by a power cut, say


def start(
    command: Sequence[str], *, name: str, lease: Path, log: Path, environment: Mapping[str, str], cwd: Path, grace_seconds: float = GRACE_SECONDS
) -> Child:
    """Starts `command` in a session of its own, stdout and stderr to `log` (the one before it is kept as `log`.1), held by a new lease on the file `lease`."""
    held = new_lease(lease)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "pipeline.supervisor", str(lease), str(grace_seconds), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, LEASE_VARIABLE: str(lease)},
            cwd=cwd,
            start_new_session=True,
        )
    return Child(name, log, held, supervisor)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file `path`, waiting for whoever holds it (`waiting` is called once if so); a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield
                return


@contextlib.contextmanager
def if_unlocked(path: Path) -> Iterator[bool]:
    """Holds the lock file `path` as `locked` does, but only if nobody does; yields whether. The file's time stays that of its last use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield _is_at(file, path)


@contextlib.contextmanager
def shared(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a share in the lock file `path`, which nobody may remove: others may have one too, and nobody has it alone (`locked`, `if_unlocked`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb" if path.exists() else "ab") as file:  # a share needs no right to write
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`: a lock on one that was removed meanwhile keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def started(pid: int) -> str:
    """When the process `pid` started, exact and whatever happens to the clock: boot id and ticks since boot (proc(5), field 22); '' if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else f"{Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()} {fields[19]}"


def failure(what: str, log: Path) -> ProcessFailed:
    """The error for something that went wrong with a log: what, the first error in the log and the log's end."""
    first = f"\n    {found}" if (found := first_error(log)) else ""
    return ProcessFailed(f"{what}; the log is {log}{first}; it ends:\n{log_tail(log)}")


def first_error(log: Path) -> str | None:
    """The first line of a log that names an exception: a server's root cause often stands far above its log's end."""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return next((found.group(0).strip()[:500] for line in lines if (found := EXCEPTION_LINE.search(line))), None)
    except OSError:
        return None


def log_tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, indented; reads at most its last 16 KiB."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"    (no log: {error})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
