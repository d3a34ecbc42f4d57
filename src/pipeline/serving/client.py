"""Talks to replicas: what each serves, and "look at the registry now"."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from pipeline.errors import ServingError

TIMEOUT_SECONDS = 15.0


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
    token: str

    def sync(self) -> dict[str, Served]:
        """Has the replica read the registry now; what it serves then, by model name."""
        return self._call("POST", "/adapters/sync")

    def status(self) -> dict[str, Served]:
        """What the replica serves, by model name."""
        return self._call("GET", "/adapters")

    def _call(self, method: str, path: str) -> dict[str, Served]:
        try:
            answer = httpx.request(method, self.url + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=TIMEOUT_SECONDS, trust_env=False)
        except httpx.TransportError as error:
            raise ServingError(f"replica {self.url} cannot be reached ({error or type(error).__name__}); is it up?") from error
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ServingError(f"replica {self.url} refuses our token: it was started by another project; run this command there")
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise ServingError(f"replica {self.url} serves without the tuneserve plugin; start it with `tuneserve serve`")
        if answer.status_code != httpx.codes.OK:
            raise ServingError(f"replica {self.url}: {method} {path} answered {answer.status_code}: {answer.text[:300]}")
        return {name: _served(model) for name, model in answer.json()["models"].items()}


def _served(model: Mapping[str, Any]) -> Served:
    def version(key: str) -> tuple[str, str] | None:
        value = model[key]
        return (str(value["version"]), value["digest"]) if value else None

    return Served(version("wanted"), version("live"), model["error"])
