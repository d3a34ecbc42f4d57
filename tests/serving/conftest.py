"""Small real adapters on disk, and the two boundaries of following: an engine and a registry that do as a test says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.adapter import ADAPTER_FILES, adapter_digest
from pipeline.errors import RegistryError, ServingError
from pipeline.serving.followed_model import ServedAdapter
from pipeline.serving.follower import Follower
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.registry_reader import RegisteredVersion
from pipeline.serving.settings import FollowerSettings


def new_adapter(folder: Path, seed: int) -> str:
    """The digest of a new, tiny, valid adapter in `folder`."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    save_file({"q_proj.lora_A.weight": np.full((2, 4), seed, np.float32)}, folder / "adapter_model.safetensors")
    return adapter_digest(folder)


class FakeEngine:
    """Loads what it is given unless `refuses` holds its version; `names` is what requests would reach."""

    def __init__(self) -> None:
        self.loads: list[ServedAdapter] = []
        self.names: dict[str, ServedAdapter] = {}
        self.refuses: set[str] = set()

    async def load(self, adapter: ServedAdapter) -> None:
        self.loads.append(adapter)
        if adapter.version in self.refuses:
            raise ServingError("vLLM refused the adapter: rank 64 is greater than max_lora_rank 16")
        assert {path.name for path in adapter.folder.iterdir()} == set(ADAPTER_FILES)

    def point(self, name: str, adapter: ServedAdapter) -> None:
        self.names[name] = adapter


class FakeRegistry:
    """`champions` by model, their files in `folders` by version; `away` makes every call fail, `on_fetch` runs during a download."""

    def __init__(self) -> None:
        self.champions: dict[str, RegisteredVersion] = {}
        self.folders: dict[str, Path] = {}
        self.away = False
        self.reads = 0
        self.fetches = 0
        self.on_fetch = lambda: None

    async def champion(self, model: str) -> RegisteredVersion | None:
        self.reads += 1
        if self.away:
            raise RegistryError("http://mlflow: MLflow cannot be reached")
        return self.champions.get(model)

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None:
        self.fetches += 1
        if self.away:
            raise RegistryError("http://mlflow: MLflow cannot be reached")
        for name in ADAPTER_FILES:
            shutil.copy(self.folders[version.version] / name, folder / name)
        self.on_fetch()


class World:
    """One replica's state folder with a registry of catalog/1, catalog/2 and catalog/3."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.registry = FakeRegistry()
        self.digests = {}
        for seed in (1, 2, 3):
            folder = tmp_path / "registry" / str(seed)
            self.digests[str(seed)] = new_adapter(folder, seed)
            self.registry.folders[str(seed)] = folder

    def version(self, number: str, **changed: str | None) -> RegisteredVersion:
        fields = {"digest": self.digests[number], "base_revision": "base-1", "template_digest": "template-1", **changed}
        return RegisteredVersion(name="catalog", version=number, source="mlflow-artifacts:/0/run/artifacts/adapter", **fields)

    def promote(self, number: str, **changed: str | None) -> None:
        self.registry.champions["catalog"] = self.version(number, **changed)

    def replica(self, engine: FakeEngine, models: tuple[str, ...] = ("catalog",), **settings: object) -> Follower:
        """A freshly started server's follower; called twice, a restart on the same disk."""
        values = {"poll_seconds": 0.01, "first_sync_seconds": 5.0, "base_revision": "base-1", "template_digest": "template-1", **settings}
        wanted = FollowerSettings(mlflow_uri="http://mlflow", models=models, state_dir=self.tmp_path / "state", token_file=self.tmp_path / "token", **values)
        return Follower(wanted, engine, self.registry, LocalAdapters(wanted.state_dir / "adapters"), frozenset({"glm-4.5v"}))


@pytest.fixture
def write_adapter() -> Callable[[Path, int], str]:
    return new_adapter


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def new_engine() -> Callable[[], FakeEngine]:
    return FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()
