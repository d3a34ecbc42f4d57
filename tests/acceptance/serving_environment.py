"""What the serving acceptance scripts share: a registry with a really trained version, replicas as child processes, and MLflow's aliases over REST."""

import contextlib
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml
from safetensors.numpy import load_file, save_file

from pipeline.adapter import read_adapter
from pipeline.project import Project
from pipeline.registry import Registry, Version
from pipeline.services import find_service, free_port
from pipeline.serving.settings import KEEP_ALIVE_SECONDS
from pipeline.version import CHAMPION
from tests.acceptance.load import CHAT, Body
from tests.e2e.environment import Sandbox

BASE = "glm-4.5v"
SHIPPED = "recipes/serving/tiny-cpu.yaml"
START_SECONDS = 400.0
END_SECONDS = 90.0
TEXT: list[Body] = [{"role": "user", "content": "What product is this?"}]
"""A question without an image, where the answer does not matter."""
Value = TypeVar("Value")


def wait_until(reached: Callable[[], Value], seconds: float, what: Callable[[], object] | str, every: float = 0.05) -> Value:
    """What `reached` returns once it is true; fails after `seconds`, saying `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := reached()):
        assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(every)
    return value


def connection(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60.0, trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS))


def engine_name(version: Version) -> str:
    """What an answer of that version calls its model."""
    return f"{version.label}@{version.digest[:8]}"


@dataclass(frozen=True)
class World:
    """A project, the MLflow server that its commands and replicas use, and the one version that was trained."""

    sandbox: Sandbox
    mlflow: str
    trained: Version
    adapter: Path
    """The trained version's folder."""

    @functools.cached_property
    def registry(self) -> Registry:
        return Registry(self.mlflow)

    @functools.cached_property
    def rest(self) -> httpx.Client:
        return connection(f"{self.mlflow}/api/2.0/mlflow")

    @property
    def project(self) -> Project:
        return Project(self.sandbox.root)

    @property
    def token(self) -> str:
        return (self.project.state / "token").read_text("utf-8").strip()

    def at(self, mlflow: str) -> "World":
        """The same project with another MLflow server."""
        return replace(self, mlflow=mlflow)

    def run(self, *command: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        return self.sandbox.run(*command, seconds=seconds, MLFLOW_TRACKING_URI=self.mlflow)

    def json(self, *command: str, seconds: float = 120) -> dict[str, Any]:
        """The answer of a command that must succeed."""
        return self.sandbox.json(*command, seconds=seconds, MLFLOW_TRACKING_URI=self.mlflow)

    def status(self, *servers: "Server") -> tuple[int, dict[str, Any]]:
        """Exit code and answer of `tuneserve status`."""
        replicas = [argument for server in servers for argument in ("--replica", server.url)]
        done = self.run("status", "--json", *replicas)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def set_alias(self, version: Version, alias: str = CHAMPION) -> tuple[float, float]:
        """Points an alias of the version's model to it, by hand; unix time before and after MLflow did so."""
        began = time.time()
        self.rest.post("/registered-models/alias", json={"name": version.name, "alias": alias, "version": version.version}).raise_for_status()
        return began, time.time()

    def delete_alias(self, model: str, alias: str) -> None:
        self.rest.request("DELETE", "/registered-models/alias", json={"name": model, "alias": alias}).raise_for_status()

    def tag_model(self, model: str, key: str, value: str) -> None:
        self.rest.post("/registered-models/set-tag", json={"name": model, "key": key, "value": value}).raise_for_status()

    def tag_version(self, version: Version, key: str, value: str) -> None:
        self.rest.post("/model-versions/set-tag", json={"name": version.name, "version": version.version, "key": key, "value": value}).raise_for_status()

    def variant(self, model: str, scale: float, folder: Path) -> Version:
        """The trained version with its update scaled, registered as the next version of `model`; other scales are other digests. `folder` is used and removed."""
        shutil.copytree(self.adapter, folder)
        weights = folder / "adapter_model.safetensors"
        save_file({key: value * scale if "lora_B" in key else value for key, value in load_file(self.adapter / weights.name).items()}, weights)
        try:
            with self.registry.run("variant", {}, {}) as run:
                adapter = read_adapter(folder)
                return self.registry.register(model, run.run_id, adapter, {}, self.trained.base_revision, self.trained.template_digest, f"variant {scale}")
        finally:
            shutil.rmtree(folder)

    def variants(self, model: str, scales: list[float], folder: Path) -> list[Version]:
        return [self.variant(model, scale, folder / f"{model}-{number}") for number, scale in enumerate(scales)]

    def recipe(self, name: str, **fields: Any) -> Path:
        """The shipped CPU recipe under another name, with changed fields and a port of its own; `lora` is merged."""
        shipped = yaml.safe_load((self.sandbox.root / SHIPPED).read_text("utf-8"))
        lora = shipped["lora"] | fields.pop("lora", {})
        path = self.sandbox.root / "recipes" / "serving" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(shipped | {"name": name, "port": free_port(0)} | fields | {"lora": lora}), "utf-8")
        return path

    def start(self, recipe: Path, **environment: str) -> "Server":
        """`tuneserve serve` of the recipe, not yet up."""
        process = self.sandbox.start("serve", str(recipe.relative_to(self.sandbox.root)), MLFLOW_TRACKING_URI=self.mlflow, **environment)
        return Server(self, recipe, process)

    @contextlib.contextmanager
    def serving(self, name: str, environment: Mapping[str, str] | None = None, **fields: Any) -> Iterator["Server"]:
        """A replica that is ready, until the block ends."""
        server = self.start(self.recipe(name, **fields), **(environment or {}))
        try:
            server.wait_ready()
            yield server
        except BaseException:
            print(f"--- {server.log}\n{server.log.read_text('utf-8', 'replace')[-5000:]}" if server.log.exists() else f"--- no {server.log}")
            raise
        finally:
            server.end()


@dataclass(frozen=True)
class Server:
    """One replica: a `tuneserve serve` and what it runs."""

    world: World
    recipe: Path
    process: subprocess.Popen[str]
    began: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return self.recipe.stem

    @functools.cached_property
    def url(self) -> str:
        return f"http://127.0.0.1:{yaml.safe_load(self.recipe.read_text('utf-8'))['port']}"

    @functools.cached_property
    def http(self) -> httpx.Client:
        return connection(self.url)

    @property
    def log(self) -> Path:
        return self.world.project.logs / f"vllm-{self.name}.log"

    def folder(self, digest: str) -> Path:
        """Where the replica keeps that adapter."""
        return self.world.project.state / "serving" / self.name / "adapters" / digest

    def get(self, path: str) -> httpx.Response:
        """The answer to a GET with the replica's token."""
        return self.http.get(path, headers={"Authorization": f"Bearer {self.world.token}"})

    def ready(self) -> bool:
        try:
            return self.get("/adapters/ready").status_code == httpx.codes.OK
        except (httpx.TransportError, FileNotFoundError):  # the token is made with the first replica
            return False

    def wait_ready(self) -> float:
        """Seconds from the start until it was ready."""

        def reached() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return self.ready()

        wait_until(reached, START_SECONDS, f"{self.name} ready; its log is {self.log}")
        return time.time() - self.began

    def adapters(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.get("/adapters").raise_for_status().json()
        return answer

    def model(self, name: str) -> dict[str, Any]:
        """What GET /adapters says of one model; empty if it is not followed."""
        found: dict[str, Any] = self.adapters()["models"].get(name, {})
        return found

    def is_live(self, version: Version) -> bool:
        live = self.model(version.name).get("live")
        return bool(live) and (live["version"], live["digest"]) == (version.version, version.digest)

    def wait_live(self, version: Version, seconds: float = 20.0) -> None:
        """Returns once the version's model is answered by it."""
        wait_until(lambda: self.is_live(version), seconds, lambda: f"{version.label} live on {self.name}: {json.dumps(self.model(version.name))}")

    def promote(self, version: Version, seconds: float = 20.0) -> None:
        """Moves the alias by hand and waits until the replica has followed."""
        self.world.set_alias(version)
        self.wait_live(version, seconds)

    def chat(self, model: str, **more: Any) -> dict[str, Any]:
        """The answer to a chat request that must succeed; without messages, to a short one."""
        response = self.http.post(CHAT, json={"model": model, "messages": TEXT, "max_tokens": 4, "temperature": 0} | more)
        assert response.status_code == httpx.codes.OK, f"{model}: {response.status_code} {response.text[:500]}"
        answer: dict[str, Any] = response.json()
        return answer

    def answering(self, model: str) -> str:
        """The version that answers for `model`."""
        return str(self.chat(model)["model"])

    def processes(self) -> tuple[psutil.Process, psutil.Process]:
        """vLLM's API process and its engine process."""
        service = wait_until(lambda: find_service(self.world.project, f"vllm-{self.name}"), 30, f"a record of {self.name}")
        api = psutil.Process(service.pid).children()[0]
        return api, max(api.children(recursive=True), key=lambda child: child.memory_info().rss)

    def alive(self) -> bool:
        """Whether command, API and base model work."""
        return self.process.poll() is None and self.http.get("/health").status_code == httpx.codes.OK and self.answering(BASE) == BASE

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = END_SECONDS) -> float:
        """Ends the replica; seconds until nothing of it was left."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its supervisor then ends vLLM
            self.process.communicate()
            raise
        self.http.close()
        return time.monotonic() - began


class OwnMlflow:
    """An MLflow server that can be killed and started again, on the same port and database."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.sandbox, self.folder, self.port = sandbox, folder, free_port(0)
        self.database = folder / "mlflow.db"
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Unix time of the first healthy answer."""
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        argv += ["--backend-store-uri", f"sqlite:///{self.database}", "--serve-artifacts", "--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = Project(self.sandbox.root).child_environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "HOME": str(self.sandbox.home)})
        with (self.folder / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(argv, cwd=self.sandbox.root, env=environment, stdout=log, stderr=log)
        wait_until(self._healthy, 120, f"MLflow up; its log is {self.folder / 'mlflow.log'}", every=0.02)
        return time.time()

    def _healthy(self) -> bool:
        assert self._process and self._process.poll() is None, (self.folder / "mlflow.log").read_text("utf-8")[-3000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self._process is None or self._process.poll() is not None:
            return
        for process in [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
