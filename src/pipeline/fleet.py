"""The replicas of one serving recipe: where they are, asked side by side, and whether each is ready, away or not ours."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

import httpx

from pipeline import services
from pipeline.project import TOKEN_VARIABLE, Project
from pipeline.recipe import ServingRecipe
from pipeline.serving.client import Replica, ReplicaError, ReplicaStatus, State, new_client
from pipeline.serving.launch import SERVICE_PREFIX, adapters_token

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """What one replica said. `why` it is not ready, '' if it is; `status` is None where it said nothing."""

    url: str
    state: State
    why: str
    status: ReplicaStatus | None


def look(url: str, ask: Callable[[], ReplicaStatus]) -> Look:
    """The answer, or the failure, of one question to the replica at `url`."""
    try:
        status = ask()
    except ReplicaError as error:
        return Look(url, error.state, str(error), None)
    return Look(url, "ready", "", status) if status.ready else Look(url, "not-ready", f"replica {url} is not ready: {status.waiting}", status)


class Fleet:
    """The replicas at `addresses`, with a thread each: they are asked at once. Close it, or use it as a context.

    `listed`: they were named, so each must follow what is promoted; else they are what runs here, and those that do not follow it do not count.
    `unreachable_fails`: a change is refused while one of them cannot be reached or is not ready.
    """

    def __init__(
        self, addresses: Sequence[str], token: str, *, listed: bool = True, unreachable_fails: bool = False, client: httpx.Client | None = None
    ) -> None:
        self.listed, self.unreachable_fails = listed, unreachable_fails
        self._client = client or new_client()
        replicas: list[Replica] = []
        self.unresolved: list[Look] = []
        """The names that have no address."""
        for address in addresses:
            try:
                replicas += [Replica(url, token, self._client, server_name) for url, server_name in resolve(address)]
            except OSError as error:
                self.unresolved.append(Look(address, "unreachable", f"{address}: the name has no address ({error.strerror or error}); is a replica up?", None))
        self.replicas = tuple({replica.url: replica for replica in replicas}.values())
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self.replicas)), thread_name_prefix="replica")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def each(self, ask: Callable[[Replica], T], replicas: Sequence[Replica] | None = None) -> Iterator[T]:
        """Asks every replica (or these) at once; the answers as they come. All have been asked when this returns."""
        futures = [self._pool.submit(ask, replica) for replica in (self.replicas if replicas is None else replicas)]
        return (future.result() for future in as_completed(futures))

    def looks(self) -> list[Look]:
        """What every replica says now, by address. Their connections are open afterwards, for what follows soon."""
        found = self.each(lambda replica: look(replica.url, replica.status))
        return sorted([*found, *self.unresolved], key=lambda each: each.url)

    def hint(self, name: str, alias: str, version: str) -> list[Look]:
        """One hint to every replica at once, and what each says then."""
        return list(self.each(lambda replica: look(replica.url, lambda: replica.hint(name, alias, version))))


def resolve(address: str) -> list[tuple[str, str | None]]:
    """The base URLs that a recipe's address stands for, each with the host whose certificate it must show if the URL has another. Raises OSError (no address)."""
    parts = urlsplit(address)
    if not parts.scheme.startswith("dns"):
        return [(address.rstrip("/"), None)]
    secure = parts.scheme == "dns+https"
    port = parts.port or (443 if secure else 80)
    found = dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM))
    hosts = [f"[{host}]" if ":" in host else host for host in found]
    return [(f"{'https' if secure else 'http'}://{host}:{port}", f"{parts.hostname}:{port}" if secure else None) for host in hosts]


def addresses_of(project: Project, recipe: ServingRecipe | None, urls: Sequence[str]) -> list[str] | None:
    """Where to look: `urls`, else what the recipe lists, else its server here. None without a recipe: whatever runs here (`open_fleet`)."""
    if urls or recipe is None:
        return list(urls) or None
    running = services.find_service(project, SERVICE_PREFIX + recipe.name)
    return list(recipe.replicas) or ([running.url] if running else [])


def open_fleet(project: Project, addresses: Sequence[str] | None, *, unreachable_fails: bool = False) -> Fleet:
    """The replicas at `addresses`, or without any this project's running servers, opened with this project's token. Makes nothing."""
    made = project.token.is_file() or os.environ.get(TOKEN_VARIABLE)  # no server of ours has started without one, so any word is as wrong
    token = adapters_token(project).read_text("utf-8").strip() if made else "none"
    if addresses is None:
        return Fleet([found.url for found in services.find_services(project, SERVICE_PREFIX)], token, listed=False, unreachable_fails=unreachable_fails)
    return Fleet(addresses, token, unreachable_fails=unreachable_fails)
