"""Whether a recipe is due: what has changed since its model's newest version, and whether that version still has to pass the gate. Pure and total.

Nothing is kept beside the registry: a version with the same input digest is trained already, and a history entry with the same gate digest says what
came of comparing it. So a killed run goes on from the last finished stage, and nothing is trained or promoted twice.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.comparison import Comparison
from pipeline.decision import Reason
from pipeline.history import Entry
from pipeline.recipe import DriftRules, FinetuneRecipe, PromotionRules

LIBRARIES = "libraries-changed"
"""The code of the one change that is told and is no reason to train: a patched library must not cost a training. --force trains anew."""
CHECKPOINT_STEPS, EARLY_STOPPING = "training.checkpoint_steps", "training.early_stopping"
UNDECIDING = ("name", "base_model", "licence", "dataset.", "promotion.", "drift", "training.offload_checkpoints", CHECKPOINT_STEPS)
"""Beginnings of recipe keys that do not change what a training makes (checkpoints do where early stopping chooses one). Rows and base are told by their digests."""
NOT_ON_RECORD = "not on record"
MAX_PARAM_CHARACTERS = 6000
"""What the registry keeps of a recipe's value."""
UNSERVED_RULES = frozenset({"approval", "approval_days", "watch"})
"""Promotion rules that say what follows the comparison, not how it comes out."""
SHOWN_CHARACTERS = 60

DRIFTED, NO_DRIFT, DRIFT_UNKNOWN = "drifted", "no-drift", "drift-unknown"

GateStep = Literal["gate", "nothing"]


def lineage_now(params: Mapping[str, object], tags: Mapping[str, str]) -> dict[str, str]:
    """What `Registry.lineage` would say of a version that was trained now: the flat recipe and the lineage's tags."""
    return {**{key: str(value)[:MAX_PARAM_CHARACTERS] for key, value in params.items()}, **tags}


def changes(before: Mapping[str, str] | None, now: Mapping[str, str], label: str = "the newest version") -> tuple[Reason, ...]:
    """What is other `now` than it was for the version called `label` (None: there is none), both as `Registry.lineage` says it; () if training made the same again."""
    if before is None:
        return (Reason("no-version", "no version is registered yet"),)
    if not before.get("input_digest"):
        return (Reason("origin-unknown", f"what {label} was trained from is {NOT_ON_RECORD}"),)
    if before["input_digest"] == now["input_digest"]:
        return ()
    found = [*_rows(before, now), *_base(before, now), *settings_changed(before, now)]
    return tuple(found or [Reason(LIBRARIES, _libraries(before, now))])


def due(found: Sequence[Reason]) -> bool:
    """Whether these changes are a reason to train."""
    return any(reason.code != LIBRARIES for reason in found)


def _rows(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Reason]:
    if before.get("dataset_train_digest") == now["dataset_train_digest"]:
        return
    if "dataset_train_digest" not in before and before.get("dataset_digest") == now["dataset_digest"]:
        return  # by a tuneserve that did not write down the training rows' own
    old, new = (int(count) if (count := lineage.get("dataset_train_rows", "")).isdecimal() else 0 for lineage in (before, now))
    if new > old:
        yield Reason("rows-added", f"{new - old} training rows more ({old} -> {new})")
    elif new < old:
        yield Reason("rows-removed", f"{old - new} training rows fewer ({old} -> {new})")
    else:
        yield Reason("rows-changed", f"of the {new} training rows some changed")


def _base(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Reason]:
    for key, code, what in (("base_revision", "base-changed", "base model's revision"), ("template_digest", "template-changed", "prompt template")):
        old, new = before.get(key, "unknown"), now[key]
        if old != new:
            yield Reason(code, f"the {what} is another ({old[:12]} -> {new[:12]})")


def settings_changed(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Reason]:
    """One reason if the recipe's keys that decide what a training makes have other values. Keys that an older tuneserve did not know are no change: they have the values that it meant."""
    undeciding = [key for key in UNDECIDING if key != CHECKPOINT_STEPS or now.get(EARLY_STOPPING) == "None"]
    keys = [key for key in before if key.partition(".")[0] in FinetuneRecipe.model_fields and not key.startswith(tuple(undeciding))]
    if changed := sorted(key for key in keys if before[key] != now.get(key)):
        said = ", ".join(f"{key} {_short(before[key])} -> {_short(now.get(key, 'another'))}" for key in changed)
        yield Reason("recipe-changed", f"the recipe says otherwise: {said}")


def _libraries(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = sorted({key for key in (*before, *now) if key.startswith("version.") and before.get(key) != now.get(key)})
    said = [f"{key.removeprefix('version.')} {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in names]
    return f"only libraries changed ({', '.join(said) or NOT_ON_RECORD}), which is no reason to train; --force does"


def _short(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."


@dataclass(frozen=True)
class Promoted:
    """When a version was made champion on grounds that were measured, unix time, and its value of the metric then."""

    at: float
    value: float


def promoted(entries: Sequence[Entry], version: tuple[str, str], metric: str) -> Promoted | None:
    """The last time for this version (number and digest); None if it only became champion by force, by hand or by another metric. `entries` as `history` gives them."""
    for entry in entries:
        if entry.action == "promoted" and not entry.open and (entry.version, entry.digest) == version:
            try:
                return Promoted(entry.at, float(json.loads(entry.grounds.scores)[metric]["version"]))
            except (ValueError, KeyError, TypeError):
                continue
    return None


def drift(label: str, now: Comparison, rules: DriftRules) -> Reason:
    """Whether the champion `label` has become worse: by `rules.drop` in the mean, and surely worse at all. `now` is it on rows approved since, against its value at promotion."""
    said = f"{label} on {now.examples} rows approved since its promotion: {now.mean:.1%}, at its promotion {now.other_mean:.1%}, {now.gain:+.1%} [{now.low:+.1%}, {now.high:+.1%}]"
    return Reason(DRIFTED if now.gain <= -rules.drop and now.high < 0 else NO_DRIFT, said)


def gate_digest(version_digest: str, champion_digest: str | None, dataset_digest: str, rules: PromotionRules) -> str:
    """SHA-256 over all that decides how the gate comes out, but for float noise: the two adapters, the rows, and what the recipe asks."""
    content = [version_digest, champion_digest, dataset_digest, rules.model_dump(mode="json", exclude=set(UNSERVED_RULES))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def gate_step(version: tuple[str, str], champion: str | None, entries: Sequence[Entry], gate: str, *, asked: bool = False) -> tuple[GateStep, Reason]:
    """Whether a version (number and digest) is to be compared, now that `champion` is the champion's number, and why; `entries` is the history, newest first.

    `gate` is the digest of what would be compared: what it came to once is not asked again. `asked`: it has an open request for approval. A version that
    people or the watch took out stays out.
    """
    number = version[0]
    about = [entry for entry in entries if (entry.version, entry.digest) == version]
    if any(entry.open for entry in about):
        return "gate", Reason("interrupted", "its promotion was interrupted, and is seen through")
    if champion == number:
        return "nothing", Reason("is-champion", "it is the champion")
    if told := next((entry for entry in about if entry.grounds.gate == gate and entry.action != "failed" and (asked or entry.action != "requested")), None):
        return "nothing", _told(told)
    if entries and entries[0].after == number:
        return "nothing", Reason("taken-out", "the alias was moved away from it outside tuneserve")
    if taken := _taken_out(number, entries):
        return "nothing", Reason("taken-out", f"it was taken out on {_day(taken)} by {taken.grounds.by or 'other hands'} ({taken.grounds.reasons})")
    return "gate", Reason("not-compared", "it was not compared with this champion, on these rows and by these rules")


def _told(entry: Entry) -> Reason:
    said = {
        "promoted": ("promoted-before", f"it was promoted on {_day(entry)} and is no champion any more"),
        "requested": ("waits-for-approval", f"it waits for approval since {_day(entry)}"),
    }
    code, text = said.get(entry.action, (f"{entry.action}-before", f"it was {entry.action} on {_day(entry)} ({entry.grounds.reasons})"))
    return Reason(code, text)


def _taken_out(number: str, entries: Sequence[Entry]) -> Entry | None:
    """The entry by which people, or the watch, made another version champion in its place, if nothing happened to it since."""
    newest = next((entry for entry in entries if number in (entry.version, entry.before)), None)
    return newest if newest and newest.action in ("rolled-back", "moved-outside") else None


def _day(entry: Entry) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(entry.at))
