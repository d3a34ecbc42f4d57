"""The adapters that the engine holds, by digest: how one comes (fetched, checked, loaded, verified) and how one goes (unnamed, unused, unloaded).

The engine never holds more than max_cpu_loras - 1, so that it never drops one by itself: it would read it again from disk in the middle of a step, and die if
it cannot.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pipeline.errors import AdapterInvalid, RegistryError, ServingError, VersionRefused
from pipeline.servable import ServerLimits, layout, read_base_shapes, reasons
from pipeline.serving.engine import Engine, Fingerprint, ServedAdapter, lora_id
from pipeline.serving.engine import Mapping as ModuleMapping
from pipeline.serving.local_adapters import LocalAdapters
from pipeline.serving.settings import FollowerSettings
from pipeline.serving.traffic import Traffic
from pipeline.serving.verification import Verification, verify
from pipeline.serving.wanted import RegisteredVersion

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

DOWNLOADS = 2
"""At a time."""
ROOM_SECONDS = 30.0
"""How long a new version waits for the last requests of the one whose place it takes."""
LOOKS_AT_A_TIME = 3
"""Fingerprints that are asked for at a time. Each puts a short prompt and its log-probabilities into a step, and every stream waits for it: with nine at once the longest steps on an H200
took 53 to 56 ms, with three 51 to 52 (45 where it is 512 tokens of prompts alone), and verifying took no longer (docs/benchmarks.md). One at a time, each would wait for a step of its own."""
NOISY = ("disturbs-others", "no-effect")
"""What one look may show by chance, as other requests in the same step change sums' order: in bfloat16 over two H200 under load an answer once moved by 0.17 where 0.15 is allowed. What is
wrong with an adapter shows each time."""
LOOK_SECONDS = 10.0
"""How often the engine is asked what it holds."""
MEND_SECONDS = 5.0
"""Between two tries to fetch a damaged folder again."""


class Files(Protocol):
    """Where versions' files come from; RegistryReader is the real one."""

    async def fetch(self, version: RegisteredVersion, folder: Path) -> None: ...


@dataclass
class Resident:
    """An adapter in the engine. `source` is the version that its files came from."""

    source: RegisteredVersion
    digest: str
    folder: Path
    fused_experts: bool
    fingerprint: Fingerprint
    verification: Verification
    idle_since: float | None = None
    """Since when no name leads to it, on the monotonic clock."""
    fault: str | None = None
    """What is wrong with its local files now."""
    mended: str | None = None
    """When its local files were last mended, and what had been wrong."""
    mend_at: float = 0.0

    def adapter(self, model: str, version: str) -> ServedAdapter:
        return ServedAdapter(model, version, self.digest, self.folder, self.fused_experts)


class Residents:
    """All adapters in one engine. `unname` must take every name from a digest that was given as spare; `loaded` and `forgotten` are told of each that comes and goes."""

    def __init__(
        self,
        settings: FollowerSettings,
        engine: Engine,
        files: Files,
        adapters: LocalAdapters,
        traffic: Traffic,
        unname: Callable[[str], None],
        forgotten: Callable[[Resident], None],
        loaded: Callable[[Resident], None],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._files = files
        self._adapters = adapters
        self._traffic = traffic
        self._unname = unname
        self._forgotten = forgotten
        self._loaded = loaded
        self._held: dict[str, Resident] = {}
        self._owners: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        """By model: the digests that its names lead to, and those that may go if room is needed."""
        self._engine_lock = asyncio.Lock()
        """Loading, verifying and unloading happen one after the other: what a verification compares must not change under it."""
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        self._base: Fingerprint | None = None
        self._looked_at = time.monotonic()
        self.cache_folders, self.cache_bytes = 0, 0
        shapes = read_base_shapes(settings.base_folder) if settings.base_folder else None
        self._limits = ServerLimits(settings.max_rank, settings.target_modules, settings.wraps_experts, base_shapes=shapes)

    def get(self, digest: str) -> Resident | None:
        """The resident of that digest, verified; None if there is none."""
        return self._held.get(digest)

    def held(self, digest: str) -> Resident:
        """The resident of a digest that `keep` was told of and that is here; KeyError else."""
        return self._held[digest]

    @property
    def digests(self) -> list[str]:
        """Of all that are here, also of those that are being forgotten."""
        return sorted(self._held)

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def idle(self) -> int:
        """How many are there that no name leads to any more."""
        return sum(resident.idle_since is not None for resident in self._held.values())

    def keep(self, model: str, needed: Iterable[str], spare: Iterable[str]) -> None:
        """The digests that `model`'s names lead to from now on; `spare` ones may go when another version needs the place."""
        self._owners[model] = (frozenset(needed), frozenset(spare) - frozenset(needed))
        named = frozenset().union(*(needed | spare for needed, spare in self._owners.values()))
        for digest, resident in self._held.items():
            if digest in named:
                resident.idle_since = None
            elif resident.idle_since is None:
                resident.idle_since = time.monotonic()

    async def restore(self, version: RegisteredVersion) -> Resident:
        """Loads from this replica's disk alone. Raises VersionRefused; `not-on-disk` if its files are damaged or gone."""
        digest = str(version.digest)
        folder = await self._adapters.get(digest)
        if folder is None:
            raise VersionRefused("not-on-disk", "its files on this replica are damaged or gone; they are fetched again when MLflow answers")
        resident = await self._enter(version, folder, lambda: True)
        if resident is None:
            raise VersionRefused("not-on-disk", "it was given up while it was loaded")
        return resident

    async def take(self, version: RegisteredVersion, still_wanted: Callable[[], bool]) -> Resident | None:
        """Fetches, checks, loads and verifies; at once if the engine holds it already. None if it was no longer `still_wanted` once it was here.

        Raises VersionRefused, which leaves nothing in the engine.
        """
        digest = str(version.digest)
        if resident := self._held.get(digest):
            return resident
        try:
            async with self._downloads:
                folder = await self._adapters.obtain(digest, lambda unfinished: self._files.fetch(version, unfinished))
        except VersionRefused:
            raise
        except RegistryError as error:
            raise VersionRefused("fetch-failed", str(error)) from error
        except AdapterInvalid as error:
            raise VersionRefused("files-missing", str(error)) from error
        except OSError as error:
            raise VersionRefused("disk", f"its files cannot be written here ({error.strerror}); free the disk or correct its rights") from error
        await self._trim(digest)
        return await self._enter(version, folder, still_wanted) if still_wanted() else None

    async def _enter(self, version: RegisteredVersion, folder: Path, still_wanted: Callable[[], bool]) -> Resident | None:
        digest = str(version.digest)
        if found := await asyncio.to_thread(reasons, folder, self._limits):
            raise VersionRefused(found[0].code, "; ".join(f"{reason.message}; {reason.remedy}" for reason in found[:3]))
        fused = await asyncio.to_thread(layout, folder) == "experts-3d"
        async with self._engine_lock:
            if resident := self._held.get(digest):
                return resident
            if not still_wanted():
                return None
            if owner := next((held for held in self._held if lora_id(held) == lora_id(digest)), None):
                raise VersionRefused(
                    "number-taken",
                    f"its number in vLLM, {lora_id(digest)}, belongs to adapter {owner[:16]} (one chance in 2**31); train or register it anew",
                )
            await self._make_room()
            resident = await self._load(version, folder, fused)
            self._held[digest] = resident
            resident.idle_since = time.monotonic()  # until a name leads to it
            self._loaded(resident)
            return resident

    async def _load(self, version: RegisteredVersion, folder: Path, fused: bool) -> Resident:
        began = time.monotonic()
        adapter = ServedAdapter(version.name, version.version, str(version.digest), folder, fused)
        base = self._base or await self._engine.fingerprint(None)
        try:
            await self._engine.load(adapter)
            mapping = await self._engine.mapping(adapter.lora_id)
            # Nobody asks those that are idle. Those that are in no slot are written into one anew when they are asked, which another adapter's loading cannot disturb; to ask them all here
            # would have the engine move weights between a step and the next, several times over, while users wait.
            named = [other for other in self._held.values() if other.idle_since is None and lora_id(other.digest) in mapping.in_slots]
            try:
                fingerprint, seen = await self._verified(adapter, base, named, mapping)
            except VersionRefused as refused:
                if refused.code not in NOISY:
                    raise
                about = {"event": "verification repeated", "model": version.name, "version": version.version, "digest": version.digest, "code": refused.code}
                logger.info("%s: %s; looking once more", adapter.engine_name, refused, extra=about)
                fingerprint, seen = await self._verified(adapter, base, named, mapping)
        except BaseException as error:  # also a cancelled one: what is not verified must not stay
            await asyncio.shield(self._engine.unload(adapter.lora_id))
            if isinstance(error, VersionRefused) or not isinstance(error, ServingError):
                raise
            raise VersionRefused("load-failed", str(error)) from error
        self._base = base
        seconds = time.monotonic() - began
        fields = {"event": "adapter loaded", "model": version.name, "version": version.version, "digest": version.digest, "seconds": round(seconds, 3)}
        logger.info("%s: loaded and verified", adapter.engine_name, extra={**fields, "differs_by": round(seen.differs_by, 4)})
        return Resident(version, adapter.digest, folder, fused, fingerprint, replace(seen, seconds=seconds))

    async def _verified(self, adapter: ServedAdapter, base: Fingerprint, named: Sequence[Resident], mapping: ModuleMapping) -> tuple[Fingerprint, Verification]:
        """What a loaded adapter answers, and what that shows beside `base`, as it was before, and those that are `named`. Raises VersionRefused."""
        fingerprint, base_now, *theirs = await self._fingerprints([adapter, None, *(other.adapter(other.source.name, other.source.version) for other in named)])
        others = {other.source.label: (other.fingerprint, now) for other, now in zip(named, theirs, strict=True)}
        return fingerprint, verify(fingerprint, (base, base_now), others, mapping, self._settings.float32)

    async def _fingerprints(self, adapters: Sequence[ServedAdapter | None]) -> list[Fingerprint]:
        """One of each, in order, LOOKS_AT_A_TIME together."""
        found: list[Fingerprint] = []
        for start in range(0, len(adapters), LOOKS_AT_A_TIME):
            looks = [asyncio.ensure_future(self._engine.fingerprint(adapter)) for adapter in adapters[start : start + LOOKS_AT_A_TIME]]
            try:
                found += await asyncio.gather(*looks)
            finally:  # nothing may still ask for an adapter that is unloaded next
                for look in looks:
                    look.cancel()
                await asyncio.gather(*looks, return_exceptions=True)
        return found

    async def _make_room(self) -> None:
        """Returns once one more adapter fits. Raises VersionRefused (no-room) if every one is needed, or its last requests do not end."""
        deadline = time.monotonic() + ROOM_SECONDS
        while len(self._held) + 2 > self._settings.max_cpu_loras:
            needed = frozenset().union(*(digests for digests, _ in self._owners.values()))
            may_go = sorted((held for held in self._held.values() if held.digest not in needed), key=lambda held: held.idle_since or float("inf"))
            if not may_go:
                raise VersionRefused(
                    "no-room",
                    f"{len(self._held)} versions are callable and max_cpu_loras is {self._settings.max_cpu_loras}; "
                    "take aliases from versions that nobody asks for, or raise lora.max_cpu_loras",
                )
            for resident in may_go:
                if resident.idle_since is None:  # a spare one: its names go first
                    self._unname(resident.digest)
                if not self._traffic.may_mean(lora_id(resident.digest), resident.idle_since or time.monotonic()):
                    await self._unload(resident)
                    break
            else:
                if time.monotonic() > deadline:
                    raise VersionRefused("no-room", f"every place is taken and {may_go[0].source.label} is still answering; it is tried again")
                await asyncio.sleep(0.05)

    async def _unload(self, resident: Resident) -> None:
        number = lora_id(resident.digest)
        del self._held[resident.digest]  # first: no name may lead to what is on its way out; who wants it now has it loaded again after
        try:
            await self._engine.unload(number)
        except BaseException:
            self._held[resident.digest] = resident
            raise
        self._traffic.forgotten(number)
        self._forgotten(resident)
        logger.info("%s: forgotten", resident.source.label, extra={"event": "adapter forgotten", "digest": resident.digest, "model": resident.source.name})

    async def maintain(self) -> None:
        """Lets go what has been idle long enough, mends damaged folders, and puts back what the engine has lost. Raises nothing that following must know."""
        now = time.monotonic()
        for resident in list(self._held.values()):
            if resident.idle_since is not None and now - resident.idle_since >= self._settings.forget_after_seconds:
                async with self._engine_lock:
                    since = resident.idle_since  # it may have been wanted again meanwhile, or have gone
                    if self._held.get(resident.digest) is resident and since is not None and not self._traffic.may_mean(lora_id(resident.digest), since):
                        await self._unload(resident)
            elif fault := self._adapters.damage(resident.digest):
                await self._mend(resident, fault)
            else:
                resident.fault = None
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            await self._reload_lost()

    async def _mend(self, resident: Resident, fault: str) -> None:
        if resident.fault is None:
            logger.warning("%s: %s; it is served from memory and fetched again", resident.source.label, fault, extra={"event": "adapter damaged"})
            resident.fault = f"{fault}; served from memory, fetched again"
        if time.monotonic() < resident.mend_at:
            return
        resident.mend_at = time.monotonic() + MEND_SECONDS
        try:
            await self._adapters.mend(resident.digest, lambda unfinished: self._files.fetch(resident.source, unfinished))
        except (RegistryError, VersionRefused, AdapterInvalid, OSError) as error:
            resident.fault = f"{fault}; served from memory, and cannot be fetched again yet: {error}"
            return
        resident.fault, resident.mended = None, f"{datetime.now(UTC).isoformat(timespec='seconds')}: {fault}; fetched again"
        logger.info("%s: local files are whole again", resident.source.label, extra={"event": "adapter mended"})

    async def _reload_lost(self) -> None:
        """An adapter that the engine dropped would be read from disk inside a step; it is put back in time."""
        loaded = await self._engine.loaded()
        for resident in list(self._held.values()):
            if lora_id(resident.digest) not in loaded and self._held.get(resident.digest) is resident and not self._adapters.damage(resident.digest):
                logger.warning("%s: the engine had dropped it; loaded again", resident.source.label, extra={"event": "adapter lost"})
                async with self._engine_lock:
                    await self._engine.load(resident.adapter(resident.source.name, resident.source.version))

    async def _trim(self, fetched: str) -> None:
        keep = {*self._held, fetched, *(digest for pair in self._owners.values() for digests in pair for digest in digests)}
        try:
            self.cache_folders, self.cache_bytes = await asyncio.to_thread(self._adapters.trim, self._settings.cache_bytes, keep)
        except OSError as error:
            logger.warning("the cache of adapters cannot be trimmed: %s", error)
