"""Which adapter answers a request for a served name: the champion, the canary, or what a switched-off name falls back to. Pure."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ServingError
from pipeline.serving.engine import ServedAdapter

DisabledAnswers = Literal["error", "base", "previous"]


class SwitchedOff(ServingError):
    """The name that a request asks for was switched off; the message is for the client."""


@dataclass(frozen=True)
class Route:
    """What one callable name answers with. `share` of its requests, 0 to 1, goes to `candidate`."""

    name: str
    adapter: ServedAdapter
    candidate: ServedAdapter | None = None
    share: float = 0.0
    off: str | None = None
    """Why the name is switched off, for the client; None if it is not."""
    fallback: ServedAdapter | Literal["error", "base"] = "error"
    """What it answers with while it is off."""


def choose(route: Route, key: str | None, drawn: float) -> ServedAdapter | None:
    """The adapter for one request; None is the base. `key` names the caller; without one, `drawn` (0 to 1) decides.

    Raises SwitchedOff if the name is off and does not fall back.
    """
    if route.off:
        if route.fallback == "error":
            raise SwitchedOff(route.off)
        return None if route.fallback == "base" else route.fallback
    if route.candidate is None or route.share <= 0:
        return route.adapter
    place = drawn if key is None else side(route.candidate, key)
    return route.candidate if place < route.share else route.adapter


def side(candidate: ServedAdapter, key: str) -> float:
    """The caller's place between 0 and 1, the same on every replica and for every share, so that a larger share only adds callers.

    Other candidates draw other callers: the digest is part of what is hashed.
    """
    hashed = hashlib.sha256(f"{candidate.model}\0{candidate.digest}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:8]) / 2**64
