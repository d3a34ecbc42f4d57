"""What is promoted, kept and refused: every reason on its own, ties, and that nothing that is not a number gets through."""

import itertools
import math
from dataclasses import replace

import pytest

from pipeline.comparison import Comparison
from pipeline.decision import Evidence, decide
from pipeline.recipe import PromotionRules

RULES = PromotionRules(protect=("json",), allowed_loss=0.02)
BETTER = Comparison("", 200, 0.9, 0.8, 0.1, 0.05, 0.15)
JSON = Comparison("json", 50, 0.9, 0.9, 0.0, -0.1, 0.1)
EVIDENCE = Evidence(examples=200, mean=0.9, p95_seconds=0.5, champion="shop/1", against_champion=(BETTER, JSON))
FIRST = Evidence(examples=200, mean=0.9, p95_seconds=0.5)


def verdict(evidence: Evidence = EVIDENCE, rules: PromotionRules = RULES) -> tuple[str, list[str]]:
    decision = decide(evidence, rules)
    assert decision.reasons
    return decision.verdict, [reason.code for reason in decision.reasons]


def test_what_is_surely_better_is_promoted() -> None:
    assert verdict() == ("promote", ["better"])
    assert "+10.0% [+5.0%, +15.0%], 200 examples" in decide(EVIDENCE, RULES).text


@pytest.mark.parametrize(("low", "wanted"), [(0.0, "keep"), (-0.01, "keep"), (1e-9, "promote")])
def test_a_tie_keeps_the_champion(low: float, wanted: str) -> None:
    assert verdict(replace(EVIDENCE, against_champion=(replace(BETTER, low=low), JSON)))[0] == wanted


@pytest.mark.parametrize(("gain", "code"), [(0.1, "as-good"), (0.0, "as-good"), (-0.02, "as-good"), (-0.021, "worse"), (math.nan, "not-measured")])
def test_as_good_is_enough_against_a_champion_that_stands_by_its_record(gain: float, code: str) -> None:
    recorded = replace(EVIDENCE, on_record=True, against_champion=(replace(BETTER, gain=gain, low=gain - 0.05, high=gain + 0.05), JSON))
    wanted = ("promote" if code == "as-good" else "refuse", [code])
    assert verdict(recorded) == verdict(replace(recorded, same_digest=True)) == wanted
    assert verdict(replace(recorded, against_champion=(BETTER, replace(JSON, gain=-0.021)))) == ("refuse", ["part-worse"])
    assert verdict(replace(recorded, faithful_fault="token 7"))[0] == "refuse"


def test_the_gain_must_be_as_much_as_the_rules_say() -> None:
    assert verdict(rules=PromotionRules(minimum_gain=0.05)) == ("keep", ["no-gain"])
    assert verdict(rules=PromotionRules(minimum_gain=0.0499)) == ("promote", ["better"])


def test_the_same_weights_are_a_tie_whatever_was_measured() -> None:
    assert verdict(replace(EVIDENCE, same_digest=True)) == ("keep", ["same-adapter"])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"servable_fault": "rank 64"}, "not-servable"),
        ({"live_fault": "refused"}, "not-live"),
        ({"faithful_fault": "token 7"}, "not-faithful"),
        ({"examples": 19}, "too-few-examples"),
        ({"mean": math.nan}, "not-measured"),
        ({"against_champion": ()}, "not-measured"),
        ({"against_champion": (BETTER,)}, "part-missing"),
        ({"against_champion": (BETTER, replace(JSON, gain=-0.021))}, "part-worse"),
        ({"against_champion": (BETTER, replace(JSON, gain=math.nan))}, "part-worse"),
    ],
)
def test_each_reason_to_refuse(change: dict[str, object], code: str) -> None:
    assert verdict(replace(EVIDENCE, **change)) == ("refuse", [code])  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["gain", "low", "high"])
def test_a_gain_that_is_no_number_refuses(field: str) -> None:
    assert verdict(replace(EVIDENCE, against_champion=(replace(BETTER, **{field: math.nan}), JSON))) == ("refuse", ["not-measured"])  # type: ignore[arg-type]


def test_a_protected_part_is_named_and_may_lose_what_is_allowed() -> None:
    worse = replace(EVIDENCE, against_champion=(BETTER, replace(JSON, gain=-0.02)))
    assert verdict(worse)[0] == "promote"
    assert "json: " in decide(replace(EVIDENCE, against_champion=(BETTER, replace(JSON, gain=-0.5))), RULES).text


def test_all_reasons_are_said_the_most_fundamental_first() -> None:
    bad = replace(EVIDENCE, servable_fault="x", faithful_fault="y", examples=3, mean=0.1, p95_seconds=9.0)
    assert verdict(bad, PromotionRules(floor=0.5, max_p95_seconds=1.0)) == (
        "refuse",
        ["not-servable", "not-faithful", "too-few-examples", "below-floor", "too-slow"],
    )


def test_without_a_champion_the_floor_decides() -> None:
    assert verdict(FIRST) == ("refuse", ["no-floor"])
    assert verdict(FIRST, PromotionRules(floor=0.9)) == ("promote", ["above-floor"])
    assert verdict(FIRST, PromotionRules(floor=0.91)) == ("refuse", ["below-floor"])
    assert verdict(EVIDENCE, PromotionRules(floor=0.91)) == ("refuse", ["below-floor"])  # with one too


def test_too_slow_is_measured_and_nan_is_too_slow() -> None:
    assert verdict(rules=PromotionRules(max_p95_seconds=0.5))[0] == "promote"
    assert verdict(replace(EVIDENCE, p95_seconds=math.nan), PromotionRules(max_p95_seconds=0.5)) == ("refuse", ["too-slow"])


def test_it_is_total() -> None:
    odd = (math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 2.0)
    parts = [None, (), *((Comparison("", 2, 0.5, 0.5, gain, low, high),) for gain, low, high in itertools.product(odd, repeat=3))]
    for mean, against, floor in itertools.product(odd, parts, (None, 0.0, 0.5)):
        decision = decide(Evidence(50, mean, 1.0, champion="shop/1", against_champion=against), PromotionRules(floor=floor))
        if decision.verdict == "promote":
            assert math.isfinite(mean) and mean >= (floor or 0.0) - 1.0
            assert floor is not None if against is None else math.isfinite(against[0].low) and against[0].low > 0
