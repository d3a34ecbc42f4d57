"""Nothing that we start outlives us, however we end; what others still use stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import process, services
from pipeline.errors import ProcessFailed, ServingError
from pipeline.project import Project

# A child that ignores SIGTERM and has a grandchild in a session of its own, whose parent is gone.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]], start_new_session=True)", sys.argv[1]])
print("up", flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from pipeline import process
from pipeline.project import Project
folder = Path(sys.argv[1])
environment = Project(folder).child_environment()
child = process.start([sys.executable, "-c", sys.argv[2], str(folder)], name="c", lease=folder / "lease", log=folder / "log", environment=environment, cwd=folder, grace_seconds=0.5)
time.sleep(600)
"""


def marked(folder: Path) -> list[psutil.Process]:
    """Running processes that carry `folder` in their command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if p.pid != psutil.Process().pid and str(folder) in " ".join(p.info["cmdline"] or [])]


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_survives_the_death_of_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), STUBBORN])
    wait_for(lambda: (tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text() and len(marked(tmp_path)) >= 4)
    parent.send_signal(number)
    parent.wait()
    wait_for(lambda: not marked(tmp_path), seconds=10.0)


def test_what_a_killed_parent_started_is_waited_for(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), STUBBORN])
    wait_for(lambda: (tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text() and len(marked(tmp_path)) >= 4)
    with pytest.raises(ProcessFailed, match="still runs"):
        process.wait_ended(tmp_path / "lease", timeout_seconds=0.3)
    parent.kill()
    parent.wait()
    process.wait_ended(tmp_path / "lease")
    assert not marked(tmp_path)
    (tmp_path / "lease").touch()  # as a power cut leaves it
    process.wait_ended(tmp_path / "lease")
    assert not (tmp_path / "lease").exists()


def start_stubborn(folder: Path) -> process.Child:
    argv, environment = [sys.executable, "-c", STUBBORN, str(folder)], Project(folder).child_environment()
    child = process.start(argv, name="c", lease=folder / "lease", log=folder / "log", environment=environment, cwd=folder, grace_seconds=0.5)
    wait_for(lambda: "up" in (folder / "log").read_text() and len(marked(folder)) >= 3)
    return child


@pytest.mark.parametrize("holder_lives", [True, False])
def test_what_a_killed_supervisor_left_is_ended(tmp_path: Path, holder_lives: bool) -> None:
    """By its holder, or by whoever needs the lease next; another command's processes stay."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    child, other = start_stubborn(tmp_path / "a"), start_stubborn(tmp_path / "b")
    child.supervisor.kill()
    child.supervisor.wait()
    assert len(marked(tmp_path / "a")) >= 2  # the supervisor could end nothing
    if holder_lives:
        assert child.end() == -signal.SIGKILL
    else:
        child.lease.close()
        process.wait_ended(tmp_path / "a/lease")
    assert not marked(tmp_path / "a") and len(marked(tmp_path / "b")) >= 3
    other.end()


def test_end_ends_all_and_a_failure_names_the_log(tmp_path: Path) -> None:
    environment = Project(tmp_path).child_environment()
    start = lambda code: process.start(  # noqa: E731
        [sys.executable, "-c", code, str(tmp_path)],
        name="c",
        lease=tmp_path / "lease",
        log=tmp_path / "log",
        environment=environment,
        cwd=tmp_path,
        grace_seconds=0.5,
    )
    child = start(STUBBORN)
    wait_for(lambda: "up" in (tmp_path / "log").read_text())
    child.end()
    assert not marked(tmp_path)
    child = start("print('the reason'); raise SystemExit(3)")
    wait_for(lambda: child.poll() is not None)
    assert child.poll() == 3
    assert "the reason" in str(child.failure("it failed")) and str(tmp_path / "log") in str(child.failure("it failed"))
    child.end()


@pytest.fixture
def website(project: Project) -> Iterator[Callable[..., services.service]]:  # type: ignore[valid-type]
    def start(identity: str = "one", code: str | None = None) -> services.service:  # type: ignore[valid-type]
        port = services.free_port(0)
        argv = [sys.executable, "-c", code] if code else [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        return services.service(project, "web", identity=identity, command=lambda: (argv, f"http://127.0.0.1:{port}"), health="/", start_seconds=20)

    yield start
    for left in services.find_services(project):
        services.release(left)


def test_a_service_is_shared_and_ends_with_its_last_user(project: Project, website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    with website() as first:
        with website() as second:
            assert second == first
        assert first.alive()
        with pytest.raises(ServingError, match="other settings"), website("two"):
            pass
    services.wait_all_ended(project)
    assert not first.alive()
    assert services.find_service(project, "web") is None


def test_a_kept_service_stays_until_it_is_released(project: Project, website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    with website() as server:
        services.keep(server)
    assert server.alive()
    with website() as found:
        assert found == server
        assert not services.release(server)  # in use
    services.wait_all_ended(project)
    assert not server.alive()


def test_a_server_that_does_not_come_up_is_an_error_with_its_log(website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    with pytest.raises(ProcessFailed, match="no such thing"), website(code="raise SystemExit('no such thing')"):
        pass


def test_anothers_server_on_our_port_is_not_taken_for_ours(project: Project, website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    with website() as other:
        argv = [sys.executable, "-c", "import time; time.sleep(600)"]
        mine = services.service(project, "mine", identity="x", command=lambda: (argv, other.url), health="/", start_seconds=0.5)
        with pytest.raises(ProcessFailed, match="mine was not up"), mine:
            pass


def test_what_a_killed_starter_left_is_waited_for(project: Project, website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    lease = project.services / "web@1-1.lease"
    environment = project.child_environment()
    orphan = process.start(
        [sys.executable, "-c", "import time; time.sleep(600)"], name="web", lease=lease, log=project.logs / "o.log", environment=environment, cwd=project.root
    )
    orphan.lease.close()  # as when the command that was starting it dies
    with website() as server:
        assert orphan.poll() is not None
        assert not lease.exists()
        assert server.alive()


def test_a_log_is_kept_once_more(tmp_path: Path) -> None:
    for text in ("first", "second"):
        child = process.start(
            [sys.executable, "-c", f"print('{text}')"],
            name="c",
            lease=tmp_path / "l",
            log=tmp_path / "log",
            environment=Project(tmp_path).child_environment(),
            cwd=tmp_path,
        )
        wait_for(lambda child=child: child.poll() is not None)  # type: ignore[misc]
        child.end()
    assert ((tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()) == ("first\n", "second\n")


def test_a_taken_port_is_reported_with_its_holder(website: Callable[..., services.service]) -> None:  # type: ignore[valid-type]
    with website() as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ServingError, match=r"held by process \d+ .*http\.server"):
            services.require_free_port("127.0.0.1", port)
        assert services.free_port(port) != port


def test_a_lock_whose_file_was_removed_keeps_nobody_out_and_is_taken_anew(tmp_path: Path) -> None:
    path, has = tmp_path / "x.lock", threading.Event()

    def hold() -> None:
        with process.locked(path, path.unlink):  # as `gc` does it, while it holds it
            with process.if_unlocked(path) as free:
                assert not free
            has.set()

    waiting = threading.Thread(target=hold)
    with process.locked(path):
        waiting.start()
        while path.exists():
            time.sleep(0.01)
    waiting.join()
    assert has.is_set() and path.exists()


def test_looking_whether_a_lock_is_held_is_no_use_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    os.utime(path, (0, 0))
    with process.if_unlocked(path) as free:
        assert free and path.stat().st_mtime == 0
    with process.locked(path):
        assert path.stat().st_mtime > 0


def test_shares_keep_out_whoever_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with process.shared(path), process.shared(path), process.if_unlocked(path) as free:
        assert not free
    with process.if_unlocked(path) as free:
        assert free


def test_a_lock_that_is_removed_while_it_is_being_taken_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lock"
    monkeypatch.setattr(process.fcntl, "flock", lambda file, how: path.unlink())
    with process.if_unlocked(path) as free:
        assert not free
