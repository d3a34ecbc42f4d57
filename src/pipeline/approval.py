"""A request to promote a version, and its answer: tags on the version, so that no process waits for it and MLflow's own page can answer it.

A request is open from `ask` on until the model's history says what became of it. An answer is written before it is acted on: what a killed command left
is seen through by the next scheduled run.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.decision import Reason
from pipeline.errors import Fault, InvalidInput, RegistryError, ServingError
from pipeline.history import Entry, Grounds, history, note, settle
from pipeline.lock import Lock
from pipeline.registry import Registry, Version, label_of
from pipeline.version import APPROVAL_ANSWER_TAG, APPROVAL_REQUEST_TAG, APPROVAL_TAG

logger = logging.getLogger(__name__)
REQUESTED, APPROVED, REJECTED, LAPSED = "requested", "approved", "rejected", "lapsed"
BY_HAND = "the tag in MLflow"
"""Who answered, where no command did: MLflow does not say who set a tag."""
DAY_SECONDS = 86400
MAX_WHY_CHARACTERS = 300

Next = Literal["promote", "decline", "lapse", "wait"]


@dataclass(frozen=True)
class Request:
    """Who asked and why; `at` and `expires` in unix seconds. The version was found better than `champion` (number, or None), by what `gate` is the digest of."""

    by: str
    at: float
    expires: float
    champion: str | None
    gate: str
    reasons: str
    scores: str = ""
    evaluation_run: str = ""

    @property
    def until(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires))

    def grounds(self, by: str, reasons: str, git_commit: str) -> Grounds:
        """For the history: what was measured when it was asked, and what came of it."""
        return Grounds(by, reasons, scores=self.scores, evaluation_run=self.evaluation_run, git_commit=git_commit, gate=self.gate)


@dataclass(frozen=True)
class Answer:
    """`at` in unix seconds."""

    by: str
    at: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Approval:
    """A version's request and its state as the tags say it; a state that is none of ours is as good as none yet."""

    state: str
    request: Request
    answer: Answer | None = None

    @property
    def answered_by(self) -> str:
        return self.answer.by if self.answer else BY_HAND


def read_approval(tags: Mapping[str, str]) -> Approval | None:
    """What a version's tags say; None if they hold no whole request."""
    try:
        request = Request(**json.loads(tags.get(APPROVAL_REQUEST_TAG, "")))
    except (ValueError, TypeError):
        return None
    state = tags.get(APPROVAL_TAG, REQUESTED).strip().lower()
    try:
        answer = Answer(**json.loads(tags.get(APPROVAL_ANSWER_TAG, ""))) if state in (APPROVED, REJECTED) else None
    except (ValueError, TypeError):
        answer = None
    return Approval(state, request, answer)


def is_open(approval: Approval, version: Version, entries: Sequence[Entry]) -> bool:
    """Whether the history (newest first) still says nothing of what became of the request. A failed promotion leaves it open."""
    about = (entry for entry in entries if (entry.version, entry.digest) == (version.version, version.digest))
    told = next((entry for entry in about if entry.grounds.gate == approval.request.gate and (entry.open or entry.action != "failed")), None)
    return told is not None and (told.open or told.action == REQUESTED)


def next_for(approval: Approval, champion: str | None, version: str, now: float, *, manual: bool = True) -> tuple[Next, Reason]:
    """What is to be done about an open request of that version (number), with that champion, at that unix time; pure and total. `manual`: the recipe still says so.

    An answer counts also if it is acted on only after the request's time; it does not once another champion stands there than the version was compared with.
    """
    request = approval.request
    if approval.state == REJECTED:
        why = f": {approval.answer.why}" if approval.answer and approval.answer.why else ""
        return "decline", Reason("rejected", f"rejected by {approval.answered_by}{why}")
    if champion not in (request.champion, version):
        return "lapse", Reason("champion-changed", f"it was compared with the champion {request.champion or 'none'}, which is {champion or 'none'} by now")
    if approval.state == APPROVED:
        return "promote", Reason("approved", f"{request.reasons}; approved by {approval.answered_by}")
    if now > request.expires:
        return "lapse", Reason("lapsed", f"nobody approved it until {request.until}")
    if not manual:
        return "promote", Reason("no-approval-needed", f"{request.reasons}; the recipe asks for no approval any more")
    return "wait", Reason("waits-for-approval", f"waits for approval until {request.until}")


def ask(registry: Registry, version: Version, lock: Lock, grounds: Grounds, champion: str | None, approval_days: float) -> Request:
    """Records that `version`, found better than `champion`, asks to be promoted. Raises ServingError if the champion is another one by now."""
    asked_at = time.time()
    request = Request(
        grounds.by, asked_at, asked_at + approval_days * DAY_SECONDS, champion, grounds.gate, grounds.reasons[:2000], grounds.scores, grounds.evaluation_run
    )
    with lock.held():
        now = registry.champion_number(version.name)
        settle(registry, version.name, now, grounds.by)
        if now != champion:
            raise ServingError(f"{version.label} was compared with the champion {champion or 'none'}, which is {now or 'none'} by now; retrain again")
        # the state first: whoever is killed between the two leaves no answer of before beside this request
        registry.tag_version(version, {APPROVAL_TAG: REQUESTED, APPROVAL_ANSWER_TAG: "none"})
        registry.tag_version(version, {APPROVAL_REQUEST_TAG: json.dumps(asdict(request))})
        note(registry, version.name, "requested", (version.version, version.digest), now, grounds)
    logger.info("approval requested", extra={"model": version.name, "version": version.version, "expires": request.until})
    return request


def open_requests(registry: Registry, name: str) -> list[tuple[Version, Approval]]:
    """Every version of `name` whose request nothing has become of yet, the oldest first."""
    found = [(version, approval) for version, tags in registry.requests(name) if (approval := read_approval(tags))]
    entries = history(registry, name) if found else []
    return [(version, approval) for version, approval in found if is_open(approval, version, entries)]


def approve(registry: Registry, version: Version, by: str) -> Approval:
    """Records that its request is approved. Raises ServingError if there is none that can be."""
    approval = _answerable(registry, version, "approve")
    if approval.state == APPROVED:
        return approval  # by an earlier call, or by hand
    return _answer(registry, version, APPROVED, Answer(by, time.time()))


def reject(registry: Registry, version: Version, by: str, why: str) -> Approval:
    """Records that its request is rejected, and why; `decline` then closes it. Raises ServingError if there is none that can be."""
    _answerable(registry, version, "reject")
    return _answer(registry, version, REJECTED, Answer(by, time.time(), why))


def checked_why(why: str) -> str:
    """Raises InvalidInput without a reason, or with one too long."""
    why = " ".join(why.split())
    if not 0 < len(why) <= MAX_WHY_CHARACTERS:
        raise InvalidInput([Fault("--why", "", f"1 to {MAX_WHY_CHARACTERS} characters are needed (got {len(why)}); say why, for whoever trained it")])
    return why


def close(registry: Registry, version: Version, lock: Lock, action: Literal["rejected", "kept"], grounds: Grounds) -> None:
    """Writes down that an open request came to nothing, because it was rejected or has lapsed."""
    with lock.held():
        if action == "kept":
            registry.tag_version(version, {APPROVAL_TAG: LAPSED})
        now = registry.champion_number(version.name)
        settle(registry, version.name, now, grounds.by)
        note(registry, version.name, action, (version.version, version.digest), now, grounds)
    logger.info("approval closed", extra={"model": version.name, "version": version.version, "action": action})


def _answer(registry: Registry, version: Version, state: str, answer: Answer) -> Approval:
    registry.tag_version(version, {APPROVAL_ANSWER_TAG: json.dumps(asdict(answer)), APPROVAL_TAG: state})
    logger.info("approval answered", extra={"model": version.name, "version": version.version, "answer": state, "by": answer.by})
    found = read_approval(registry.tags(version))
    if found is None:
        raise RegistryError(f"{version.label}: its request vanished from MLflow meanwhile; promote it without: tuneserve promote {version.label}")
    return found


def _answerable(registry: Registry, version: Version, verb: Literal["approve", "reject"]) -> Approval:
    by_hand = f"compare and promote it now: tuneserve promote {version.label}"
    approval = read_approval(registry.tags(version))
    if approval is None:
        raise ServingError(f"{version.label} does not ask for approval; {by_hand}")
    if not is_open(approval, version, history(registry, version.name)):
        raise ServingError(f"{version.label}: its request is {approval.state} and closed (tuneserve history {version.name}); {by_hand}")
    if approval.state == REJECTED and verb == "approve":
        raise ServingError(f"{version.label}: its request was rejected by {approval.answered_by}; {by_hand}")
    champion = registry.champion_number(version.name)
    step, reason = next_for(approval, champion, version.version, time.time())
    if step == "lapse":
        raise ServingError(f"{label_of(version.name, version.version)}: its request has lapsed, {reason.message}; {by_hand}")
    return approval
