import itertools
from pathlib import Path

import pytest

from pipeline.serving.engine import ServedAdapter
from pipeline.serving.routing import Route, SwitchedOff, choose, side

CHAMPION = ServedAdapter("catalog", "1", "a" * 64, Path("a"))
CANDIDATE = ServedAdapter("catalog", "2", "b" * 64, Path("b"))
USERS = [f"user-{number}" for number in range(20_000)]


def test_without_a_canary_every_caller_gets_the_champion():
    for candidate, share in ((None, 0.5), (CANDIDATE, 0.0)):
        route = Route("catalog", CHAMPION, candidate, share)
        assert {choose(route, key, drawn) for key in ("u", None) for drawn in (0.0, 0.5)} == {CHAMPION}


def test_a_share_of_the_callers_gets_the_candidate_and_always_the_same_ones():
    route = Route("catalog", CHAMPION, CANDIDATE, 0.1)
    chosen = [choose(route, user, drawn=0.0) for user in USERS]
    assert abs(chosen.count(CANDIDATE) / len(USERS) - 0.1) < 0.01
    assert [choose(route, user, drawn=0.99) for user in USERS] == chosen


def test_a_larger_share_only_moves_callers_to_the_candidate():
    def on_candidate(share: float) -> set[str]:
        return {user for user in USERS if choose(Route("catalog", CHAMPION, CANDIDATE, share), user, 0.5) == CANDIDATE}

    shares = [on_candidate(share) for share in (0.0, 0.01, 0.1, 0.2, 0.9, 1.0)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(shares))
    assert len(shares[-1]) == len(USERS)


def test_another_candidate_draws_other_callers():
    other = ServedAdapter("catalog", "3", "c" * 64, Path("c"))
    both = sum(side(CANDIDATE, user) < 0.1 and side(other, user) < 0.1 for user in USERS)
    assert 100 < both < 300  # 1 % of them by chance, not all 2,000


def test_a_caller_without_a_name_is_drawn():
    route = Route("catalog", CHAMPION, CANDIDATE, 0.1)
    assert choose(route, None, 0.05) == CANDIDATE and choose(route, None, 0.15) == CHAMPION


@pytest.mark.parametrize(("fallback", "answers"), [("base", None), (CANDIDATE, CANDIDATE)])
def test_a_name_that_is_off_falls_back(fallback, answers):
    assert choose(Route("catalog", CHAMPION, CANDIDATE, 1.0, "is switched off", fallback), "u", 0.0) == answers


def test_a_name_that_is_off_says_so():
    with pytest.raises(SwitchedOff, match="is switched off"):
        choose(Route("catalog", CHAMPION, off="is switched off"), "u", 0.0)
