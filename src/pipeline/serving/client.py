"""Talks to replicas: what each serves, whether it is ready, and "look at the registry now"."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ServingError
from pipeline.reference import Replayed
from pipeline.serving.hint import new_hint
from pipeline.serving.settings import KEEP_ALIVE_SECONDS, SYNC_SECONDS
from pipeline.switch import Disabled

CONNECT_SECONDS = 2.0
"""A replica that is gone must not hold the others up."""
STATUS_SECONDS = 5.0
HINT_SECONDS = SYNC_SECONDS + 5.0
METRICS_SECONDS = 2.0
"""A look at counters is one of many: a replica that is slow to answer is asked again at the next."""
PARITY_SECONDS = 300.0
"""One prompt, twice through the engine, perhaps behind users' requests."""

State = Literal["ready", "not-ready", "unreachable", "refuses-us"]
"""refuses-us: something answers there, but not us: it has another token, or it is no replica of ours."""


class ReplicaError(ServingError):
    """A replica did not say what it serves; `state` is what that makes it."""

    def __init__(self, state: State, message: str) -> None:
        self.state: State = state
        super().__init__(message)


class _Part(BaseModel):
    """A part of a replica's answer. What a newer replica says beside it is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class ServedVersion(_Part):
    """A version as wanted or as live; `percent` is the canary's share."""

    version: str
    digest: str | None = None
    engine_name: str = ""
    loaded_at: str | None = None
    percent: float | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """Number and digest: the number alone may mean other weights tomorrow."""
        return self.version, self.digest


class Candidate(_Part):
    wanted: ServedVersion | None = None
    live: ServedVersion | None = None


class Verification(_Part):
    differs_by: float | None = None
    noise: float | None = None
    others_moved_by: float | None = None
    modules: int | None = None
    seconds: float | None = None


class CallableVersion(_Part):
    """A version that clients may call by number. `fault`: what is wrong with its folder on the replica."""

    version: str
    digest: str | None = None
    engine_name: str = ""
    role: str = ""
    in_flight: int = 0
    verified: Verification | None = None
    fault: str | None = None


class Refusal(_Part):
    version: str
    digest: str | None = None
    code: str | None = None
    message: str = ""
    attempts: int = 1
    retry_in_seconds: float | None = None


class SwitchedOff(_Part):
    model: Disabled | None = None
    versions: Mapping[str, Disabled] = Field(default_factory=dict)


class ServedModel(_Part):
    """One followed model. `live` is what its name answers with, switched off or not; `error` and `code` say why it is not as the registry wants it."""

    wanted: ServedVersion | None = None
    live: ServedVersion | None = None
    candidate: Candidate | None = None
    versions: tuple[CallableVersion, ...] = ()
    refused: tuple[Refusal, ...] = ()
    disabled: SwitchedOff | None = None
    error: str | None = None
    code: str | None = None

    @property
    def live_candidate(self) -> ServedVersion | None:
        return self.candidate.live if self.candidate else None

    @property
    def off(self) -> SwitchedOff:
        return self.disabled or SwitchedOff()

    def entry(self, version: ServedVersion) -> CallableVersion | None:
        """The callable version that `version` is."""
        return next((found for found in self.versions if (found.version, found.digest) == version.key), None)

    def refusal(self, version: str, digest: str | None) -> Refusal | None:
        return next((found for found in self.refused if (found.version, found.digest) == (version, digest)), None)


class Slots(_Part):
    """Places for adapters on the engine. `digests`: of those there, also while they are being forgotten; `misses`: a request's adapter had to be brought in; `waits`: a request waited for a place."""

    max_loras: int | None = None
    max_cpu_loras: int | None = None
    resident: int | None = None
    digests: tuple[str, ...] = ()
    forgetting: int = 0
    misses: int = 0
    waits: int = 0


class Cache(_Part):
    folders: int = 0
    bytes: int = 0
    limit_bytes: int | None = None


class ReplicaStatus(_Part):
    """What GET /adapters and POST /adapters/sync answer."""

    models: Mapping[str, ServedModel]
    ready: bool = True
    waits_for: Mapping[str, str] = Field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    pid: int | None = None
    last_sync_age_seconds: float | None = None
    mlflow_error: str | None = None
    state_error: str | None = None
    slots: Slots = Slots()
    cache: Cache = Cache()

    @property
    def waiting(self) -> str:
        """Why it is not ready, as a sentence's part."""
        return "; ".join(f"{name}: {why}" for name, why in self.waits_for.items()) or "it does not say what it waits for"


def new_client() -> httpx.Client:
    """Connections for any number of replicas and threads: making one takes 20 ms, which must not pass between an alias and its hints."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
    return httpx.Client(timeout=httpx.Timeout(STATUS_SECONDS, connect=CONNECT_SECONDS), limits=limits, trust_env=False)


@dataclass(frozen=True)
class Replica:
    """One vLLM server with our plugin. `token` opens its /adapters routes and signs hints; `server_name` is whose certificate it shows, where `url` has an address.

    Every method raises ReplicaError.
    """

    url: str
    token: str = field(repr=False)
    client: httpx.Client = field(default_factory=new_client, repr=False, compare=False)
    server_name: str | None = None

    def status(self) -> ReplicaStatus:
        """What the replica serves."""
        return self._status("GET", "/adapters")

    def ready(self) -> bool:
        """Whether it serves everything that it should; a server without our plugin does not."""
        return self._call("GET", "/adapters/ready").status_code == httpx.codes.OK

    def hint(self, name: str, alias: str, version: str) -> ReplicaStatus:
        """Has the replica read the registry now, since `alias` of `name` points to `version`; what it serves then."""
        body, headers = new_hint(self.token, name, alias, version)
        return self._status("POST", "/adapters/sync", body, headers)

    def parity(self, model: str, messages: Sequence[Mapping[str, Any]], answer_tokens: Sequence[int]) -> Replayed:
        """What the replica makes of a chat prompt (images as data URLs), and the log-probabilities of an answer for the base and for `model`: a callable version or name."""
        body = json.dumps({"model": model, "messages": list(messages), "answer_tokens": list(answer_tokens)}).encode()
        answer = self._call("POST", "/adapters/parity", body, {"Content-Type": "application/json"}, PARITY_SECONDS)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise ReplicaError("not-ready", f"replica {self.url} is still starting; look at its log if it stays so")
        try:
            return Replayed.model_validate_json(answer.content)
        except ValidationError as error:
            raise ReplicaError(
                "refuses-us", f"{self.url} answers, but not as a replica does; give the base URL of a server started with `tuneserve serve`"
            ) from error

    def metrics(self) -> str:
        """What it has counted, in Prometheus' text format."""
        answer = self._call("GET", "/metrics", seconds=METRICS_SECONDS)
        if answer.status_code != httpx.codes.OK:
            raise ReplicaError("not-ready", f"replica {self.url}: GET /metrics answered {answer.status_code}")
        return answer.text

    def _status(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> ReplicaStatus:
        answer = self._call(method, path, body, headers)
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise ReplicaError("not-ready", f"replica {self.url} is still starting; look at its log if it stays so")
        try:
            return ReplicaStatus.model_validate(answer.json())
        except (ValueError, ValidationError) as error:
            wrong = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else "no JSON"
            raise ReplicaError(
                "refuses-us", f"{self.url} answers, but not as a replica does ({wrong}); give the base URL of a server started with `tuneserve serve`"
            ) from error

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, seconds: float | None = None
    ) -> httpx.Response:
        """The answer, 200 or 503."""
        sent = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        extensions: dict[str, str] = {}
        if self.server_name:
            sent["Host"], extensions = self.server_name, {"sni_hostname": self.server_name.rpartition(":")[0]}
        timeout = httpx.Timeout(seconds or (STATUS_SECONDS if method == "GET" else HINT_SECONDS), connect=CONNECT_SECONDS)
        try:
            answer = self.client.request(method, self.url.rstrip("/") + path, content=body, headers=sent, timeout=timeout, extensions=extensions)
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ReplicaError("unreachable", f"replica {self.url} cannot be reached ({str(error) or type(error).__name__}); is it up?") from error
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            reason = f": {answer.text[:200]}" if method == "POST" else ""
            raise ReplicaError(
                "refuses-us", f"replica {self.url} refuses our token{reason}; run this in the project that started it, with its .tuneserve/token"
            )
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ReplicaError("refuses-us", f"replica {self.url} serves without the tuneserve plugin; start it with `tuneserve serve`")
        if answer.status_code not in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE):
            raise ReplicaError("not-ready", f"replica {self.url}: {method} {path} answered {answer.status_code}: {answer.text[:300]}")
        return answer
