"""The project folder: where everything lies, and the environment that every child process gets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECT_VARIABLE = "TUNESERVE_PROJECT"
TOKEN_VARIABLE = "TUNESERVE_TOKEN_FILE"


@dataclass(frozen=True)
class Project:
    """All state of the embedded profile lies under `root`: `mlruns/` is the registry, `.tuneserve/` all else. Nothing goes to the home directory."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / ".tuneserve"

    @property
    def mlruns(self) -> Path:
        return self.root / "mlruns"

    @property
    def bases(self) -> Path:
        return self.state / "bases"

    @property
    def runs(self) -> Path:
        """A folder per training: arguments, prepared data, checkpoints, the adapter."""
        return self.state / "runs"

    @property
    def logs(self) -> Path:
        """The log of every child process."""
        return self.state / "logs"

    @property
    def services(self) -> Path:
        """What is running: a record and a lease per server."""
        return self.state / "services"

    @property
    def token(self) -> Path:
        """The file with the token of the /adapters routes: $TUNESERVE_TOKEN_FILE, for replicas and commands on several hosts, else the project's own."""
        return Path(os.environ.get(TOKEN_VARIABLE) or self.state / "token")

    @property
    def in_use(self) -> Path:
        """The lock file in which every command that may use the caches holds a share; `gc` takes it alone."""
        return self.state / "in-use.lock"

    @property
    def images(self) -> Path:
        """Pictures that lay inside a table of rows, named by the digest of their bytes."""
        return self.state / "cache" / "images"

    def resolve(self, path: Path) -> Path:
        """`path` itself if absolute, else below the project."""
        return path if path.is_absolute() else self.root / path

    def relative(self, path: Path) -> str:
        """`path` as shown to a person: relative to the project where it lies inside."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def environment(self) -> dict[str, str]:
        """What child processes (and this one) need set: caches inside the project, hubs offline unless the user says otherwise, no usage reporting."""
        cache = self.state / "cache"
        fixed = {
            PROJECT_VARIABLE: str(self.root),
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # its UI has the log; the terminal shows an error once, from us
        }
        defaults = {
            "XDG_CACHE_HOME": str(cache),
            "XDG_CONFIG_HOME": str(self.state / "config"),
            "HF_HOME": str(cache / "huggingface"),
            "MODELSCOPE_CACHE": str(cache / "modelscope"),
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_CONFIG_ROOT": str(self.state / "config" / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "MPLCONFIGDIR": str(cache / "matplotlib"),
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait make CPU training 30 times slower once another process is busy
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # with the next line about 30 s; MLflow's defaults wait over four minutes
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        }
        for name in ("NO_PROXY", "no_proxy"):  # our own servers are on this machine, whatever the proxy
            fixed[name] = ",".join(dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), "127.0.0.1", "localhost"]))
        return {name: value for name, value in defaults.items() if name not in os.environ} | fixed

    def use_environment(self) -> None:
        """Sets `environment` in this process; before mlflow or prefect is imported, since both read it then."""
        os.environ.update(self.environment())

    def child_environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of a child process. Bytecode is always cached: without it every import of torch takes a minute."""
        environment = {**os.environ, **self.environment(), **(extra or {})}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment


def find_project(start: Path | None = None) -> Project:
    """The project of `start` (default: the working directory): $TUNESERVE_PROJECT, else the nearest folder upwards with `recipes/` or `.tuneserve/`, else `start`."""
    if chosen := os.environ.get(PROJECT_VARIABLE):
        return Project(Path(chosen).resolve())
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / ".tuneserve").is_dir() or (folder / "recipes").is_dir():
            return Project(folder)
    return Project(here)
