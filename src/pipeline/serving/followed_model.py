"""One registered model and the adapter that its served name answers with: what the registry wants, what is live, and the way from one to the other.

Knows nothing of vLLM: the engine is two methods (`Engine`), the registry two more (`Registry`).
"""

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pipeline.adapter import name_fault
from pipeline.errors import RegistryError, ServingError, TuneserveError
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.registry_reader import RegisteredVersion
from pipeline.serving.settings import FollowerSettings
from pipeline.version import BASE_REVISION_TAG, CHAMPION, DIGEST_TAG, TEMPLATE_DIGEST_TAG

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

MAX_BACKOFF_SECONDS = 60.0
DIGEST = re.compile(r"[0-9a-f]{64}")


def engine_name(model: str, version: str, digest: str) -> str:
    """`catalog/7@ab12cd34`: unlike `catalog/7`, never two different weights, even when MLflow hands out a version number twice."""
    return f"{model}/{version}@{digest[:8]}"


@dataclass(frozen=True)
class ServedAdapter:
    """One version as the engine knows it: its name there, its number there, and the folder that holds it."""

    model: str
    version: str
    digest: str
    folder: Path

    @property
    def engine_name(self) -> str:
        return engine_name(self.model, self.version, self.digest)

    @property
    def lora_id(self) -> int:
        """1 to 2**31 - 1, by digest alone. vLLM's second model runner keeps these numbers in int32 arrays; a wider one would kill the engine."""
        return 1 + int(self.digest[:16], 16) % (2**31 - 1)


class Engine(Protocol):
    """The inference engine, as far as following needs it."""

    async def load(self, adapter: ServedAdapter) -> None:
        """Returns once the engine holds the adapter's weights, at once if it already does; raises ServingError if it refuses them."""

    def point(self, name: str, adapter: ServedAdapter) -> None:
        """From now on requests for `name` are answered with `adapter`, which is loaded; requests under way keep what they had."""


class Registry(Protocol):
    """The registry; RegistryReader is the real one. Both methods raise RegistryError."""

    async def champion(self, model: str) -> RegisteredVersion | None: ...

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None: ...


@dataclass(frozen=True)
class Live:
    """What a served name answers with, and the base it was accepted for. This is what live.json holds for each model."""

    version: str
    digest: str
    loaded_at: str
    base_revision: str
    template_digest: str


@dataclass(frozen=True)
class Refusal:
    """Failed attempts on one version; `retry_at` is on the monotonic clock."""

    version: str
    digest: str | None
    attempts: int
    retry_at: float


class FollowedModel:
    """One registered model: keeps its served name on the version that its alias `champion` points to.

    Whatever goes wrong, the version that is live keeps answering and `error` says why the wanted one does not. Superseded versions stay callable
    as `name/version` until the server ends: forgetting them is not built yet, so a server that sees many versions keeps them all, on disk too.
    """

    def __init__(
        self,
        name: str,
        settings: FollowerSettings,
        engine: Engine,
        registry: Registry,
        adapters: LocalAdapters,
        taken_names: frozenset[str],
        owners: dict[int, str],
    ) -> None:
        self.name = name
        self.wanted: RegisteredVersion | None = None
        self.live: Live | None = None
        self.error: str | None = None
        self.registry_error: str | None = None
        self.read_at: float | None = None
        """When MLflow last answered about this model, on the monotonic clock."""
        self._settings = settings
        self._engine = engine
        self._registry = registry
        self._adapters = adapters
        self._taken_names = taken_names
        self._owners = owners
        """Digest by lora_id, shared by all models of the server."""
        self._refusal: Refusal | None = None
        self._lock = asyncio.Lock()
        self._sync_started = float("-inf")

    async def restore(self, live: Live) -> None:
        """Serves again, from disk alone, what was served before a restart; leaves the name unserved, with `error`, if that cannot be."""
        where = f"{self.name}/{live.version}"
        registered = RegisteredVersion(self.name, live.version, "", live.digest, live.base_revision, live.template_digest)
        try:
            if fault := self._fault(registered):
                self._report(f"not restored: {fault}", registered)
            elif folder := await self._adapters.get(live.digest):
                await self._serve(registered, folder)
            else:
                self._report(f"{where}: not restored: its files on this replica are damaged or gone; they are fetched again when MLflow answers", registered)
        except (TuneserveError, OSError) as error:
            self._report(f"{where}: not restored: {error}", registered)

    def status(self) -> dict[str, Any]:
        wanted, live = self.wanted, self.live
        return {
            "wanted": {"version": wanted.version, "digest": wanted.digest} if wanted else None,
            "live": {
                "version": live.version,
                "digest": live.digest,
                "engine_name": engine_name(self.name, live.version, live.digest),
                "loaded_at": live.loaded_at,
            }
            if live
            else None,
            "error": self.error,
        }

    async def sync(self) -> None:
        """Brings the served name to the alias as it stood at this call or later. Callers at the same time share one sync. Raises nothing."""
        asked = time.monotonic()
        async with self._lock:
            if self._sync_started > asked:  # the sync that we waited for began after we asked
                return
            self._sync_started = time.monotonic()
            try:
                await self._sync()
            except Exception as error:  # whatever it is, it must end neither the server nor following; it is in the log and in `error`
                if self._report(f"{self.name}: a fault in tuneserve ({error!r}); report it with the server's log"):
                    logger.exception("%s: unexpected error", self.name)

    async def _sync(self) -> None:
        try:
            wanted = await self._registry.champion(self.name)
        except RegistryError as error:
            if self.registry_error != str(error):
                logger.warning("%s: %s", self.name, error)
            self.registry_error = str(error)
            return
        if self.registry_error:
            logger.info("%s: MLflow answers again", self.name)
        self.registry_error, self.read_at, self.wanted = None, time.monotonic(), wanted
        if wanted is None:
            still = f"{self.name}/{self.live.version} is still served; " if self.live else ""
            self._report(f"{self.name}: MLflow has no version with alias '{CHAMPION}'; {still}promote a version")
        elif self.live and (wanted.version, wanted.digest) == (self.live.version, self.live.digest):
            self._refusal = None
            self._report(None)
        elif fault := self._fault(wanted):
            self._report(fault, wanted)
        elif not self._waits_to_retry(wanted):
            await self._take(wanted)

    async def _take(self, wanted: RegisteredVersion) -> None:
        """From a version without `_fault` to the live one."""
        digest = str(wanted.digest)
        fetched = self._adapters.holds(digest)
        try:
            folder = await self._adapters.obtain(digest, lambda unfinished: self._registry.fetch(wanted, unfinished))
            if fetched:
                await self._serve(wanted, folder)
        except (TuneserveError, OSError) as error:
            attempts = self._refusal.attempts + 1 if self._refusal and (self._refusal.version, self._refusal.digest) == (wanted.version, digest) else 1
            self._refusal = Refusal(wanted.version, digest, attempts, time.monotonic() + min(2**attempts, MAX_BACKOFF_SECONDS))
            self._report(f"{self.name}/{wanted.version}: {error}", wanted)
            return
        if not fetched:
            await self._sync()  # a download takes long: look again where the alias points

    async def _serve(self, version: RegisteredVersion, folder: Path) -> None:
        adapter = ServedAdapter(self.name, version.version, str(version.digest), folder)
        owner = self._owners.setdefault(adapter.lora_id, adapter.digest)
        if owner != adapter.digest:
            raise ServingError(f"its number in vLLM, {adapter.lora_id}, belongs to adapter {owner[:16]} (one chance in 2**31); train or register it anew")
        began = time.monotonic()
        await self._engine.load(adapter)
        fields = {"model": self.name, "version": adapter.version, "digest": adapter.digest}
        logger.info("%s: loaded", adapter.engine_name, extra={"event": "adapter loaded", **fields, "seconds": round(time.monotonic() - began, 3)})
        self._engine.point(f"{self.name}/{version.version}", adapter)
        self._engine.point(self.name, adapter)
        before = self.live.version if self.live else "nothing"
        self.live = Live(
            version.version, adapter.digest, datetime.now(UTC).isoformat(timespec="milliseconds"), self._settings.base_revision, self._settings.template_digest
        )
        self._refusal = None
        self._report(None)
        logger.info("%s: now %s (before: %s)", self.name, adapter.engine_name, before, extra={"event": "served name flipped", **fields, "previous": before})

    def _fault(self, version: RegisteredVersion) -> str | None:
        """Why the version's entry alone forbids serving it, or None."""
        where = f"{self.name}/{version.version}"
        base, template = self._settings.base_revision, self._settings.template_digest
        if fault := name_fault(self.name, self._taken_names):
            return f"{where}: {fault}; register the adapter under another name"
        if not version.version.isdecimal() or where in self._taken_names:
            return f"{where}: not a version number, or the name of a served base model; register the adapter under another name"
        if version.digest is None or version.base_revision is None or version.template_digest is None:
            tags = {DIGEST_TAG: version.digest, BASE_REVISION_TAG: version.base_revision, TEMPLATE_DIGEST_TAG: version.template_digest}
            missing = ", ".join(tag for tag, value in tags.items() if value is None)
            return f"{where}: has no tag {missing}; register it with tuneserve"
        if not DIGEST.fullmatch(version.digest):
            return f"{where}: tag {DIGEST_TAG} is not a SHA-256 in hex (got {version.digest[:80]!r}); register it with tuneserve"
        if version.base_revision != base:
            return f"{where}: trained on base {version.base_revision[:16]}, this server has {base[:16]}; train it on the served base"
        if version.template_digest != template:
            return f"{where}: trained with chat template {version.template_digest[:16]}, this server has {template[:16]}; train it with the served one"
        return None

    def _waits_to_retry(self, version: RegisteredVersion) -> bool:
        refusal = self._refusal
        return refusal is not None and (refusal.version, refusal.digest) == (version.version, version.digest) and time.monotonic() < refusal.retry_at

    def _report(self, error: str | None, refused: RegisteredVersion | None = None) -> bool:
        """Makes `error` what status shows; logs it, and returns True, only if it is news. `refused` is the version that it keeps from being served."""
        news = error != self.error
        if news and error:
            fields = {"event": "adapter refused", "version": refused.version, "digest": refused.digest} if refused else {"event": "following disturbed"}
            logger.warning("%s", error, extra={"model": self.name, **fields})
        self.error = error
        return news
