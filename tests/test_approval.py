"""A request for approval: asked, answered by command or by hand, lapsed, and seen through after a kill. The registry is stood in for."""

import itertools
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import approval
from pipeline.approval import Answer, Approval, Request, approve, ask, close, next_for, open_requests, read_approval, reject
from pipeline.errors import InvalidInput, RegistryError, ServingError
from pipeline.history import Grounds, history
from pipeline.lock import Lock
from pipeline.registry import Version
from pipeline.version import APPROVAL_ANSWER_TAG, APPROVAL_REQUEST_TAG, APPROVAL_TAG
from tests.test_history import FakeStore

SECOND = Version("shop", "2", "2" * 64, "base", "template", "run")
WHY = Grounds("flow@host", "promote: better", scores='{"score": 1}', evaluation_run="r1", gate="g")
REQUEST = Request("flow@host", 1000.0, 2000.0, "1", "g", "promote: better")


@dataclass
class FakeRegistry(FakeStore):
    """One model, `shop`, whose champion is 1; tests/test_registry.py holds the tags against MLflow's real store. `dies_after` writes of tags."""

    now: str | None = "1"
    tags_: dict[str, str] = field(default_factory=dict)
    dies_after: int = 99

    def tag_version(self, version: Version, tags: dict[str, str]) -> None:
        for tag, value in tags.items():
            if self.dies_after == 0:
                raise RegistryError("killed")
            self.dies_after -= 1
            self.tags_[tag] = value

    def tags(self, version: Version) -> dict[str, str]:
        return self.tags_

    def requests(self, name: str) -> list[tuple[Version, dict[str, str]]]:
        return [(SECOND, self.tags_)] if APPROVAL_TAG in self.tags_ else []


@pytest.fixture
def registry() -> Any:
    return FakeRegistry()


@pytest.fixture
def lock(tmp_path: Path) -> Lock:
    return Lock("promote/shop", tmp_path / "lock")


def test_a_request_says_who_what_when_and_on_which_grounds(registry: Any, lock: Lock) -> None:
    made = ask(registry, SECOND, lock, WHY, "1", 7)
    assert (made.by, made.champion, made.gate, made.scores, made.evaluation_run) == ("flow@host", "1", "g", '{"score": 1}', "r1")
    assert made.expires - made.at == 7 * 86400 and abs(made.at - time.time()) < 60
    assert read_approval(registry.tags_) == Approval("requested", made)
    newest = history(registry, "shop")[0]
    assert (newest.action, newest.version, newest.after, newest.grounds) == ("requested", "2", "1", WHY)
    assert open_requests(registry, "shop") == [(SECOND, Approval("requested", made))]


def test_no_request_against_another_champion_than_was_compared(registry: Any, lock: Lock) -> None:
    registry.now = "3"
    with pytest.raises(ServingError, match="compared with the champion 1, which is 3 by now"):
        ask(registry, SECOND, lock, WHY, "1", 7)
    assert registry.tags_ == {}


@pytest.mark.parametrize(
    ("state", "champion", "now", "manual", "step", "code"),
    [
        ("requested", "1", 1500, True, "wait", "waits-for-approval"),
        ("requested", "1", 1500, False, "promote", "no-approval-needed"),
        ("requested", "1", 2001, True, "lapse", "lapsed"),
        ("requested", "3", 1500, True, "lapse", "champion-changed"),
        ("requested", None, 1500, True, "lapse", "champion-changed"),
        ("approved", "1", 1500, True, "promote", "approved"),
        ("approved", "1", 9999, True, "promote", "approved"),
        ("approved", "2", 1500, True, "promote", "approved"),
        ("approved", "3", 1500, True, "lapse", "champion-changed"),
        ("rejected", "3", 9999, True, "decline", "rejected"),
        ("lapsed", "1", 2001, True, "lapse", "lapsed"),
        ("yes please", "1", 1500, True, "wait", "waits-for-approval"),
    ],
)
def test_what_is_to_be_done_about_a_request(state: str, champion: str | None, now: float, manual: bool, step: str, code: str) -> None:
    found, reason = next_for(Approval(state, REQUEST), champion, "2", now, manual=manual)
    assert (found, reason.code) == (step, code)


def test_tags_by_hand_are_read_as_they_were_meant_and_broken_ones_are_no_request() -> None:
    text = json.dumps(REQUEST.__dict__)
    answer = json.dumps(Answer("me@here", 1.0, "no").__dict__)
    assert read_approval({APPROVAL_TAG: " Approved ", APPROVAL_REQUEST_TAG: text}) == Approval("approved", REQUEST)
    assert read_approval({APPROVAL_TAG: "approved", APPROVAL_REQUEST_TAG: text}).answered_by == "the tag in MLflow"  # type: ignore[union-attr]
    assert read_approval({APPROVAL_REQUEST_TAG: text}) == Approval("requested", REQUEST)
    assert read_approval({APPROVAL_TAG: "rejected", APPROVAL_REQUEST_TAG: text, APPROVAL_ANSWER_TAG: answer}) == Approval(
        "rejected", REQUEST, Answer("me@here", 1.0, "no")
    )
    assert read_approval({APPROVAL_TAG: "requested", APPROVAL_REQUEST_TAG: text, APPROVAL_ANSWER_TAG: answer}) == Approval("requested", REQUEST)
    for broken in ({}, {APPROVAL_TAG: "approved"}, {APPROVAL_REQUEST_TAG: "{"}, {APPROVAL_REQUEST_TAG: "[]"}, {APPROVAL_REQUEST_TAG: '{"by": "me"}'}):
        assert read_approval(broken) is None


def test_an_answer_is_written_before_it_is_acted_on(registry: Any, lock: Lock) -> None:
    made = ask(registry, SECOND, lock, WHY, "1", 7)
    given = approve(registry, SECOND, "me@here")
    assert given.state == "approved" and given.request == made and given.answered_by == "me@here"
    assert next_for(given, "1", "2", made.at)[0] == "promote"
    assert approve(registry, SECOND, "another") == given
    assert open_requests(registry, "shop") == [(SECOND, given)]
    for left in ({"state": "open"}, {"state": "closed", "action": "failed"}, {"state": "closed", "action": "promoted"}):  # killed, failed, done
        tags = {"action": "promoted", "version": "2", "digest": SECOND.digest, "before": "1", "gate": "g", **left}
        registry.open_entry("shop", "", tags)
        assert open_requests(registry, "shop") == ([] if left.get("action") == "promoted" else [(SECOND, given)])


def test_a_rejection_is_on_record_and_closes_it(registry: Any, lock: Lock) -> None:
    ask(registry, SECOND, lock, WHY, "1", 7)
    given = reject(registry, SECOND, "me@here", "prices")
    assert next_for(given, "1", "2", 0.0)[1].message == "rejected by me@here: prices"
    close(registry, SECOND, lock, "rejected", given.request.grounds("me@here", "rejected: prices", "none"))
    newest = history(registry, "shop")[0]
    assert (newest.action, newest.after, newest.grounds.by, newest.grounds.gate) == ("rejected", "1", "me@here", "g")
    assert open_requests(registry, "shop") == []
    with pytest.raises(ServingError, match="rejected and closed .*tuneserve promote shop/2"):
        approve(registry, SECOND, "me@here")


def test_what_has_lapsed_cannot_be_approved_any_more(registry: Any, lock: Lock) -> None:
    with pytest.raises(ServingError, match="does not ask for approval"):
        approve(registry, SECOND, "me@here")
    ask(registry, SECOND, lock, WHY, "1", 0.0)
    time.sleep(0.01)
    with pytest.raises(ServingError, match="has lapsed, nobody approved it until"):
        approve(registry, SECOND, "me@here")
    close(registry, SECOND, lock, "kept", replace(WHY, reasons="nobody"))
    assert registry.tags_[APPROVAL_TAG] == "lapsed" and history(registry, "shop")[0].action == "kept" and open_requests(registry, "shop") == []
    ask(registry, SECOND, lock, replace(WHY, gate="g2"), "1", 7)
    registry.now = "3"
    with pytest.raises(ServingError, match="compared with the champion 1, which is 3 by now"):
        approve(registry, SECOND, "me@here")


def test_no_answer_of_before_counts_for_a_later_request(registry: Any, lock: Lock) -> None:
    """Killed after each write, too."""
    for dies_after in itertools.count():
        fresh: Any = FakeRegistry()
        ask(fresh, SECOND, lock, WHY, "1", 7)
        reject(fresh, SECOND, "me@here", "no")
        close(fresh, SECOND, lock, "rejected", WHY)
        fresh.dies_after = dies_after
        try:
            ask(fresh, SECOND, lock, replace(WHY, gate="g2"), "1", 7)
        except RegistryError:
            assert all(found.state == "requested" for _, found in open_requests(fresh, "shop"))
            continue
        (found,) = open_requests(fresh, "shop")
        assert found[1].state == "requested" and found[1].answer is None and found[1].request.gate == "g2"
        break
    assert dies_after == 3


@pytest.mark.parametrize("why", ["", "  ", "x" * 301])
def test_a_rejection_has_a_reason(why: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 300 characters"):
        approval.checked_why(why)
