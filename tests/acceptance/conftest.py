"""The serving scripts' project: MLflow and Prefect kept up, one adapter trained and registered, for the whole session. Each script runs replicas of its own."""

from collections.abc import Iterator

import pytest

from pipeline.registry import Registry, Version
from tests.acceptance.serving_environment import World
from tests.e2e.environment import make_sandbox

FINETUNE = "recipes/finetune/catalog-tiny.yaml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The scripts that need `world` come last: its servers, up until the session ends, would disturb what the others time."""
    items.sort(key=lambda item: "world" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    sandbox = make_sandbox(tmp_path_factory.mktemp("serving"))
    try:
        mlflow = sandbox.json("up", "--json")["mlflow"]
        trained = sandbox.json("train", FINETUNE, "--json")
        adapter = sandbox.root / ".tuneserve/runs" / trained["mlflow_run_id"] / "adapter"
        yield World(sandbox, mlflow, Registry(mlflow).version("catalog", str(trained["version"])), adapter)
    finally:
        down = sandbox.run("down", "--json", seconds=90)
    assert down.returncode == 0, down.stderr
    sandbox.wait_until_nothing_runs(seconds=15)


@pytest.fixture(scope="session")
def second(world: World, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Another version of the trained model, which answers in its own name."""
    return world.variant("catalog", 0.5, tmp_path_factory.mktemp("second") / "adapter")
