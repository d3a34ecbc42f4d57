"""The requests under way: what each asked for and got, so that a version is only forgotten when no request can still mean it."""

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

UNDECIDED_SECONDS = 60.0
"""A request that has not chosen its adapter by then no longer holds a version back: a client may send its body as slowly as it likes."""


@dataclass(eq=False, slots=True)
class Request:
    """One HTTP request. It has `chosen` once its adapter, or the base, is settled."""

    key: str | None = None
    """The caller as the sticky header names it."""
    arrived: float = field(default_factory=time.monotonic)
    arrived_wall: float = field(default_factory=time.time)
    chosen: bool = False
    lora_id: int | None = None
    served: str = "-"
    """The registered model or base that it asked for; `-` while that is unknown."""
    version: str = "-"
    by_name: bool = False
    """Whether it asked for a model by its name, and not for one of its versions."""
    drawn: float | None = None
    """Its lot in a canary, drawn once, so that however often it asks it stays on one side."""
    may_ask_again: bool = True
    """Nothing of its answer has been sent yet, and it is asked for the first time."""
    dropped: bool = False
    """The engine gave a generation of it up before the first token, and it is to be asked again."""

    def ask_again(self) -> None:
        """As before it had chosen its adapter, but for the time of its arrival and its lot."""
        self.may_ask_again = self.dropped = False
        self.chosen, self.lora_id, self.served, self.version, self.by_name = False, None, "-", "-", False


class Traffic:
    """Open HTTP requests and running generations of one server; for the event loop alone."""

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras
        self.misses = 0
        """Generations whose adapter was not among the `max_loras` used last: it is copied into a slot first."""
        self.waits = 0
        """Generations that began while `max_loras` others were running adapters of their own: they wait for a slot."""
        self._open: set[Request] = set()
        self._running: Counter[int] = Counter()
        self._recent: OrderedDict[int, None] = OrderedDict()

    def open(self, request: Request) -> None:
        self._open.add(request)

    def close(self, request: Request) -> None:
        self._open.discard(request)

    def enter(self, lora_id: int) -> tuple[bool, bool]:
        """A generation with that adapter begins; whether it misses a slot, and whether it must wait for one."""
        waits = lora_id not in self._running and len(self._running) >= self.max_loras
        misses = lora_id not in self._recent
        self._running[lora_id] += 1
        self._recent[lora_id] = None
        self._recent.move_to_end(lora_id)
        while len(self._recent) > self.max_loras:
            self._recent.popitem(last=False)
        self.misses += misses
        self.waits += waits
        return misses, waits

    def leave(self, lora_id: int) -> None:
        self._running[lora_id] -= 1
        if self._running[lora_id] <= 0:
            del self._running[lora_id]

    def running(self, lora_id: int) -> int:
        """Generations under way with that adapter."""
        return self._running[lora_id]

    def forgotten(self, lora_id: int) -> None:
        self._recent.pop(lora_id, None)

    def may_mean(self, lora_id: int, unnamed_since: float, now: float | None = None) -> bool:
        """Whether some request can still use the adapter, whose names are gone since `unnamed_since` (monotonic clock).

        One that is running, or has chosen it, can; so can one that was here before the names went and has not chosen yet.
        """
        now = time.monotonic() if now is None else now
        undecided = now - unnamed_since < UNDECIDED_SECONDS
        return lora_id in self._running or any(
            request.lora_id == lora_id or (undecided and not request.chosen and request.arrived <= unnamed_since) for request in self._open
        )
