"""Following the registry: all followed models of one server, their polling, what is live on disk, and when the server may be called ready."""

import asyncio
import contextlib
import json
import logging
import os
import random
import time
from dataclasses import asdict
from typing import Any, Protocol

from pipeline.errors import RegistryError
from pipeline.serving.engine import Engine, lora_id
from pipeline.serving.followed_model import FollowedModel, Live, Names, Saved
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.residents import Files, Resident, Residents
from pipeline.serving.settings import FollowerSettings
from pipeline.serving.traffic import Traffic
from pipeline.serving.wanted import Wanted
from pipeline.switch import Disabled

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

LIVE_FILE = "live.json"
MAX_MODELS = 256
"""Followed by tag; what a tag brings beyond these is reported and left out."""


class Registry(Files, Protocol):
    """RegistryReader is the real one. Every method raises RegistryError."""

    async def read(self, model: str) -> Wanted: ...

    async def tagged(self, key: str, value: str) -> list[str]: ...


class Observer(Protocol):
    """What is told of changes, for metrics."""

    def refused(self, model: str, code: str) -> None: ...

    def loaded(self, resident: Resident) -> None: ...

    def forgotten(self, resident: Resident) -> None: ...

    def state(self, model: FollowedModel) -> None: ...


class Follower:
    """All followed models of one server, their polling and their state on disk (`state_dir`, which belongs to this server alone)."""

    def __init__(
        self,
        settings: FollowerSettings,
        engine: Engine,
        names: Names,
        registry: Registry,
        adapters: LocalAdapters,
        traffic: Traffic,
        observer: Observer,
        taken_names: frozenset[str],
    ) -> None:
        """`taken_names`: what the server calls its base models and other adapters; no followed model may have such a name."""
        self.settings = settings
        self.traffic = traffic
        self.models: dict[str, FollowedModel] = {}
        self._registry = registry
        self._names = names
        self._observer = observer
        self._taken_names = taken_names
        self.residents = Residents(settings, engine, registry, adapters, traffic, self._unname, observer.forgotten, observer.loaded)
        self._ready = False
        self._live_path = settings.state_dir / LIVE_FILE
        self._written: dict[str, Saved] = {}
        self._save_error: str | None = None
        self._tag_error: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks only weakly
        for name in settings.models:
            self._follow(name)

    def _follow(self, name: str) -> FollowedModel:
        model = FollowedModel(name, self.settings, self.residents, self._names, self._registry, self._taken_names, self._observer.refused)
        self.models[name] = model
        return model

    def _unname(self, digest: str) -> None:
        for model in self.models.values():
            model.unname(digest)

    @property
    def ready(self) -> bool:
        """Whether every model is settled, or was once: a registry that goes away later takes nothing from what is served."""
        self._ready = self._ready or not self.waits_for()
        return self._ready

    def waits_for(self) -> dict[str, str]:
        """The models that keep the server from being ready, each with the reason."""
        if self._ready:
            return {}
        return {
            name: model.registry_error or model.error or "its version is being fetched, checked and loaded"
            for name, model in self.models.items()
            if not model.settled
        } | ({"follow_tag": self._tag_error} if self._tag_error else {})

    async def start(self) -> None:
        """Restores what was live, makes the first sync, at most first_sync_seconds long, and polls from then on."""
        saved = self._read_live()
        for name, state in saved.items():
            if model := self.models.get(name) or (self._follow(name) if self.settings.follow_tag else None):
                await model.restore(state)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.first_sync_seconds):
                await self._discover()
        await self.sync(self.settings.first_sync_seconds)
        for name in list(self.models):
            self._spawn(self._poll(name))
        self._spawn(self._maintain())

    async def sync(self, seconds: float, name: str | None = None) -> None:
        """Syncs the model of that name, or all; returns when nothing is on its way any more, or after `seconds`, and what has not ended then goes on."""
        models = [self.models[name]] if name in self.models else list(self.models.values())
        tasks = [self._spawn(self._sync_one(model, settle=True)) for model in models]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def status(self) -> dict[str, Any]:
        """What GET /adapters answers, less the base models. `last_sync_age_seconds`: since MLflow last answered, for the model that it left longest."""
        return {
            "ready": self.ready,
            "waits_for": self.waits_for(),
            "models": {name: model.status(lambda digest: self.traffic.running(lora_id(digest))) for name, model in self.models.items()},
            "last_sync_age_seconds": self.last_sync_age_seconds(),
            "mlflow_error": next((model.registry_error for model in self.models.values() if model.registry_error), self._tag_error),
            "state_error": self._save_error,
            "slots": {
                "max_loras": self.settings.max_loras,
                "max_cpu_loras": self.settings.max_cpu_loras,
                "resident": self.residents.count,
                "digests": self.residents.digests,
                "forgetting": self.residents.idle,
                "misses": self.traffic.misses,
                "waits": self.traffic.waits,
            },
            "cache": {"folders": self.residents.cache_folders, "bytes": self.residents.cache_bytes, "limit_bytes": self.settings.cache_bytes},
            "pid": os.getpid(),
        }

    def last_sync_age_seconds(self) -> float | None:
        reads = [model.read_at for model in self.models.values() if model.read_at is not None]
        return round(time.monotonic() - min(reads), 3) if len(reads) == len(self.models) > 0 else None

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _pause(self, began: float) -> None:
        """Until poll_seconds after `began` (monotonic clock) at the latest: the time that MLflow took counts. Jitter, so that a fleet does not ask together."""
        await asyncio.sleep(max(0.0, began + self.settings.poll_seconds * random.uniform(0.7, 1.0) - time.monotonic()))

    async def _poll(self, name: str) -> None:
        began = time.monotonic()
        while True:
            await self._pause(began)
            began = time.monotonic()
            await self._sync_one(self.models[name])

    async def _sync_one(self, model: FollowedModel, settle: bool = False) -> None:
        await model.sync()
        if settle:
            await model.settle()
        self._observer.state(model)
        self._save_live()

    async def _maintain(self) -> None:
        while True:
            await self._pause(time.monotonic())
            try:
                for name in await self._discover():
                    self._spawn(self._poll(name))
                await self.residents.maintain()
                self._save_live()
            except Exception:  # whatever it is, it must end neither the server nor following
                logger.exception("upkeep failed; it is tried again")

    async def _discover(self) -> list[str]:
        """Follows the models that have the tag since now; their names. One that has lost it is followed on: what is served stays served."""
        if not self.settings.follow_tag:
            return []
        key, _, value = self.settings.follow_tag.partition("=")
        try:
            found = await self._registry.tagged(key, value)
        except RegistryError as error:
            self._tag_error = str(error)
            return []
        self._tag_error = None
        new = [name for name in dict.fromkeys(found) if name not in self.models]
        room = max(0, MAX_MODELS - len(self.models))
        if new[room:]:
            self._tag_error = f"follow_tag: {len(found)} models have it, more than {MAX_MODELS}; take it from some"
        for name in new[:room]:
            self._follow(name)
        return new[:room]

    def _read_live(self) -> dict[str, Saved]:
        try:
            entries = json.loads(self._live_path.read_text("utf-8"))
            return {name: _saved(entry) for name, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read (%r), so nothing is restored; it is written anew with the next version", self._live_path, error)
            return {}

    def _save_live(self) -> None:
        """Writes live.json if it is not what is live, atomically. Short enough for the event loop, and so never two at once."""
        live = {name: model.saved for name, model in self.models.items() if model.saved != Saved()}
        if live == self._written:
            return
        unfinished = self._live_path.with_suffix(".unfinished")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                json.dump({name: _entry(saved) for name, saved in live.items()}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._live_path)
        except OSError as error:
            if self._save_error is None:
                logger.error("%s: cannot be written (%s); a restart would not know what is live: free the disk or correct its rights", self._live_path, error)
            self._save_error = f"{self._live_path.name}: {error.strerror}"
            return
        self._written, self._save_error = live, None


def _entry(saved: Saved) -> dict[str, Any]:
    return asdict(saved)


def _saved(entry: dict[str, Any]) -> Saved:
    """From live.json; raises TypeError or ValueError if it is not what `_entry` wrote."""
    live = {role: Live(**entry[role]) if entry.get(role) else None for role in ("champion", "candidate", "previous")}
    return Saved(
        **live,
        pinned=tuple(Live(**each) for each in entry.get("pinned", ())),
        percent=float(entry["percent"]),
        off={key: Disabled(**value) for key, value in entry["off"].items()},
    )
