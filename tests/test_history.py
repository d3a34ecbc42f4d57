"""The history is linear, also where commands were killed, failed, or other hands moved the alias. tests/test_registry.py holds the store against MLflow's real one."""

import itertools
from dataclasses import dataclass, field

import pytest

from pipeline.errors import RegistryError
from pipeline.history import Entry, Grounds, history, lines, note, recorded, settle

ME = Grounds("me@here", "better", scores='{"score": 1}', evaluation_run="r1", git_commit="abc")


@dataclass
class FakeStore:
    now: str | None = None
    written: list[dict[str, str]] = field(default_factory=list)
    away: bool = False

    def entries(self, name: str) -> list[tuple[str, float, dict[str, str]]]:
        return [(str(index), float(index), tags) for index, tags in enumerate(self.written)][::-1]

    def open_entry(self, name: str, label: str, tags: dict[str, str]) -> str:
        self.written.append(dict(tags))
        return str(len(self.written) - 1)

    def close_entry(self, entry: str, tags: dict[str, str]) -> None:
        if self.away:
            raise RegistryError("MLflow is away")
        self.written[int(entry)].update(tags)

    def champion_number(self, name: str) -> str | None:
        return self.now

    def move(self, number: str, fails: BaseException | None = None, puts_back: bool = True) -> None:
        """As promotion.promote: settles, then moves within an entry."""
        settle(self, "shop", self.now, "me")
        before = self.now
        with recorded(self, "shop", "promoted", (number, number * 64), before, ME):
            self.now = number
            if fails:
                self.now = before if puts_back else number
                raise fails


def told(store: FakeStore) -> list[tuple[str, str | None, str | None, str | None]]:
    """Oldest first; every entry begins where the one before it ended."""
    entries = history(store, "shop")[::-1]
    assert all(one.after == other.before for one, other in itertools.pairwise(entries))
    return [(entry.action, entry.version, entry.before, entry.after) for entry in entries]


def test_what_was_promoted_is_told_with_its_grounds() -> None:
    store = FakeStore()
    store.move("1")
    store.move("2")
    assert told(store) == [("promoted", "1", None, "1"), ("promoted", "2", "1", "2")]
    newest = history(store, "shop")[0]
    assert newest == Entry("1", 1.0, "promoted", "2", "2" * 64, "1", "2", ME)
    assert newest.as_dict()["by"] == "me@here" and newest.as_dict()["after"] == "2"
    assert "promoted shop/2 (champion 1 -> 2) by me@here: better" in lines("shop", [newest])[0]
    assert lines("shop", []) == ["shop: no history yet"]


def test_what_is_kept_out_changes_nothing() -> None:
    store = FakeStore()
    store.move("1")
    note(store, "shop", "kept", ("2", "d"), store.now, Grounds("me", "a tie"))
    store.move("3")
    assert told(store) == [("promoted", "1", None, "1"), ("kept", "2", "1", "1"), ("promoted", "3", "1", "3")]


def test_a_failure_says_why_and_where_the_alias_stands() -> None:
    store = FakeStore()
    store.move("1")
    with pytest.raises(ValueError, match="refused"):
        store.move("2", ValueError("refused\nand more"))
    with pytest.raises(KeyboardInterrupt):
        store.move("3", KeyboardInterrupt(), puts_back=False)
    assert told(store) == [("promoted", "1", None, "1"), ("failed", "2", "1", "1"), ("failed", "3", "1", "3")]
    assert [entry.grounds.reasons for entry in history(store, "shop")[:2]] == ["KeyboardInterrupt", "refused"]


def test_a_move_by_other_hands_is_noted_by_the_next_command() -> None:
    store = FakeStore("7")
    store.move("1")
    store.now = "9"
    store.move("2")
    store.now = None
    settle(store, "shop", None, "me")
    settle(store, "shop", None, "me")
    outside = "moved-outside"
    assert told(store) == [
        (outside, "7", None, "7"), ("promoted", "1", "7", "1"), (outside, "9", "1", "9"), ("promoted", "2", "9", "2"), (outside, None, "2", None),
    ]  # fmt: skip


@pytest.mark.parametrize(("arrived", "action", "after"), [(True, "promoted", "2"), (False, "failed", "1")])
def test_a_killed_command_is_closed_by_the_alias_as_it_stands(arrived: bool, action: str, after: str) -> None:
    store = FakeStore()
    store.move("1")
    store.open_entry("shop", "", {"action": "promoted", "version": "2", "before": "1", "after": "none", "by": "me", "reasons": "better", "state": "open"})
    assert history(store, "shop")[0].open and "in progress, or killed" in lines("shop", history(store, "shop"))[0]
    store.now = "2" if arrived else "1"
    store.move("3")
    assert told(store) == [("promoted", "1", None, "1"), (action, "2", "1", after), ("promoted", "3", after, "3")]
    assert history(store, "shop")[1].grounds.reasons == "better; interrupted; found later"


def test_a_killed_command_whose_alias_others_moved_on() -> None:
    store = FakeStore()
    store.move("1")
    store.open_entry("shop", "", {"action": "promoted", "version": "2", "before": "1", "after": "none", "state": "open"})
    store.now = "5"
    settle(store, "shop", store.now, "me")
    assert told(store) == [("promoted", "1", None, "1"), ("failed", "2", "1", "1"), ("moved-outside", "5", "1", "5")]


def test_a_registry_that_goes_away_leaves_the_entry_open_and_the_promotion_done() -> None:
    store = FakeStore()
    store.away = True
    with recorded(store, "shop", "promoted", ("1", "d"), None, ME):
        store.now = "1"
    assert history(store, "shop")[0].open
    with pytest.raises(ValueError, match="its own error"), recorded(store, "shop", "promoted", ("2", "d"), "1", ME):
        raise ValueError("its own error")
    store.away = False
    settle(store, "shop", "1", "me")
    assert told(store) == [("promoted", "1", None, "1"), ("failed", "2", "1", "1")]
