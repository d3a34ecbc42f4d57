"""One registered model: what the registry wants of it, what its names answer with, and the way from one to the other.

Whatever goes wrong, the version that is live keeps answering and `error` says why the wanted one does not. Everything that clients see changes in
`_apply`, between two awaits: no request meets a half-made change.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pipeline.adapter import name_fault
from pipeline.errors import RegistryError, VersionRefused
from pipeline.serving.engine import ServedAdapter, engine_name
from pipeline.serving.residents import Resident, Residents
from pipeline.serving.routing import Route
from pipeline.serving.settings import FollowerSettings
from pipeline.serving.wanted import RegisteredVersion, Wanted, entry_faults
from pipeline.switch import Disabled
from pipeline.version import CHAMPION

logger = logging.getLogger("vllm.tuneserve")  # below "vllm" so that the server's own handler prints it

MAX_BACKOFF_SECONDS = 60.0
Key = tuple[str, str]
"""A version's number and digest."""


class Registry(Protocol):
    """Where the wanted state comes from; RegistryReader is the real one. Raises RegistryError."""

    async def read(self, model: str) -> Wanted: ...


class Names(Protocol):
    """The server's table of callable names; each change takes effect for the next request."""

    def set(self, model: str, routes: Mapping[str, Route]) -> None:
        """`routes` are from now on all names of `model`."""


@dataclass(frozen=True)
class Live:
    """A version that is served, and what it was accepted for. live.json holds these."""

    version: str
    digest: str
    loaded_at: str
    base_revision: str
    template_digest: str

    @property
    def key(self) -> Key:
        return self.version, self.digest


@dataclass(frozen=True)
class Saved:
    """All that a restart needs to serve a model as before without the registry."""

    champion: Live | None = None
    candidate: Live | None = None
    previous: Live | None = None
    pinned: tuple[Live, ...] = ()
    percent: float = 0.0
    off: Mapping[str, Disabled] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Why a version is not served. `attempts` to load it have failed, 0 if its entry in MLflow forbids it; `retry_at` is on the monotonic clock."""

    code: str
    message: str
    attempts: int
    retry_at: float


class FollowedModel:
    """One registered model of one server. `changed` is called after every change of what is live."""

    def __init__(
        self,
        name: str,
        settings: FollowerSettings,
        residents: Residents,
        names: Names,
        registry: Registry,
        taken_names: frozenset[str],
        refused: Callable[[str, str], None] = lambda model, code: None,
    ) -> None:
        """`taken_names`: what the server calls its base models and other adapters. `refused` is told model and code of each new refusal."""
        self.name = name
        self.wanted: Wanted | None = None
        self.saved = Saved()
        self.error: str | None = None
        self.code: str | None = None
        self.registry_error: str | None = None
        self.read_at: float | None = None
        """When MLflow last answered about this model, on the monotonic clock."""
        self._settings = settings
        self._residents = residents
        self._names = names
        self._registry = registry
        self._taken_names = taken_names
        self._refused = refused
        self._refusals: dict[Key, Refusal] = {}
        self._arrivals: dict[Key, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()
        self._sync_started = float("-inf")
        self.name_fault = name_fault(name, taken_names)
        self.off_reason: str | None = None
        """Why the served name is switched off, for the client; None if it is not."""

    async def restore(self, saved: Saved) -> None:
        """Serves again, from disk alone, what was served before a restart; what cannot be is left out, with `error` if it is the champion."""
        if self.name_fault:
            return
        back: dict[Key, Live] = {}
        for live in filter(None, (saved.champion, saved.candidate, saved.previous, *saved.pinned)):
            version = RegisteredVersion(self.name, live.version, "", live.digest, live.base_revision, live.template_digest)
            try:
                self._check_entry(version)
                await self._residents.restore(version)
                back[live.key] = live
            except VersionRefused as error:
                if live == saved.champion:
                    self._report(f"not-restored-{error.code}", f"{version.label}: not restored: {error}", version)

        def restored(live: Live | None) -> Live | None:
            return back.get(live.key) if live else None

        pinned = tuple(filter(None, map(restored, saved.pinned)))
        self.saved = Saved(restored(saved.champion), restored(saved.candidate), restored(saved.previous), pinned, saved.percent, saved.off)
        self._set_names()

    async def sync(self) -> None:
        """Looks at the registry, at this call or later, and applies what can be applied at once. Callers at the same time share one look. Raises nothing."""
        asked = time.monotonic()
        async with self._lock:
            if self._sync_started > asked:  # the sync that we waited for began after we asked
                return
            self._sync_started = time.monotonic()
            try:
                if self.name_fault:
                    self._report("bad-name", f"{self.name[:80]}: {self.name_fault}; register the adapter under another name")
                    self.read_at = time.monotonic()
                elif wanted := await self._read():
                    self._apply(wanted)
            except Exception as error:  # whatever it is, it must end neither the server nor following; it is in the log and in `error`
                if self._report("bug", f"{self.name}: a fault in tuneserve ({error!r}); report it with the server's log"):
                    logger.exception("%s: unexpected error", self.name)

    async def settle(self) -> None:
        """Returns once no version is on its way any more."""
        while self._arrivals:
            await asyncio.wait(list(self._arrivals.values()))

    @property
    def settled(self) -> bool:
        """Whether this model is as good as it can be: what is wanted is live, or cannot be, or there is nothing; restored counts while MLflow is away."""
        if self.name_fault:
            return True
        if self.read_at is None or self.wanted is None:
            return self.saved.champion is not None
        wanted = self.wanted.champion
        return wanted is None or (self.saved.champion is not None and wanted.key == self.saved.champion.key) or wanted.key in self._refusals

    async def _read(self) -> Wanted | None:
        """What is wanted now; None while MLflow does not say."""
        try:
            wanted = await self._registry.read(self.name)
        except RegistryError as error:
            if self.registry_error != str(error):
                logger.warning("%s: %s", self.name, error)
            self.registry_error = str(error)
            return None
        if self.registry_error:
            logger.info("%s: MLflow answers again", self.name)
        self.registry_error, self.read_at, self.wanted = None, time.monotonic(), wanted
        return wanted

    def _apply(self, wanted: Wanted) -> None:
        """From the wanted state to the live one, as far as the engine holds what is wanted; what it does not hold is sent for."""
        saved = self.saved
        if not wanted.exists:
            self._report("model-missing", f"{self.name}: not in MLflow; {self._still()}register and promote a version")
            return
        keys = {version.key for version in filter(None, (wanted.champion, wanted.candidate, *wanted.pinned))}
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if key in keys}
        champion, previous = saved.champion, saved.previous
        if wanted.champion and (live := self._live(wanted.champion)) and (champion is None or live.key != champion.key):
            champion, previous = live, champion
        candidate = self._live(wanted.candidate) if wanted.candidate and wanted.candidate.key != (champion.key if champion else None) else None
        pinned = tuple(filter(None, map(self._live, wanted.pinned)))
        if previous and self._residents.get(previous.digest) is None:  # its place was needed
            previous = None
        self.saved = Saved(champion, candidate, previous, pinned, wanted.percent, wanted.off)
        self._set_names()
        if champion and saved.champion != champion:
            before = saved.champion.version if saved.champion else "nothing"
            fields = {"event": "served name flipped", "model": self.name, "version": champion.version, "digest": champion.digest, "previous": before}
            logger.info("%s: now %s (before: %s)", self.name, engine_name(self.name, *champion.key), before, extra=fields)
        self._report_state(wanted)

    def _report_state(self, wanted: Wanted) -> None:
        if wanted.champion is None:
            self._report("no-champion", f"{self.name}: MLflow has no version with alias '{CHAMPION}'; {self._still()}promote a version")
        elif refusal := self._refusals.get(wanted.champion.key):
            self._report(refusal.code, refusal.message, wanted.champion)
        elif wanted.candidate and (refusal := self._refusals.get(wanted.candidate.key)):
            self._report(refusal.code, refusal.message, wanted.candidate)
        elif wanted.complaint:
            self._report("bad-canary-tag", wanted.complaint)
        else:
            self._report(None, None)

    def _still(self) -> str:
        return f"{self.name}/{self.saved.champion.version} is still served; " if self.saved.champion else ""

    def _live(self, version: RegisteredVersion) -> Live | None:
        """The version as it is served, if the engine holds it; else it is sent for, unless it is refused."""
        try:
            self._check_entry(version)
        except VersionRefused as error:
            self._refuse(version, error, attempts=0)
            return None
        if self._residents.get(str(version.digest)) is None:
            refusal = self._refusals.get(version.key)
            if version.key not in self._arrivals and (refusal is None or refusal.attempts == 0 or time.monotonic() >= refusal.retry_at):
                self._arrivals[version.key] = asyncio.create_task(self._fetch(version))
            return None
        self._refusals.pop(version.key, None)
        before = (self.saved.champion, self.saved.candidate, self.saved.previous, *self.saved.pinned)
        if known := next((live for live in before if live and live.key == version.key), None):
            return known
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return Live(version.version, str(version.digest), now, self._settings.base_revision, self._settings.template_digest)

    async def _fetch(self, version: RegisteredVersion) -> None:
        """Brings one version into the engine; then looks at the registry again, since that may have taken long."""
        try:
            resident = await self._residents.take(version, lambda: self._wants(version))
        except VersionRefused as error:
            resident = None
            self._refuse(version, error)
        except Exception as error:
            resident = None
            logger.exception("%s: unexpected error", version.label)
            self._refuse(version, VersionRefused("bug", f"a fault in tuneserve ({error!r}); report it with the server's log"))
        finally:
            del self._arrivals[version.key]
        if resident:
            await self.sync()
            if self.registry_error and self.wanted:
                self._apply(self.wanted)
        elif self.wanted and self.wanted.exists:
            self._report_state(self.wanted)

    def _wants(self, version: RegisteredVersion) -> bool:
        wanted = self.wanted
        return wanted is not None and version.key in {each.key for each in filter(None, (wanted.champion, wanted.candidate, *wanted.pinned))}

    def _refuse(self, version: RegisteredVersion, error: VersionRefused, attempts: int | None = None) -> None:
        """Marks a version; the next attempt waits twice as long, but with 0 `attempts` (its entry alone was looked at) not at all."""
        before = self._refusals.get(version.key)
        attempts = (before.attempts if before else 0) + 1 if attempts is None else attempts
        message = str(error) if str(error).startswith(version.label) else f"{version.label}: {error}"
        self._refusals[version.key] = Refusal(error.code, message, attempts, time.monotonic() + min(2**attempts, MAX_BACKOFF_SECONDS))
        if before is None or before.code != error.code:
            self._refused(self.name, error.code)

    def unname(self, digest: str) -> None:
        """Gives up the previous champion, if that is its digest, because its place is needed."""
        if self.saved.previous and self.saved.previous.digest == digest:
            saved = self.saved
            self.saved = Saved(saved.champion, saved.candidate, None, saved.pinned, saved.percent, saved.off)
            self._set_names()

    def _set_names(self) -> None:
        """Makes the server's names those of `saved`."""
        saved = self.saved
        by_number: dict[str, Live] = {}
        for live in filter(None, (saved.champion, saved.candidate, *saved.pinned, saved.previous)):
            by_number.setdefault(live.version, live)  # MLflow may have given the previous one's number again
        routes = {f"{self.name}/{number}": self._version_route(live) for number, live in by_number.items()}
        if saved.champion:
            routes[self.name] = self._route(saved, saved.champion)
            self.off_reason = routes[self.name].off
        self._names.set(self.name, routes)
        needed = [live.digest for live in filter(None, (saved.champion, saved.candidate, *saved.pinned))]
        self._residents.keep(self.name, needed, [saved.previous.digest] if saved.previous else [])

    def _route(self, saved: Saved, champion: Live) -> Route:
        switches = Wanted(True, off=saved.off)
        candidate = saved.candidate if saved.candidate and not switches.version_off(*saved.candidate.key) else None
        off = _why_off(self.name, switches.model_off()) or _why_off(f"{self.name}/{champion.version}", switches.version_off(*champion.key))
        fallback: ServedAdapter | Any = self._settings.disabled_answers
        if fallback == "previous":
            previous = saved.previous if saved.previous and not switches.version_off(*saved.previous.key) else None
            fallback = self._adapter(previous) if previous else "error"
        return Route(self.name, self._adapter(champion), self._adapter(candidate) if candidate else None, saved.percent / 100, off, fallback)

    def _version_route(self, live: Live) -> Route:
        switches = Wanted(True, off=self.saved.off)
        off = _why_off(self.name, switches.model_off()) or _why_off(f"{self.name}/{live.version}", switches.version_off(*live.key))
        return Route(self.name, self._adapter(live), off=off)

    def _adapter(self, live: Live) -> ServedAdapter:
        return self._residents.held(live.digest).adapter(self.name, live.version)

    def _check_entry(self, version: RegisteredVersion) -> None:
        """Raises VersionRefused if the version's entry alone forbids serving it."""
        if fault := next(entry_faults(version, self._settings.base_revision, self._settings.template_digest, self._taken_names), None):
            raise VersionRefused(fault.code, str(fault))

    def _report(self, code: str | None, error: str | None, refused: RegisteredVersion | None = None) -> bool:
        """Makes `error` what status shows; logs it, and returns True, only if it is news. `refused` is the version that it keeps from being served."""
        news = error != self.error
        if news and error:
            fields = {"event": "adapter refused", "version": refused.version, "digest": refused.digest} if refused else {"event": "following disturbed"}
            logger.warning("%s", error, extra={"model": self.name[:80], "code": code, **fields})
        self.error, self.code = error, code
        return news

    def status(self, in_flight: Callable[[str], int] = lambda digest: 0) -> dict[str, Any]:
        """What GET /adapters shows of this model. `in_flight`: generations under way with the adapter of that digest."""
        wanted, saved, now = self.wanted, self.saved, time.monotonic()
        candidate = wanted.candidate if wanted else None
        roles = {"champion": saved.champion, "candidate": saved.candidate, "previous": saved.previous}
        by_role = [*roles.items(), *(("pinned", live) for live in saved.pinned)]
        served = list({live.key: (role, live) for role, live in reversed(by_role) if live}.values())[::-1]
        return {
            "wanted": _entry(wanted.champion) if wanted and wanted.champion else None,
            "live": self._live_entry(saved.champion),
            "candidate": {
                "wanted": {**_entry(candidate), "percent": wanted.percent} if wanted and candidate else None,
                "live": {**self._live_entry(saved.candidate), "percent": saved.percent} if saved.candidate else None,
            },
            "versions": [self._version_entry(role, live, in_flight) for role, live in served],
            "refused": [
                {
                    "version": version,
                    "digest": digest,
                    "code": refusal.code,
                    "message": refusal.message,
                    "attempts": refusal.attempts,
                    "retry_in_seconds": round(max(0.0, refusal.retry_at - now), 1),
                }
                for (version, digest), refusal in self._refusals.items()
            ],
            "disabled": {
                "model": asdict(off) if (off := Wanted(True, off=saved.off).model_off()) else None,
                "versions": {live.version: asdict(off) for _, live in served if (off := Wanted(True, off=saved.off).version_off(*live.key))},
            },
            "arriving": [f"{self.name}/{version}" for version, _ in self._arrivals],
            "error": self.error,
            "code": self.code,
        }

    def _live_entry(self, live: Live | None) -> Any:
        if live is None:
            return None
        return {"version": live.version, "digest": live.digest, "engine_name": engine_name(self.name, *live.key), "loaded_at": live.loaded_at}

    def _version_entry(self, role: str, live: Live, in_flight: Callable[[str], int]) -> dict[str, Any]:
        resident: Resident | None = self._residents.get(live.digest)
        verified = {key: round(value, 6) for key, value in asdict(resident.verification).items()} if resident else None
        entry = {"version": live.version, "digest": live.digest, "engine_name": engine_name(self.name, *live.key), "role": role}
        return {
            **entry,
            "in_flight": in_flight(live.digest),
            "verified": verified,
            "fault": resident.fault if resident else None,
            "mended": resident.mended if resident else None,
        }


def _entry(version: RegisteredVersion) -> dict[str, Any]:
    return {"version": version.version, "digest": version.digest}


def _why_off(name: str, off: Disabled | None) -> str | None:
    """For the client: which name is off, since when, by whom and why."""
    if off is None:
        return None
    details = [f"since {off.at}" if off.at else "", f"by {off.by}" if off.by else "", off.reason]
    return f"The model `{name}` is switched off ({'; '.join(filter(None, details)) or 'no reason was given'})."
