"""Production's servers on this machine, each of which a script may stop, kill and start again: PostgreSQL, SeaweedFS (S3), MLflow and Prefect on them, a worker, replicas.

    with production(folder, replicas=2) as site:
        site.json("schedule", RECIPE, "--interval", "180", "--json")   # `tuneserve`, with what a user of these servers has in the environment
        site.kill("mlflow"); site.start("mlflow")                      # same port, same stores; waits until it is up

Everything listens on 127.0.0.1, on free ports that stay the same; logs are `folder`/logs/NAME.log. What runs here ends with the block, or with this process.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import psycopg
import yaml
from botocore.client import BaseClient

from pipeline.project import Project
from pipeline.schedule import POOL
from pipeline.services import free_port
from tests.acceptance.serving_environment import SHIPPED, wait_until
from tests.e2e.environment import Sandbox, make_sandbox

POSTGRESQL, S3, MLFLOW, PREFECT, WORKER = "postgresql", "s3", "mlflow", "prefect", "worker"
POSTGRESQL_USER = "postgres"
"""Whom PostgreSQL runs as where we are root, which it refuses; Debian's package makes the user."""
USER, BUCKET = "tuneserve", "mlflow"
DATABASES = ("mlflow", "prefect")
START_SECONDS = 180.0
REPLICA_START_SECONDS = 650.0
STOP_SECONDS = 30.0


@dataclass
class Program:
    """A server of ours, which may run or not. `owns_children`: what it has started dies with it; a worker's runs do not."""

    name: str
    argv: list[str]
    environment: Mapping[str, str] = field(repr=False)
    cwd: Path
    log: Path
    ready: Callable[[], bool]
    start_seconds: float = START_SECONDS
    stop_signal: signal.Signals = signal.SIGTERM
    owns_children: bool = True
    user: str | None = None
    prepare: Callable[[], None] = lambda: None
    """Called before each start; makes what is missing on disk."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    """Unix time."""

    def launch(self) -> None:
        """Starts it; it gets `stop_signal` if this process dies."""
        assert not self.alive(), f"{self.name} runs already"
        self.prepare()
        self.started = time.time()
        argv = [*as_user(self.user), "--pdeathsig", self.stop_signal.name.removeprefix("SIG"), *self.argv]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=self.cwd, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> float:
        """Seconds from its start until it was ready."""

        def reached() -> bool:
            assert self.alive(), f"{self.name} ended:\n{self.tail()}"
            try:
                return self.ready()
            except (httpx.TransportError, psycopg.OperationalError):
                return False

        wait_until(reached, self.start_seconds, lambda: f"{self.name} ready:\n{self.tail()}", every=0.2)
        return time.time() - self.started

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def processes(self) -> list[psutil.Process]:
        """It and what belongs to it."""
        if not self.alive():
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.pid)
            return [own, *(own.children(recursive=True) if self.owns_children else ())]
        return []

    def kill(self) -> None:
        """SIGKILL to it and what belongs to it, at once."""
        for each in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        if self.process:
            self.process.wait()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """As an operator stops it; kills what is left after `seconds`."""
        if not self.alive():
            return
        belonging = self.processes()
        belonging[0].send_signal(self.stop_signal)
        _, left = psutil.wait_procs(belonging, timeout=seconds)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        assert self.process
        self.process.wait()

    def tail(self) -> str:
        return self.log.read_text("utf-8", "replace")[-4000:] if self.log.exists() else "(no log)"


def postgresql_tools() -> Path:
    """The folder of the newest PostgreSQL of Debian's packages. The binaries on PyPI that we know lack pg_trgm, which Prefect needs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    assert found, "no PostgreSQL is installed: apt-get install postgresql"
    return found[-1]


def as_user(user: str | None) -> list[str]:
    """The head of an argv; what follows it keeps its process id."""
    return ["setpriv", *(["--reuid", user, "--regid", user, "--init-groups"] if user else [])]


@dataclass
class Production:
    """The project, its servers by name, and what commands find in their environment (`clients`)."""

    sandbox: Sandbox
    folder: Path
    ports: Mapping[str, int]
    secrets: Mapping[str, str] = field(repr=False)
    replicas: tuple[str, ...]
    data: Mapping[str, Path]
    """Where the stores keep theirs. PostgreSQL's user must be able to reach its folder, which pytest's own folders do not allow."""
    programs: dict[str, Program] = field(default_factory=dict)

    # what scripts use

    def start(self, name: str) -> float:
        """Starts a server that does not run; seconds until it was ready."""
        self.programs[name].launch()
        return self.programs[name].wait_ready()

    def stop(self, name: str) -> None:
        self.programs[name].stop()

    def kill(self, name: str) -> None:
        self.programs[name].kill()

    def alive(self, name: str) -> bool:
        return self.programs[name].alive()

    def wipe(self, name: str) -> None:
        """Stops PostgreSQL or the S3 store and loses all that it held; started again, it is empty."""
        self.stop(name)
        shutil.rmtree(self.data[name])

    def run(self, *command: str, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
        """`tuneserve` with these arguments."""
        return self.sandbox.run(*command, seconds=seconds, **self.clients)

    def json(self, *command: str, seconds: float = 300.0) -> dict[str, Any]:
        """The answer of a command that must succeed."""
        return self.sandbox.json(*command, seconds=seconds, **self.clients)

    def url(self, name: str) -> str:
        """Of a server that speaks HTTP."""
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def replica_options(self) -> list[str]:
        """As `tuneserve promote`, `schedule` and `status` take them."""
        return [argument for name in self.replicas for argument in ("--replica", self.url(name))]

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def mlflow(self) -> str:
        return self.url(MLFLOW)

    @property
    def prefect(self) -> str:
        return f"{self.url(PREFECT)}/api"

    def database(self, name: str, driver: str = "postgresql") -> str:
        """Its URL, with the password in it."""
        return f"{driver}://{USER}:{self.secrets['postgresql']}@127.0.0.1:{self.ports[POSTGRESQL]}/{name}"

    @property
    def clients(self) -> dict[str, str]:
        own = {"MLFLOW_TRACKING_URI": self.mlflow, "PREFECT_API_URL": self.prefect, "TUNESERVE_LOCK_DATABASE": self.database("mlflow")}
        return own | {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}

    def ask_prefect(self, what: str, **body: Any) -> Any:
        """What `POST /what/filter` answers."""
        return httpx.post(f"{self.prefect}/{what}/filter", json=body, timeout=30, trust_env=False).raise_for_status().json()

    def ask_replica(self, name: str, path: str, **body: Any) -> httpx.Response:
        """GET, or with a body POST, with the project's token."""
        token = Project(self.sandbox.root).state / "token"
        if not token.exists():  # made with the first replica
            raise httpx.ConnectError("no replica has been started yet")
        with httpx.Client(
            base_url=self.url(name), timeout=60, trust_env=False, headers={"Authorization": f"Bearer {token.read_text('utf-8').strip()}"}
        ) as http:
            return http.post(path, json=body) if body else http.get(path)

    def answer(self, name: str, model: str, content: Any) -> tuple[str, str]:
        """The version that answered the question of a replica, and its answer."""
        messages = [{"role": "user", "content": content}]
        found = self.ask_replica(name, "/v1/chat/completions", model=model, messages=messages, max_tokens=16, temperature=0).raise_for_status().json()
        return str(found["model"]), str(found["choices"][0]["message"]["content"])

    def s3(self) -> BaseClient:
        return boto3.client("s3", endpoint_url=self.url(S3), region_name="us-east-1", aws_access_key_id=USER, aws_secret_access_key=self.secrets["s3"])

    def leaks(self) -> list[str]:
        """Where a password stands that should not: in a log, a running process's arguments, or what Prefect shows."""
        texts = {str(path): path.read_text("utf-8", "replace") for folder in (self.logs, Project(self.sandbox.root).logs) for path in folder.glob("*")}
        for process in self.sandbox.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                texts[f"the arguments of {process.pid}"] = " ".join(process.cmdline())
        for what in ("logs", "deployments", "flow_runs", "artifacts"):
            texts[f"Prefect's {what}"] = str(self.ask_prefect(what))
        return [where for where, text in texts.items() if any(secret in text for secret in self.secrets.values())]

    def left_over(self) -> list[str]:
        """What runs for this project beside its servers: a worker's runs, say."""
        servers = {each.pid for program in self.programs.values() for each in program.processes()}
        return [" ".join(process.cmdline())[:300] for process in self.sandbox.processes() if process.pid not in servers]

    # how it is made

    def begin(self) -> None:
        """Starts everything, in an order in which each finds what it needs; replicas one by one, since two cores are what a machine may have."""
        for names in ((POSTGRESQL, S3), (MLFLOW, PREFECT), (WORKER,), *((name,) for name in self.replicas)):
            for name in names:
                self.programs[name].launch()
            for name in names:
                self.programs[name].wait_ready()

    def end(self) -> None:
        """Stops everything, whatever else runs for this project too."""
        for name in (*self.replicas, WORKER, PREFECT, MLFLOW, S3, POSTGRESQL):
            self.programs[name].stop()
        for process in self.sandbox.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.sandbox.wait_until_nothing_runs(seconds=15)

    def make_postgresql(self) -> Program:
        """A cluster whose superuser must give a password."""
        data = self.data[POSTGRESQL]
        tools, cluster, password = postgresql_tools(), data / "cluster", data / "password"
        user = POSTGRESQL_USER if os.geteuid() == 0 else None

        def prepare() -> None:
            if cluster.exists():
                return
            data.mkdir(exist_ok=True)
            password.touch(mode=0o600)
            password.write_text(self.secrets["postgresql"], "utf-8")
            if user:
                shutil.chown(data, user, user)
                shutil.chown(password, user)
            initdb = [str(tools / "initdb"), "-D", str(cluster), "--username", USER, "--pwfile", str(password), "--auth", "scram-sha-256", "--encoding", "UTF8"]
            done = subprocess.run([*as_user(user), *initdb], capture_output=True, text=True, cwd=data, check=False)
            password.unlink()
            assert done.returncode == 0, done.stderr

        argv = [str(tools / "postgres"), "-D", str(cluster), "-p", str(self.ports[POSTGRESQL])]
        argv += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]

        def ready() -> bool:
            with psycopg.connect(self.database("postgres"), autocommit=True, connect_timeout=5) as admin:
                there = {name for (name,) in admin.execute("SELECT datname FROM pg_database")}
                for name in DATABASES:
                    if name not in there:
                        admin.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
            return True

        # SIGINT: PostgreSQL ends sessions and shuts down; with SIGTERM it would wait for them
        return self.program(POSTGRESQL, argv, {}, ready, stop_signal=signal.SIGINT, user=user, prepare=prepare)

    def make_s3(self) -> Program:
        """SeaweedFS in one process, which keeps what it is given on disk."""
        data = self.data[S3]
        argv = [str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        argv += ["-s3", f"-s3.port={self.ports[S3]}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.localSocket={data}/s3.sock"]
        argv += [f"-filer.localSocket={data}/filer.sock", "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=1"]
        argv += [f"-{option}={free_port(0)}" for option in SEAWEEDFS_PORTS]

        def ready() -> bool:
            if httpx.get(f"{self.url(S3)}/healthz", timeout=5, trust_env=False).status_code != httpx.codes.OK:
                return False
            store: Any = self.s3()
            try:
                if BUCKET not in {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
                    store.create_bucket(Bucket=BUCKET)
            except store.exceptions.ClientError:  # the gateway is up before the filer behind it
                return False
            return True

        secret = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": self.secrets["s3"]}
        return self.program(S3, argv, secret, ready, prepare=lambda: data.mkdir(exist_ok=True))

    def make_mlflow(self) -> Program:
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.ports[MLFLOW]), "--workers", "1", "--serve-artifacts"]
        environment = {
            "MLFLOW_BACKEND_STORE_URI": self.database("mlflow", "postgresql+psycopg"),  # not an argument, which everyone here could read
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}",
            "MLFLOW_S3_ENDPOINT_URL": self.url(S3),
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": self.secrets["s3"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        return self.program(MLFLOW, argv, environment, lambda: self._healthy(f"{self.mlflow}/health"))

    def make_prefect(self) -> Program:
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.ports[PREFECT])]
        environment = {
            "PREFECT_API_DATABASE_CONNECTION_URL": self.database("prefect", "postgresql+asyncpg"),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",  # survives the server
        }
        return self.program(PREFECT, argv, environment, lambda: self._healthy(f"{self.prefect}/health"))

    def make_worker(self) -> Program:
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER]

        def ready() -> bool:
            answer = httpx.post(f"{self.prefect}/work_pools/{POOL}/workers/filter", json={}, timeout=30, trust_env=False)
            found = answer.json() if answer.status_code == httpx.codes.OK else []
            began = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.programs[WORKER].started))
            return any(each["name"] == WORKER and each["last_heartbeat_time"] > began for each in found)

        return self.program(WORKER, argv, self.clients | {"PREFECT_HOME": str(self.folder / "worker")}, ready, owns_children=False)

    def make_replica(self, name: str) -> Program:
        """The shipped CPU recipe under another name, with a port of its own, in float32 as adapters are trained here: a small one that is drilled into one answer can be half a nat apart in
        bfloat16, more than parity allows."""
        recipe = self.sandbox.root / "recipes" / "serving" / f"{name}.yaml"
        shipped = yaml.safe_load((self.sandbox.root / SHIPPED).read_text("utf-8"))
        recipe.write_text(yaml.safe_dump(shipped | {"name": name, "port": self.ports[name], "precision": "float32"}), "utf-8")
        argv = [sys.executable, "-m", "pipeline.cli", "serve", str(recipe.relative_to(self.sandbox.root))]
        return self.program(
            name, argv, self.clients, lambda: self.ask_replica(name, "/adapters/ready").status_code == httpx.codes.OK, start_seconds=REPLICA_START_SECONDS
        )

    def program(self, name: str, argv: list[str], environment: Mapping[str, str], ready: Callable[[], bool], **more: Any) -> Program:
        given = self.sandbox.environment
        if name not in (WORKER, *self.replicas):  # those are commands of ours, which set this themselves
            given |= {key: value for key, value in Project(self.sandbox.root).environment().items() if key != "TUNESERVE_PROJECT"}
        cwd = self.data[name] if name == POSTGRESQL else self.sandbox.root
        return Program(name, argv, given | environment, cwd, self.logs / f"{name}.log", ready, **more)

    @staticmethod
    def _healthy(url: str) -> bool:
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK


SEAWEEDFS_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.grpc")


@contextlib.contextmanager
def production(folder: Path, replicas: int = 1) -> Iterator[Production]:
    """Everything up and ready, in a new folder below `folder`, until the block ends; then nothing of it runs. Replicas are called `replica-1` and so on."""
    names = tuple(f"replica-{number + 1}" for number in range(replicas))
    ports = {name: free_port(0) for name in (POSTGRESQL, S3, MLFLOW, PREFECT, *names)}
    data = {S3: folder / "servers" / S3, POSTGRESQL: Path(tempfile.mkdtemp(prefix="tuneserve-postgresql-"))}
    own = Production(make_sandbox(folder), folder / "servers", ports, {name: secrets.token_hex(16) for name in ("postgresql", "s3")}, names, data)
    own.logs.mkdir(parents=True)
    for program in (own.make_postgresql(), own.make_s3(), own.make_mlflow(), own.make_prefect(), own.make_worker(), *map(own.make_replica, names)):
        own.programs[program.name] = program
    try:
        own.begin()
        yield own
    except BaseException:
        for program in own.programs.values():
            print(f"--- {program.log}\n{program.tail()}")
        raise
    finally:
        own.end()
        shutil.rmtree(data[POSTGRESQL], ignore_errors=True)
