"""A project of its own in a temporary folder, and what of ours runs for it."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.dataset import Example, read_examples
from pipeline.project import Project

ROOT = Path(__file__).parents[2]
COMPILERS = ("cc", "gcc", "g++", "c++", "c89", "c99", "clang", "x86_64-linux-gnu-g", "cpp", "as", "ld")


def path_without_compilers(folder: Path) -> str:
    """A PATH with all of /usr/bin but its compilers, through links in `folder`, and with this Python's own tools."""
    folder.mkdir(exist_ok=True)
    for tool in Path("/usr/bin").iterdir():
        if not ((folder / tool.name).is_symlink() or tool.name in COMPILERS or tool.name.startswith(("gcc-", "g++-", "cpp-", "clang", "x86_64-linux-gnu-"))):
            (folder / tool.name).symlink_to(tool)
    path = f"{folder}:{Path(sys.base_prefix) / 'bin'}"
    assert shutil.which("gcc", path=path) is None
    return path


@dataclass(frozen=True)
class Sandbox:
    """A project with the shipped recipes and data; its base models are the checkout's, since making one takes minutes."""

    root: Path
    home: Path

    @property
    def held_out(self) -> tuple[Example, ...]:
        """The catalog's evaluation rows."""
        return read_examples(self.root / "data/catalog/eval.jsonl", Project(self.root))

    @property
    def environment(self) -> dict[str, str]:
        unwanted = {"PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "TUNESERVE_PROJECT"}
        return {key: value for key, value in os.environ.items() if key not in unwanted} | {"HOME": str(self.home)}

    def start(self, *args: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *args]
        return subprocess.Popen(command, cwd=self.root, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *args: str, seconds: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **environment)
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            process.terminate()
            out, err = process.communicate()
            raise AssertionError(f"{args} did not end ({error!r}):\n{out}\n{err}") from error
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def json(self, *args: str, seconds: float = 600, **environment: str) -> dict[str, Any]:
        """The last line of stdout of a command that must succeed."""
        done = self.run(*args, seconds=seconds, **environment)
        assert done.returncode == 0, f"{args} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def processes(self) -> list[psutil.Process]:
        """Every running process that works for this project: in its folder, or with its home."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()  # vLLM's engine overwrites its own with its title, but works in the project's folder
                if self.root in (Path(process.cwd()), *Path(process.cwd()).parents) or environment.get("HOME") == str(self.home):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def wait_until_nothing_runs(self, seconds: float) -> float:
        """Seconds until no process of this project is left; fails, naming them, if some still are after `seconds`."""
        began = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - began < seconds, f"still running: {[' '.join(process.cmdline())[:200] for process in left]}"
            time.sleep(0.1)
        return time.monotonic() - began


def make_sandbox(folder: Path) -> Sandbox:
    root, home = folder / "project", folder / "home"
    home.mkdir(parents=True)
    for name in ("recipes", "data"):
        shutil.copytree(ROOT / name, root / name)
    bases = ROOT / ".tuneserve" / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    (root / ".tuneserve").mkdir()
    (root / ".tuneserve" / "bases").symlink_to(bases)
    return Sandbox(root, home)
