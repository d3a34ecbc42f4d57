"""Who moved a model's champion, or tried to, when and why: one entry per attempt, kept in the registry, in the order in which the alias moved.

An entry is opened before the alias moves and closed when it is known what came of it. `settle` closes what a killed command left open, and writes down what
was moved by other hands, so that each entry begins where the one before it ended. Call it, and `recorded`, under the model's promotion lock.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pipeline.errors import RegistryError
from pipeline.journal import failure_fields

logger = logging.getLogger(__name__)
Action = Literal["promoted", "rolled-back", "kept", "refused", "failed", "moved-outside", "requested", "rejected"]
"""requested: it is better, and a person was asked; rejected: that person said no."""
NONE = "none"
OPEN = "open"
"""The state of an entry whose outcome is not known yet."""
INTERRUPTED = "interrupted; found later"


@dataclass(frozen=True)
class Grounds:
    """Why the alias should move. `scores` is JSON, `evaluation_run` the MLflow run with every answer, `gate` the digest of all that was compared (retraining.py);
    empty where nothing was measured.
    """

    by: str
    reasons: str = ""
    forced: bool = False
    scores: str = ""
    evaluation_run: str = ""
    git_commit: str = NONE
    gate: str = ""


@dataclass(frozen=True)
class Entry:
    """`version` is what it was about; the champion was `before` and was `after` when the entry was closed. Numbers; None: no champion. `at`: unix seconds."""

    id: str
    at: float
    action: Action
    version: str | None
    digest: str
    before: str | None
    after: str | None
    grounds: Grounds
    open: bool = False

    def as_dict(self) -> dict[str, Any]:
        said = asdict(self)
        return {**{key: value for key, value in said.items() if key != "grounds"}, **said["grounds"]}


class Store(Protocol):
    """Where entries are kept: `Registry`. Entries are read newest first."""

    def entries(self, name: str) -> list[tuple[str, float, Mapping[str, str]]]: ...
    def open_entry(self, name: str, label: str, tags: Mapping[str, str]) -> str: ...
    def close_entry(self, entry: str, tags: Mapping[str, str]) -> None: ...
    def champion_number(self, name: str) -> str | None: ...


def history(store: Store, name: str) -> list[Entry]:
    """Newest first."""
    return [_entry(key, at, tags) for key, at, tags in store.entries(name)]


def settle(store: Store, name: str, now: str | None, by: str) -> None:
    """Makes the history end at `now`, the champion as it stands: closes what was left open, and notes a move made outside tuneserve."""
    entries = history(store, name)
    for left in reversed([entry for entry in entries if entry.open]):
        arrived = now == left.version and left.action in ("promoted", "rolled-back")
        after = left.version if arrived else left.before
        _close(store, left.id, left.action if arrived else "failed", after, f"{left.grounds.reasons}; {INTERRUPTED}".lstrip("; "))
    entries = history(store, name)
    known = entries[0].after if entries else None
    if now != known:
        why = "the alias was moved outside tuneserve" if entries else "it was champion before a history was kept"
        _write(store, name, "moved-outside", now, "", known, now, Grounds(by, why))


@contextlib.contextmanager
def recorded(store: Store, name: str, action: Action, version: tuple[str, str], before: str | None, grounds: Grounds) -> Iterator[None]:
    """An entry around the move of `name` to `version` (number and digest): closed as `action`, or as failed, with the error's first line, if the block raises."""
    number, digest = version
    entry = store.open_entry(name, f"{action} {name}/{number}", _tags(action, number, digest, before, None, grounds) | {"state": OPEN})
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RegistryError):  # it stays open, and is settled later
            now = store.champion_number(name)
            after = now if now in (before, number) else before  # else other hands moved it, which is an entry of its own
            _close(store, entry, "failed", after, str(error).partition("\n")[0] or type(error).__name__)
            settle(store, name, now, grounds.by)
        raise
    try:
        _close(store, entry, action, number, grounds.reasons)
    except RegistryError as error:  # what was asked for is done; the entry is closed when someone looks next
        logger.warning("history not closed", extra={"model": name, "version": number, **failure_fields(error)})


def note(store: Store, name: str, action: Action, version: tuple[str, str], now: str | None, grounds: Grounds) -> None:
    """An entry about something that left the champion as it is."""
    _write(store, name, action, *version, now, now, grounds)


def _write(store: Store, name: str, action: Action, number: str | None, digest: str, before: str | None, after: str | None, grounds: Grounds) -> None:
    entry = store.open_entry(name, f"{action} {name}/{number or NONE}", _tags(action, number, digest, before, after, grounds))
    store.close_entry(entry, {"state": "closed"})


def _close(store: Store, entry: str, action: Action, after: str | None, reasons: str) -> None:
    store.close_entry(entry, {"state": "closed", "action": action, "after": after or NONE, "reasons": reasons[:4000]})


def _tags(action: Action, number: str | None, digest: str, before: str | None, after: str | None, grounds: Grounds) -> dict[str, str]:
    own = {"action": action, "version": number or NONE, "digest": digest, "before": before or NONE, "after": after or NONE}
    said = {key: str(value).lower() if isinstance(value, bool) else str(value)[:4000] for key, value in asdict(grounds).items()}
    return own | said


def _entry(key: str, at: float, tags: Mapping[str, str]) -> Entry:
    def number(tag: str) -> str | None:
        value = tags.get(tag, NONE)
        return None if value == NONE else value

    texts = {tag: tags.get(tag, "") for tag in ("by", "reasons", "scores", "evaluation_run", "gate")}
    grounds = Grounds(**texts, forced=tags.get("forced") == "true", git_commit=tags.get("git_commit", NONE))
    action: Any = tags.get("action", "failed")
    return Entry(key, at, action, number("version"), tags.get("digest", ""), number("before"), number("after"), grounds, tags.get("state") == OPEN)


def lines(name: str, entries: Sequence[Entry]) -> list[str]:
    """For a terminal, newest first."""
    found = []
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
        moved = f"{entry.before or NONE} -> {entry.after or NONE}" if entry.before != entry.after else f"stays {entry.after or NONE}"
        action = "in progress, or killed" if entry.open else entry.action + (" by force" if entry.grounds.forced else "")
        found.append(
            f"{when}  {action} {name}/{entry.version or NONE} (champion {moved}) by {entry.grounds.by or 'unknown'}: {entry.grounds.reasons or 'no reason given'}"
        )
    return found or [f"{name}: no history yet"]
