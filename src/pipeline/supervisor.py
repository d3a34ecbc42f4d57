"""Runs one command so that nothing of it survives: `python -m pipeline.supervisor LEASE GRACE_SECONDS COMMAND...`.

The command runs as long as some process holds a shared lock on the file LEASE (or LEASE.keep exists). The kernel lets go of the
locks of a process that dies, however it dies, so a holder that is killed ends the command too. The supervisor adopts orphans
(PR_SET_CHILD_SUBREAPER, prctl(2)), so that processes which start new sessions or lose their parent are found and ended as well.
SIGTERM to the supervisor ends the command at once. Exits with the command's code, or 128 + the signal that ended it.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_SECONDS = 0.2
REST_SECONDS = 2.0


def keep_marker(lease: Path) -> Path:
    """While this file exists, the command outlives its lease's holders."""
    return lease.with_name(lease.name + ".keep")


def reap(statuses: dict[int, int]) -> None:
    """Collects every child that has ended, adopted ones too, into `statuses`: pid -> exit code (128 + signal)."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        statuses[pid] = code if code >= 0 else 128 - code


def end_all(child: int, grace_seconds: float, statuses: dict[int, int]) -> None:
    """SIGTERM to the command, which may end its own; to what is left of it after the grace; SIGKILL to what is left REST_SECONDS later."""
    if child not in statuses:
        os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while child not in statuses and time.monotonic() < deadline:
        time.sleep(0.05)
        reap(statuses)
    told: set[int] = set()
    deadline = time.monotonic() + REST_SECONDS
    while descendants := psutil.Process().children(recursive=True):
        kill = time.monotonic() > deadline
        for process in descendants:
            if kill or process.pid not in told:
                told.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        time.sleep(0.05)
        reap(statuses)


def main() -> int:
    lease, grace_seconds, command = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    statuses: dict[int, int] = {}
    with lease.open("rb") as held:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL).pid
        while child not in statuses and not stopping:
            time.sleep(POLL_SECONDS)
            reap(statuses)
            if not keep_marker(lease).exists():
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until we exit: nobody joins a service that is ending
                except BlockingIOError:
                    continue
                stopping = True
        end_all(child, grace_seconds, statuses)
        keep_marker(lease).unlink(missing_ok=True)
        lease.unlink(missing_ok=True)  # says that nothing of the command is left
    return statuses.get(child, 128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
