"""What is measured against what: arms, each a server and the models that it is asked for in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from pipeline.errors import Fault, InvalidInput, ServingError

BASE, ONE, MIXED = FOUND = ("base", "one", "mixed")
"""The arms that are found out from a server: its base model, one adapter, and several in turn."""
MAX_MIXED = 8
LOOK_SECONDS = 10.0


@dataclass(frozen=True)
class Arm:
    """Request i of a load asks `models[i % len(models)]` at `url`."""

    name: str
    url: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Server:
    """What a server says of itself. `adapters` maps the shortest name of each adapter to what it stands for; `version`: vLLM's, None if it says none."""

    url: str
    version: str | None
    bases: tuple[str, ...]
    adapters: Mapping[str, str]
    names: frozenset[str]
    """All that it can be asked for."""
    max_tokens: int | None = None
    """Of prompt and answer together."""


def base_url(text: str, option: str = "--url") -> str:
    """`text` as a server's base URL, without a `/v1` at its end. Raises InvalidInput."""
    url = text.strip().rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise InvalidInput(
            [Fault(option, "", "the address holds a password, which would stand in the result; leave it out and name a variable: --api-key-env")]
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidInput([Fault(option, "", f"'{text}' is no server's address; give http://HOST:PORT, for example http://127.0.0.1:8000")])
    return url


def parse_arm(text: str, url: str) -> Arm | str:
    """An arm that is given as NAME=MODEL[,MODEL...] (at `url`) or NAME=URL#MODEL[,MODEL...], or the name of one to be found out. Raises InvalidInput."""
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals:
        if name in FOUND:
            return name
        raise InvalidInput(
            [Fault("--arm", "", f"'{text}' is none of {', '.join(FOUND)}; another arm says what it asks: {name or 'NAME'}=MODEL or NAME=URL#MODEL")]
        )
    if rest.startswith(("http://", "https://")):
        server, _, rest = rest.partition("#")
        url = base_url(server, "--arm")
    models = tuple(filter(None, (model.strip() for model in rest.split(","))))
    if not name or not models:
        raise InvalidInput(
            [Fault("--arm", "", f"'{text}' names no model; give NAME=MODEL[,MODEL...] or NAME=URL#MODEL, for example merged=http://127.0.0.1:9000#shop")]
        )
    return Arm(name, url, models)


def read_server(url: str, headers: Mapping[str, str]) -> Server:
    """Asks GET /v1/models and /version. Raises ServingError if no OpenAI-compatible server answers there."""
    with httpx.Client(base_url=url, headers=headers, timeout=LOOK_SECONDS, trust_env=False) as http:
        try:
            answer = http.get("/v1/models")
            said = http.get("/version")
        except httpx.HTTPError as error:
            raise ServingError(
                f"{url} cannot be reached ({str(error) or type(error).__name__}); start the server (tuneserve serve RECIPE), or correct the URL"
            ) from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServingError(f"{url} wants a key ({answer.status_code}); name the variable that holds it: --api-key-env VARIABLE")
    try:
        cards = answer.raise_for_status().json()["data"]
        return _server(url, _version(said), cards)
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise ServingError(f"{url} answers, but its GET /v1/models is not what an OpenAI-compatible server says; correct the URL") from error


def _version(said: httpx.Response) -> str | None:
    try:
        version = said.json()["version"]
    except (ValueError, KeyError, TypeError):  # only vLLM has the route
        return None
    return version if isinstance(version, str) else None


def _server(url: str, version: str | None, cards: Sequence[Mapping[str, Any]]) -> Server:
    """A card with a parent is an adapter; one that has several names (NAME, NAME/VERSION) stands under each of them."""
    bases = [card["id"] for card in cards if not card.get("parent")]
    adapters: dict[str, str] = {}
    for card in sorted((card for card in cards if card.get("parent")), key=lambda card: (len(card["id"]), card["id"])):
        stands_for = card.get("root") or card["id"]
        if stands_for not in adapters.values():
            adapters[card["id"]] = stands_for
    limits = [card["max_model_len"] for card in cards if card.get("max_model_len")]
    return Server(url, version, tuple(bases), dict(sorted(adapters.items())), frozenset(card["id"] for card in cards), min(limits, default=None))


def found_arms(server: Server) -> dict[str, Arm]:
    """The arms that a server has: `base`; `one` if it serves an adapter; `mixed` if it serves several, up to MAX_MIXED of them in turn."""
    adapters = tuple(server.adapters)
    found = {BASE: server.bases[:1], ONE: adapters[:1], MIXED: adapters[:MAX_MIXED] if len(adapters) > 1 else ()}
    return {name: Arm(name, server.url, models) for name, models in found.items() if models}


def choose_arms(given: Sequence[Arm | str], url: str, servers: Mapping[str, Server]) -> list[Arm]:
    """The arms to measure: those `given`, or without any all that the server at `url` has. Raises InvalidInput for what a server does not serve, all at once."""
    found = found_arms(servers[url]) if url in servers else {}
    faults: list[Fault] = []
    chosen: list[Arm] = []
    for arm in given or tuple(found):
        if isinstance(arm, Arm):
            server = servers[arm.url]
            faults += [
                Fault("--arm", arm.name, f"{model} is not served at {arm.url}; it serves {_listing(server)}")
                for model in arm.models
                if model not in server.names
            ]
            chosen.append(arm)
        elif arm in found:
            chosen.append(found[arm])
        else:
            faults.append(
                Fault(
                    "--arm",
                    arm,
                    f"{url} has too few adapters for it; it serves {_listing(servers[url])}: promote one (tuneserve promote NAME), or leave it out",
                )
            )
    names = [arm.name for arm in chosen]
    faults += [Fault("--arm", name, "is given twice; give each arm a name of its own") for name in sorted({name for name in names if names.count(name) > 1})]
    if faults:
        raise InvalidInput(faults)
    if not chosen:
        raise ServingError(f"{url} serves no model, so there is nothing to measure; wait until it is ready, or correct the URL")
    return chosen


def _listing(server: Server) -> str:
    names = sorted(server.names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
