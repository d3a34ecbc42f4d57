"""The registry against MLflow's real store (SQLite in a file, no server), and metrics while MLflow is away."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from pipeline.adapter import read_adapter
from pipeline.errors import RegistryError
from pipeline.registry import Registry, TrainingRun, Version, flat
from pipeline.version import ARTIFACT_FOLDER
from tests.conftest import write_adapter

EXTRA = {"recipe.yaml": "name: shop\n", "swift_args.json": "{}"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Registry(f"sqlite:///{folder}/mlflow.db")


def register(registry: Registry, folder: Path, name: str) -> Version:
    with registry.run(name, {"lora.rank": 8}, {"dataset_digest": "d"}) as run:
        run.log_metrics(1, {"loss": 2.0})
        run.log_metrics(2, {"loss": 1.0})
        run.tag({"train_seconds": "1.0"})
        return registry.register(name, run.run_id, read_adapter(write_adapter(folder)), EXTRA, "base", "template")


def test_a_run_becomes_a_version_with_its_lineage_and_only_allowed_files(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "shop")
    assert (version.label, version.base_revision, version.template_digest) == ("shop/1", "base", "template")
    assert version.digest == read_adapter(tmp_path / "a").digest
    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lora.rank": "8"}
    assert {"tuneserve.dataset_digest", "tuneserve.train_seconds"} <= set(run.data.tags)
    assert [point.value for point in registry.client.get_metric_history(version.run_id, "loss")] == [2.0, 1.0]
    names = {Path(entry.path).name for entry in registry.client.list_artifacts(version.run_id, ARTIFACT_FOLDER)}
    assert names == {"adapter_config.json", "adapter_model.safetensors", *EXTRA}
    with pytest.raises(RegistryError, match=r"optimizer\.pt may not be logged"):
        registry.register("shop", version.run_id, read_adapter(tmp_path / "a"), {"optimizer.pt": ""}, "base", "template")


def test_the_alias_moves_and_its_past_is_written_down(registry: Registry, tmp_path: Path) -> None:
    first, second = register(registry, tmp_path / "a", "toys"), register(registry, tmp_path / "b", "toys")
    assert registry.champion("toys") is None
    registry.set_champion(first, None)
    registry.set_champion(second, first)
    assert registry.champion("toys") == second
    assert registry.client.get_model_version("toys", "2").tags["tuneserve.previous_champion"] == "1"
    assert registry.version("toys") == second
    assert registry.version("toys", "1") == first
    registry.unset_champion("toys")
    assert registry.champion("toys") is None


def test_what_is_not_registered_is_said(registry: Registry) -> None:
    assert registry.champion("nothing") is None
    with pytest.raises(RegistryError, match="tuneserve train"):
        registry.version("nothing")
    with pytest.raises(RegistryError, match="nothing"):
        registry.version("nothing", "3")


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_badly_says_how(registry: Registry, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), registry.run("shop", {}, {}) as run:
        raise error
    assert registry.client.get_run(run.run_id).info.status == status


def test_a_version_that_tuneserve_did_not_register_is_refused(registry: Registry) -> None:
    registry.client.create_registered_model("foreign")
    registry.client.create_model_version("foreign", "runs:/x/adapter")
    with pytest.raises(RegistryError, match="tuneserve train"):
        registry.version("foreign", "1")


def test_metrics_wait_for_mlflow_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    away = threading.Event()

    def log_batch(run_id: str, metrics: list[object]) -> None:
        if not away.is_set():
            away.set()
            raise MlflowException("connection refused")
        sent.append(len(metrics))

    client = SimpleNamespace(log_batch=log_batch, set_terminated=lambda run_id, status: sent.append(-1))
    monkeypatch.setattr("pipeline.registry.RETRY_SECONDS", 0.01)
    run = TrainingRun(SimpleNamespace(client=client, uri="http://m"), "run", "0")  # type: ignore[arg-type]
    for step in range(5):
        run.log_metrics(step, {"loss": 1.0})
    run.finish("FINISHED")
    assert sum(sent[:-1]) == 5 and sent[-1] == -1


def test_params_are_flat() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
