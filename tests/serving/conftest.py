"""Small real adapters on disk, and the boundaries of following: an engine, a table of names and a registry that do as a test says."""

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safetensors.numpy import save_file

from pipeline.adapter import ADAPTER_FILES, adapter_digest
from pipeline.errors import RegistryError, ServingError
from pipeline.serving.engine import Fingerprint, ServedAdapter, engine_name, lora_id
from pipeline.serving.engine import Mapping as ModuleMapping
from pipeline.serving.follower import Follower
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.metrics import Metrics
from pipeline.serving.routing import Route
from pipeline.serving.settings import FollowerSettings
from pipeline.serving.traffic import Traffic
from pipeline.serving.wanted import RegisteredVersion, Wanted

MODULE = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def new_adapter(folder: Path, seed: int) -> str:
    """The digest of a new, tiny, valid adapter in `folder`."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    weights = {f"{MODULE}.lora_A.weight": np.full((2, 4), seed, np.float32), f"{MODULE}.lora_B.weight": np.full((4, 2), seed, np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")
    return adapter_digest(folder)


class FakeEngine:
    """Loads what it is given unless `refuses` holds its version. `weights` is what it holds; an adapter's fingerprint follows from its digest."""

    def __init__(self) -> None:
        self.loads: list[ServedAdapter] = []
        self.unloads: list[int] = []
        self.weights: dict[int, ServedAdapter] = {}
        self.refuses: set[str] = set()
        self.without_effect: set[str] = set()
        self.unmapped: tuple[str, ...] = ()
        self.leaks = 0.0
        """How much each loaded adapter moves the base's answers."""
        self.noise: list[float] = []
        """How much the base's next answers are off by chance, one after the other."""
        self.slots = 100
        """Of what is loaded, the last so many are in slots."""
        self.unloading: asyncio.Event | None = None
        """What each unloading waits for, if anything."""
        self.asked: list[ServedAdapter | None] = []
        self.looking, self.most_looking = 0, 0
        """Fingerprints that are being taken; the most that were at once."""

    async def load(self, adapter: ServedAdapter) -> None:
        self.loads.append(adapter)
        if adapter.version in self.refuses:
            raise ServingError("vLLM refused the adapter: rank 64 is greater than max_lora_rank 16")
        assert {path.name for path in adapter.folder.iterdir()} == set(ADAPTER_FILES)
        self.weights[adapter.lora_id] = adapter

    async def unload(self, lora_id: int) -> None:
        self.unloads.append(lora_id)
        if self.unloading:
            await self.unloading.wait()
        self.weights.pop(lora_id, None)

    async def loaded(self) -> set[int]:
        return set(self.weights)

    async def mapping(self, lora_id: int) -> ModuleMapping:
        return ModuleMapping(4 - len(self.unmapped), self.unmapped, frozenset([*self.weights][-self.slots :]))

    async def fingerprint(self, adapter: ServedAdapter | None) -> Fingerprint:
        self.asked.append(adapter)
        self.looking += 1
        self.most_looking = max(self.most_looking, self.looking)
        await asyncio.sleep(0)
        self.looking -= 1
        if adapter is None:
            return (-1.0, -2.0 + self.leaks * len(self.weights) + (self.noise.pop(0) if self.noise else 0.0))
        assert adapter.lora_id in self.weights
        return (-1.0, -2.0) if adapter.version in self.without_effect else (-1.0, -3.0 - int(adapter.digest[:4], 16) / 1e4)


class FakeNames:
    """`routes` is what requests would reach."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.routes: dict[str, Route] = {}

    def set(self, model: str, routes: Mapping[str, Route]) -> None:
        assert all(route.adapter.lora_id in self.engine.weights for route in routes.values()), "a name leads to weights that the engine does not hold"
        self.routes = {name: route for name, route in self.routes.items() if route.name != model} | dict(routes)


class FakeRegistry:
    """What is wanted by model, and versions' files in `folders` by number; `away` makes every call fail, `on_fetch` runs during a download."""

    def __init__(self) -> None:
        self.wanted: dict[str, Wanted] = {}
        self.folders: dict[str, Path] = {}
        self.tags: dict[str, list[str]] = {}
        self.away = False
        self.reads = 0
        self.fetches = 0
        self.on_fetch: Callable[[], None] = lambda: None

    def _answer(self) -> None:
        if self.away:
            raise RegistryError("http://mlflow: MLflow cannot be reached")

    async def read(self, model: str) -> Wanted:
        self.reads += 1
        await asyncio.sleep(0)
        self._answer()
        return self.wanted.get(model, Wanted(exists=False))

    async def tagged(self, key: str, value: str) -> list[str]:
        self._answer()
        return self.tags.get(f"{key}={value}", [])

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None:
        self.fetches += 1
        self._answer()
        for name in ADAPTER_FILES:
            shutil.copyfile(self.folders[version.version] / name, folder / name)
        self.on_fetch()


class World:
    """One replica's state folder with a registry of catalog/1 to catalog/9."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.registry = FakeRegistry()
        self.digests = {}
        self.names: FakeNames
        self.traffic: Traffic
        self.metrics: Metrics
        for seed in range(1, 10):
            folder = tmp_path / "registry" / str(seed)
            self.digests[str(seed)] = new_adapter(folder, seed)
            self.registry.folders[str(seed)] = folder

    def version(self, number: str, model: str = "catalog", **changed: str | None) -> RegisteredVersion:
        fields = {"digest": self.digests[number], "base_revision": "base-1", "template_digest": "template-1", **changed}
        return RegisteredVersion(name=model, version=number, source="mlflow-artifacts:/0/run/artifacts/adapter", **fields)

    def engine_name(self, number: str) -> str:
        return engine_name("catalog", number, self.digests[number])

    def lora_id(self, number: str) -> int:
        return lora_id(self.digests[number])

    def promote(self, number: str, *, model: str = "catalog", **changed: str | None) -> None:
        self.want(model, champion=self.version(number, model, **changed))

    def want(self, model: str = "catalog", **changed: object) -> None:
        """Changes what is wanted of a model: champion, candidate, percent, pinned, off."""
        before = self.registry.wanted.get(model, Wanted(exists=True))
        fields = {"champion": before.champion, "candidate": before.candidate, "percent": before.percent, "pinned": before.pinned, "off": before.off}
        self.registry.wanted[model] = Wanted(True, **(fields | changed))

    def replica(self, engine: FakeEngine, models: tuple[str, ...] = ("catalog",), **settings: object) -> Follower:
        """A freshly started server's follower; called twice, a restart on the same disk."""
        values = {"poll_seconds": 0.01, "first_sync_seconds": 5.0, "base_revision": "base-1", "template_digest": "template-1", **settings}
        wanted = FollowerSettings(mlflow_uri="http://mlflow", models=models, state_dir=self.tmp_path / "state", token_file=self.tmp_path / "token", **values)
        self.names, self.traffic, self.metrics = FakeNames(engine), Traffic(wanted.max_loras), Metrics(CollectorRegistry())
        adapters = LocalAdapters(wanted.state_dir / "adapters")
        return Follower(wanted, engine, self.names, self.registry, adapters, self.traffic, self.metrics, frozenset({"glm-4.5v"}))


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
