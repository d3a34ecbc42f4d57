"""Following the registry: all followed models of one server, their polling, and what is live on disk."""

import asyncio
import json
import logging
import os
import random
import time
from dataclasses import asdict
from typing import Any

from pipeline.serving.followed_model import Engine, FollowedModel, Live, Registry
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.settings import FollowerSettings

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

LIVE_FILE = "live.json"


class Follower:
    """All followed models of one server, their polling and their state on disk (`state_dir`, which belongs to this server alone)."""

    def __init__(self, settings: FollowerSettings, engine: Engine, registry: Registry, adapters: LocalAdapters, taken_names: frozenset[str]) -> None:
        """`taken_names`: what the server calls its base models and other adapters; no followed model may have such a name."""
        self.settings = settings
        self.ready = False
        """Whether the first sync has ended or run out of its time."""
        owners: dict[int, str] = {}
        self.models = [FollowedModel(name, settings, engine, registry, adapters, taken_names, owners) for name in settings.models]
        self._live_path = settings.state_dir / LIVE_FILE
        self._saved: dict[str, Live] = {}
        self._save_error: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks only weakly

    async def start(self) -> None:
        """Restores what was live, makes the first sync, at most first_sync_seconds long, and polls from then on."""
        saved = self._read_live()
        for model in self.models:
            if live := saved.get(model.name):
                await model.restore(live)
        await self.sync(self.settings.first_sync_seconds)
        self.ready = True
        for model in self.models:
            self._spawn(model, poll=True)

    async def sync(self, seconds: float) -> None:
        """Syncs every model; returns when all have ended or after `seconds`, and what has not ended then goes on."""
        tasks = [self._spawn(model, poll=False) for model in self.models]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def status(self) -> dict[str, Any]:
        """What GET /adapters answers, less the base models. `last_sync_age_seconds`: since MLflow last answered, for the model that it left longest."""
        reads = [model.read_at for model in self.models if model.read_at is not None]
        return {
            "models": {model.name: model.status() for model in self.models},
            "last_sync_age_seconds": round(time.monotonic() - min(reads), 3) if len(reads) == len(self.models) > 0 else None,
            "mlflow_error": next((model.registry_error for model in self.models if model.registry_error), None),
            "state_error": self._save_error,
            "pid": os.getpid(),
        }

    def _spawn(self, model: FollowedModel, poll: bool) -> asyncio.Task[None]:
        task = asyncio.create_task(self._poll(model) if poll else self._sync_one(model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _poll(self, model: FollowedModel) -> None:
        while True:
            # Jitter, so that the replicas of a fleet that started together do not ask together.
            await asyncio.sleep(self.settings.poll_seconds * random.uniform(0.8, 1.2))
            await self._sync_one(model)

    async def _sync_one(self, model: FollowedModel) -> None:
        await model.sync()
        self._save_live()

    def _read_live(self) -> dict[str, Live]:
        try:
            entries = json.loads(self._live_path.read_text("utf-8"))
            return {name: Live(**entry) for name, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read (%r), so nothing is restored; it is written anew with the next version", self._live_path, error)
            return {}

    def _save_live(self) -> None:
        """Writes live.json if it is not what is live, atomically. Short enough for the event loop, and so never two at once."""
        live = {model.name: model.live for model in self.models if model.live}
        if live == self._saved:
            return
        unfinished = self._live_path.with_suffix(".unfinished")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                json.dump({name: asdict(entry) for name, entry in live.items()}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._live_path)
        except OSError as error:
            if self._save_error is None:
                logger.error("%s: cannot be written (%s); a restart would not know what is live: free the disk or correct its rights", self._live_path, error)
            self._save_error = f"{self._live_path.name}: {error.strerror}"
            return
        self._saved, self._save_error = live, None
