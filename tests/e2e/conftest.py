"""One environment for the whole tier: the quickstart, run once as a user runs it, its servers kept up until the session ends."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry import Registry
from tests.e2e.environment import Sandbox, make_sandbox


@dataclass(frozen=True)
class Quickstart:
    """The project that `tuneserve quickstart --json --keep` ran in, its answer, and the registry it left up."""

    sandbox: Sandbox
    answer: dict[str, Any]

    @property
    def openai(self) -> str:
        return str(self.answer["urls"]["openai"])

    @property
    def replica(self) -> str:
        return self.openai.removesuffix("/v1")

    @property
    def registry(self) -> Registry:
        return Registry(self.answer["urls"]["mlflow"])

    @property
    def token(self) -> str:
        return (self.sandbox.root / ".tuneserve" / "token").read_text("utf-8").strip()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quickstart]:
    sandbox = make_sandbox(tmp_path_factory.mktemp("e2e"))
    try:
        yield Quickstart(sandbox, sandbox.json("quickstart", "--json", "--keep", seconds=1500))
    finally:
        down = sandbox.run("down", "--json", seconds=90)
        for log in sorted((sandbox.root / ".tuneserve" / "logs").glob("*.log")):
            print(f"--- {log.name}\n{log.read_text('utf-8', 'replace')[-3000:]}")
    assert down.returncode == 0, down.stderr
    sandbox.wait_until_nothing_runs(seconds=10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("e2e")
