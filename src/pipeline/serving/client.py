"""Talks to replicas: what each serves, and "look at the registry now"."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from pipeline.errors import ServingError
from pipeline.serving.settings import SYNC_SECONDS

TIMEOUT_SECONDS = SYNC_SECONDS + 5.0


@dataclass(frozen=True)
class Served:
    """What one replica says of one followed model: the version wanted and the version live, each as (version, digest), and why they differ."""

    wanted: tuple[str, str] | None
    live: tuple[str, str] | None
    error: str | None


@dataclass(frozen=True)
class Replica:
    """One vLLM server with our plugin; `token` opens its /adapters routes."""

    url: str
    token: str = field(repr=False)

    def sync(self) -> dict[str, Served]:
        """Has the replica read the registry now; what it serves then, by model name."""
        return self._call("POST", "/adapters/sync")

    def status(self) -> dict[str, Served]:
        """What the replica serves, by model name."""
        return self._call("GET", "/adapters")

    def _call(self, method: str, path: str) -> dict[str, Served]:
        try:
            answer = httpx.request(
                method, self.url.rstrip("/") + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=TIMEOUT_SECONDS, trust_env=False
            )
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ServingError(f"replica {self.url} cannot be reached ({error or type(error).__name__}); is it up?") from error
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ServingError(f"replica {self.url} refuses our token: it was started by another project; run this command there")
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ServingError(f"replica {self.url} serves without the tuneserve plugin; start it with `tuneserve serve`")
        if answer.status_code != httpx.codes.OK:
            raise ServingError(f"replica {self.url}: {method} {path} answered {answer.status_code}: {answer.text[:300]}")
        try:
            return {name: _served(model) for name, model in answer.json()["models"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServingError(
                f"{self.url} answers, but not as a replica does ({error!r}); give the base URL of a server started with `tuneserve serve`"
            ) from error


def _served(model: Mapping[str, Any]) -> Served:
    def version(key: str) -> tuple[str, str] | None:
        value = model[key]
        return (str(value["version"]), value["digest"]) if value else None

    return Served(version("wanted"), version("live"), model["error"])
