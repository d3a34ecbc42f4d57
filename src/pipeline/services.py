"""The servers of the embedded profile: started when first needed, found by every later command, ended when nobody needs them.

A service lives as long as a command of ours holds its lease (see supervisor.py), or until `tuneserve down` once it was told to stay.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
import psutil

from pipeline import process
from pipeline.errors import ServingError
from pipeline.journal import failure_fields
from pipeline.project import Project
from pipeline.supervisor import keep_marker

logger = logging.getLogger(__name__)
MLFLOW, PREFECT = "mlflow", "prefect"
DATABASE = "mlflow.db"
"""The embedded MLflow's SQLite file in mlruns/."""
LEASES_ON_DISK = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
END_SECONDS = 30.0
START_SECONDS = 120.0
"""A server of ours that is not up by then has failed; on two busy cores MLflow and Prefect take up to 40 s."""


@dataclass(frozen=True)
class Service:
    """A running server as recorded on disk. `identity` says what it was started with: another identity is another server."""

    name: str
    url: str
    pid: int
    """The supervisor's process id."""
    started: str
    """`process.started` of the supervisor: with the pid, proof that it is the same process."""
    identity: str
    log: str
    lease: str
    """The file whose shared lock keeps it alive; one for each start."""
    grace_seconds: float = process.GRACE_SECONDS
    """From SIGTERM to SIGKILL."""

    def alive(self) -> bool:
        return process.started(self.pid) == self.started


def free_port(preferred: int) -> int:
    """`preferred` if it is free on the loopback interface, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServingError("no free port on 127.0.0.1; end a server that you do not need")


def require_free_port(host: str, port: int) -> int:
    """`port` if it can be bound on `host`. Raises ServingError that names the process which holds it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return port
        except OSError as error:
            raise ServingError(f"port {port} on {host} cannot be used ({error.strerror}): {port_holder(port)}; end it or choose another port") from error


def port_holder(port: int) -> str:
    """Who listens on `port`, as far as this user may see."""
    try:
        for connection in psutil.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"held by process {connection.pid} ({' '.join(psutil.Process(connection.pid).cmdline())[:120]})"
    except psutil.Error:
        pass
    return "the holder is not visible to this user"


@contextlib.contextmanager
def service(
    project: Project,
    name: str,
    *,
    identity: str,
    command: Callable[[], tuple[Sequence[str], str]],
    health: str,
    headers: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    start_seconds: float = START_SECONDS,
    grace_seconds: float = process.GRACE_SECONDS,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Service]:
    """The service `name`, found or started, healthy, and alive until the block ends; if nobody else needs it, it then ends too (`wait_all_ended`).

    From SIGTERM to SIGKILL it gets `grace_seconds`.
    `command()` gives the argv and the base URL of a new server; `health` is the path below the URL that answers 200 (asked with `headers`) once it is up;
    `waiting` is called while it starts. Raises ServingError if it runs with another identity, ProcessFailed if it does not come up.
    """
    with process.locked(project.services / f"{name}.start"):  # of two racing commands the second finds the first one's server
        joined = _join(project, name)
        if joined is None:
            joined = _start(
                project,
                name,
                identity,
                command(),
                environment,
                grace_seconds,
                lambda child, url: wait_healthy(child, url, health, headers, start_seconds, waiting),
            )
    running, lease = joined
    try:
        if running.identity != identity:
            raise ServingError(
                f"{name} runs with other settings ({running.identity}, wanted {identity}); end it first: tuneserve down, or Ctrl-C where it runs"
            )
        yield running
    finally:
        lease.close()


def _join(project: Project, name: str) -> tuple[Service, IO[bytes]] | None:
    """A share in the running service, or None once there is none: one that is ending, or that a killed command left half started, is waited for."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        running = find_service(project, name)
        if running is not None:
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                return running, process.join_lease(Path(running.lease))
        elif not process.supervised(str(project.services / f"{name}@")):  # by a command that was killed before it could record the service
            process.end_orphans(str(project.services / f"{name}@"))
            for stale in project.services.glob(f"{name}@*.lease*"):  # after a power cut, say
                stale.unlink()
            return None
        time.sleep(0.1)
    raise ServingError(f"{name} is still ending; its log is {project.logs / f'{name}.log'}")


def _start(
    project: Project,
    name: str,
    identity: str,
    command: tuple[Sequence[str], str],
    environment: Mapping[str, str] | None,
    grace_seconds: float,
    wait: Callable[[process.Child, str], None],
) -> tuple[Service, IO[bytes]]:
    argv, url = command
    began = time.monotonic()
    lease = project.services / f"{name}@{os.getpid()}-{time.time_ns()}.lease"
    child = process.start(
        argv,
        name=name,
        lease=lease,
        log=project.logs / f"{name}.log",
        environment=project.child_environment(environment),
        cwd=project.root,
        grace_seconds=grace_seconds,
    )
    try:
        wait(child, url)
    except BaseException as error:
        child.end()
        logger.warning("server did not start", extra={"server": name, "log": str(child.log), **failure_fields(error)})
        raise
    record = Service(name, url, child.supervisor.pid, process.started(child.supervisor.pid), identity, str(child.log), str(lease), grace_seconds)
    path = project.services / f"{name}.json"
    draft = path.with_suffix(".json.new")
    draft.write_text(json.dumps(asdict(record)), "utf-8")
    draft.replace(path)
    logger.info("server started", extra={"server": name, "url": url, "server_pid": record.pid, "seconds": round(time.monotonic() - began, 3)})
    return record, child.lease


def wait_healthy(child: process.Child, url: str, path: str, headers: Mapping[str, str] | None, timeout_seconds: float, waiting: Callable[[], None]) -> None:
    """Returns once the child itself answers GET `url` + `path` with 200. Raises ProcessFailed, with the log's tail, if the process ends first or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        if child.poll() is not None:
            raise child.failure(f"{child.name} ended before it was up")
        try:
            status = httpx.get(url + path, headers=headers, timeout=5.0, trust_env=False).status_code
            ours = _listens(child, urlsplit(url).port)  # another program may have taken the port since we found it free
            if ours and status == httpx.codes.OK:
                return
            if ours and status == httpx.codes.NOT_FOUND:  # vLLM goes on without a plugin that it could not load
                raise child.failure(f"{child.name} is up but knows no {path}")
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise child.failure(f"{child.name} was not up after {timeout_seconds:.0f} s")
        waiting()
        time.sleep(0.2)


def _listens(child: process.Child, port: int | None) -> bool:
    """Whether a process of `child` listens on `port`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in psutil.Process(child.supervisor.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie that its parent does not reap
                if any(found.status == psutil.CONN_LISTEN and found.laddr[1:] == (port,) for found in member.net_connections("inet")):
                    return True
    return False


def find_service(project: Project, name: str) -> Service | None:
    """The running service of that name, or None."""
    try:
        record = Service(**json.loads((project.services / f"{name}.json").read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if record.alive() else None


def find_services(project: Project, prefix: str = "") -> list[Service]:
    """Every running service whose name starts with `prefix`."""
    names = sorted(path.stem for path in project.services.glob(f"{prefix}*.json"))
    return [found for name in names if (found := find_service(project, name)) is not None]


def keep(found: Service) -> None:
    """Lets a service outlive the commands that use it, until `release`."""
    keep_marker(Path(found.lease)).touch()


def release(found: Service) -> bool:
    """Takes `keep` back; True once the service is gone, False if another command still uses it."""
    keep_marker(Path(found.lease)).unlink(missing_ok=True)
    return wait_ended(found)


def wait_ended(found: Service) -> bool:
    """True once the service is gone; False if it is to stay, is used by another command, or is not gone END_SECONDS after its grace."""
    lease = Path(found.lease)
    deadline = time.monotonic() + END_SECONDS + found.grace_seconds
    ran = False
    while found.alive():
        if keep_marker(lease).exists() or process.is_leased(lease) or time.monotonic() > deadline:
            return False
        ran = True
        time.sleep(0.1)
    if ran:
        logger.info("server ended", extra={"server": found.name, "url": found.url, "server_pid": found.pid})
    return True


def wait_all_ended(project: Project) -> None:
    """Returns once every service that nobody needs any more is gone; they end side by side."""
    for found in find_services(project):
        wait_ended(found)


@contextlib.contextmanager
def mlflow_server(project: Project) -> Iterator[Service]:
    """The local MLflow server: SQLite and artifacts below mlruns/, artifacts only through the server."""
    project.mlruns.mkdir(parents=True, exist_ok=True)

    def command() -> tuple[list[str], str]:
        port = free_port(5000)
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        argv += ["--backend-store-uri", f"sqlite:///{project.mlruns / DATABASE}", "--serve-artifacts"]
        return [*argv, "--artifacts-destination", (project.mlruns / "artifacts").as_uri()], f"http://127.0.0.1:{port}"

    with service(
        project, MLFLOW, identity=str(project.mlruns), command=command, health="/health", environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    ) as up:
        yield up


@contextlib.contextmanager
def prefect_server(project: Project) -> Iterator[Service]:
    """The local Prefect server: SQLite below .tuneserve/prefect, and there too, to outlive a server that is killed, which run holds a schedule's place."""

    def command() -> tuple[list[str], str]:
        port = free_port(4200)
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        return argv, f"http://127.0.0.1:{port}"

    with service(project, PREFECT, identity=str(project.state / "prefect"), command=command, health="/api/health", environment=LEASES_ON_DISK) as up:
        yield up


@contextlib.contextmanager
def tracking(project: Project) -> Iterator[str]:
    """MLflow's URL, also set as MLFLOW_TRACKING_URI: the user's own server if that variable is set already, else the embedded one."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        yield uri
        return
    with mlflow_server(project) as server:
        os.environ["MLFLOW_TRACKING_URI"] = server.url
        try:
            yield server.url
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]


@contextlib.contextmanager
def orchestration(project: Project) -> Iterator[str]:
    """Prefect's API URL, also set as PREFECT_API_URL: the user's own server if that variable is set already, else the embedded one."""
    if url := os.environ.get("PREFECT_API_URL"):
        try:
            httpx.get(f"{url}/health", timeout=10.0).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServingError(
                f"PREFECT_API_URL is {url}, and no Prefect server answers there ({error}); start it, or unset it for the embedded one"
            ) from error
        yield url
        return
    with prefect_server(project) as server:
        os.environ["PREFECT_API_URL"] = server.url + "/api"
        try:
            yield server.url + "/api"
        finally:
            del os.environ["PREFECT_API_URL"]


@contextlib.contextmanager
def registry_at_rest(project: Project) -> Iterator[str | None]:
    """Where the registry can be read in the block without starting anything: the user's MLflow, the running embedded one, or that one's database.

    None if there is none yet, or if a server is just making or upgrading it; none starts while the block reads the database.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        yield uri
        return
    with process.if_unlocked(project.services / f"{MLFLOW}.start") as alone:
        database = project.mlruns / DATABASE
        if running := find_service(project, MLFLOW):
            yield running.url
        elif alone and database.is_file() and not process.supervised(str(project.services / f"{MLFLOW}@")):
            yield f"sqlite:///{database}"
        else:
            yield None
