"""What is a reason to train, and when a version still has to pass the gate: tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.comparison import Comparison
from pipeline.decision import Reason
from pipeline.history import Entry, Grounds
from pipeline.recipe import DriftRules, Judge, PromotionRules, WatchRules
from pipeline.retraining import Promoted, changes, drift, due, gate_digest, gate_step, lineage_now, promoted

PARAMS = {
    "name": "shop",
    "base_model": "base",
    "lora.rank": 16,
    "training.epochs": 4.0,
    "training.early_stopping": None,
    "training.checkpoint_steps": 50,
    "dpo": None,
}
TAGS = {
    "recipe": "shop",
    "input_digest": "i1",
    "dataset_digest": "d1",
    "dataset_train_digest": "t1",
    "dataset_train_rows": "100",
    "dataset_eval_rows": "20",
    "base_revision": "b" * 40,
    "template_digest": "p" * 40,
    "user": "me",
    "version.torch": "2.13.0",
}
NOW = lineage_now(PARAMS, TAGS)
OTHER = {"input_digest": "i0"}
"""Some other inputs, else nothing counts."""


def before(left_out: str = "", **more: str) -> dict[str, str]:
    """The lineage of a version from other inputs; `more` with . for __."""
    given = {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in {**NOW, "train_seconds": "12.0", "digest": "a", **OTHER, **given}.items() if key != left_out}


@pytest.mark.parametrize(
    ("was", "codes", "said"),
    [
        (None, ["no-version"], "no version is registered yet"),
        ({}, ["origin-unknown"], "not on record"),
        (before(input_digest="i1", lora__rank="8"), [], ""),
        (before(dataset_train_digest="t0", dataset_train_rows="60"), ["rows-added"], "40 training rows more (60 -> 100)"),
        (before(dataset_train_digest="t0", dataset_train_rows="101"), ["rows-removed"], "1 training rows fewer"),
        (before(dataset_train_digest="t0"), ["rows-changed"], "of the 100 training rows some changed"),
        (before(dataset_eval_rows="10", dataset_digest="d0"), ["libraries-changed"], ""),
        (before("dataset_train_digest", version__torch="2.12.0"), ["libraries-changed"], "torch 2.12.0 -> 2.13.0"),
        (before("dataset_train_digest", dataset_digest="d0"), ["rows-changed"], ""),
        (before("dataset_train_digest", dataset_digest="d0", dataset_train_rows=""), ["rows-added"], "100 training rows more (0 -> 100)"),
        (before(base_revision="c" * 40), ["base-changed"], "cccccccccccc -> bbbbbbbbbbbb"),
        (before(template_digest="q" * 40), ["template-changed"], "prompt template"),
        (before("template_digest"), ["template-changed"], "unknown -> pppppppppppp"),
        (before(lora__rank="8", training__epochs="8.0"), ["recipe-changed"], "lora.rank 8 -> 16, training.epochs 8.0 -> 4.0"),
        (before(base_model="elsewhere", promotion__floor="0.1", licence="mit", dataset__train="x", training__checkpoint_steps="9"), ["libraries-changed"], ""),
        (before("lora.rank"), ["libraries-changed"], ""),
        (before(training__early_stopping__patience_checkpoints="3"), ["recipe-changed"], "patience_checkpoints 3 -> another"),
        (before(dataset_train_digest="t0", base_revision="c", lora__rank="8"), ["rows-changed", "base-changed", "recipe-changed"], ""),
        (before(), ["libraries-changed"], "not on record"),
    ],
)
def test_what_changed_is_told(was: dict[str, str] | None, codes: list[str], said: str) -> None:
    found = changes(was, NOW, "shop/1")
    assert [reason.code for reason in found] == codes and said in "; ".join(map(str, found))
    assert due(found) is (codes not in ([], ["libraries-changed"]))


def test_checkpoints_count_where_early_stopping_chooses_one() -> None:
    now = lineage_now(
        {**{key: value for key, value in PARAMS.items() if key != "training.early_stopping"}, "training.early_stopping.patience_checkpoints": 3}, TAGS
    )
    was = {**now, **OTHER, "training.checkpoint_steps": "20"}
    assert [reason.code for reason in changes(was, now)] == ["recipe-changed"]


def test_what_decides_the_gate_is_in_its_digest() -> None:
    rules = PromotionRules(floor=0.5)
    same = gate_digest("v", "c", "d", rules)
    assert same == gate_digest("v", "c", "d", rules.model_copy(update={"approval": "manual", "approval_days": 1, "watch": WatchRules(slowdown=3)}))
    others = [("w", "c", "d", rules), ("v", None, "d", rules), ("v", "c", "e", rules), ("v", "c", "d", rules.model_copy(update={"floor": 0.6}))]
    others.append(("v", "c", "d", rules.model_copy(update={"judge": Judge(url="http://a", model="m")})))
    assert len({same, *(gate_digest(*other) for other in others)}) == 6


def entry(action: str, version: str | None, before: str | None, after: str | None, gate: str = "", **more: object) -> Entry:
    found = Entry("id", 0.0, action, version, f"digest{version}", before, after, Grounds("me", "so", gate=gate))  # type: ignore[arg-type]
    return replace(found, **more)  # type: ignore[arg-type]


FIRST = entry("promoted", "1", None, "1", "g0")


@pytest.mark.parametrize(
    ("newer", "champion", "asked", "step", "code"),
    [
        ([], "1", False, "gate", "not-compared"),
        ([], None, False, "gate", "not-compared"),
        ([entry("promoted", "2", "1", "2", "g")], "2", False, "nothing", "is-champion"),
        ([entry("promoted", "2", "1", None, "g", open=True)], "1", False, "gate", "interrupted"),
        ([entry("promoted", "2", "1", None, "g", open=True)], "2", False, "gate", "interrupted"),
        ([entry("kept", "2", "1", "1", "g")], "1", False, "nothing", "kept-before"),
        ([entry("refused", "2", "1", "1", "g")], "1", False, "nothing", "refused-before"),
        ([entry("kept", "2", "1", "1", "other rows")], "1", False, "gate", "not-compared"),
        ([entry("kept", "2", "1", "1", "g", digest="recreated")], "1", False, "gate", "not-compared"),
        ([entry("failed", "2", "1", "1", "g")], "1", False, "gate", "not-compared"),
        ([entry("failed", "2", "1", "1", "g"), entry("kept", "2", "1", "1", "g")], "1", False, "nothing", "kept-before"),
        ([entry("requested", "2", "1", "1", "g")], "1", True, "nothing", "waits-for-approval"),
        ([entry("requested", "2", "1", "1", "g")], "1", False, "gate", "not-compared"),
        ([entry("rejected", "2", "1", "1", "g"), entry("requested", "2", "1", "1", "g")], "1", False, "nothing", "rejected-before"),
        ([entry("rolled-back", "1", "2", "1"), entry("promoted", "2", "1", "2", "g")], "1", False, "nothing", "promoted-before"),
        ([entry("rolled-back", "0", "2", "0"), entry("promoted", "2", "1", "2", "h")], "0", False, "nothing", "taken-out"),
        ([entry("moved-outside", "1", "2", "1"), entry("promoted", "2", "1", "2", "h")], "1", False, "nothing", "taken-out"),
        ([entry("moved-outside", None, "2", None), entry("promoted", "2", "1", "2", "h")], None, False, "nothing", "taken-out"),
        ([entry("promoted", "2", "1", "2", "h")], "0", False, "nothing", "taken-out"),
        ([entry("rolled-back", "2", "3", "2"), entry("promoted", "2", "1", "2", "h")], "0", False, "nothing", "taken-out"),
        ([entry("promoted", "3", "2", "3", "h"), entry("promoted", "2", "1", "2", "h")], "3", False, "gate", "not-compared"),
        ([entry("kept", "2", "1", "1", "h"), entry("rolled-back", "1", "2", "1")], "1", False, "gate", "not-compared"),
    ],
)
def test_a_version_is_compared_once_on_the_same_grounds(newer: list[Entry], champion: str | None, asked: bool, step: str, code: str) -> None:
    found, reason = gate_step(("2", "digest2"), champion, [*newer, FIRST], "g", asked=asked)
    assert (found, reason.code) == (step, code), reason


@pytest.mark.parametrize(
    ("mean", "low", "high", "code"),
    [
        (0.90, -0.10, -0.02, "drifted"),
        (0.95, -0.09, -0.01, "drifted"),  # exactly the drop
        (0.96, -0.06, -0.02, "no-drift"),  # surely worse, by less than the drop
        (0.80, -0.50, 0.01, "no-drift"),  # much worse, but not surely
        (1.00, -0.01, 0.01, "no-drift"),
        (0.80, float("nan"), float("nan"), "no-drift"),
    ],
)
def test_drift_is_a_fall_that_is_large_and_sure(mean: float, low: float, high: float, code: str) -> None:
    now = Comparison("", 40, mean, 1.0, round(mean - 1.0, 9), low, high)
    found = drift("shop/3", now, DriftRules(rows=Path("x.jsonl"), drop=0.05))
    assert found.code == code and f"shop/3 on 40 rows approved since its promotion: {mean:.1%}, at its promotion 100.0%" in found.message


def test_drift_is_a_reason_to_train_and_what_says_nothing_of_it_is_none() -> None:
    library = Reason("libraries-changed", "")
    assert due([library, Reason("drifted", "")]) and not due([library])
    assert [reason.code for reason in changes(before(drift="None"), lineage_now({**PARAMS, "drift.rows": "x"}, TAGS))] == ["libraries-changed"]


def test_a_champions_value_is_that_of_its_last_measured_promotion() -> None:
    def entry(at: float, action: str, version: str, scores: str, digest: str = "d3", **more: bool) -> Entry:
        return Entry("e", at, action, version, digest, "2", version, Grounds("me", scores=scores), **more)  # type: ignore[arg-type]

    scores = '{"score": {"version": 0.93, "champion": 0.5}}'
    told = [entry(9.0, "promoted", "3", scores, open=True), entry(8.0, "kept", "3", scores), entry(7.0, "promoted", "4", scores, "d4")]
    measured = [entry(6.0, "promoted", "3", ""), entry(5.0, "promoted", "3", scores), entry(4.0, "promoted", "3", '{"score": {"version": 0.1}}')]
    assert promoted([*told, *measured], ("3", "d3"), "score") == Promoted(5.0, 0.93)
    assert promoted(told, ("3", "d3"), "score") is None
    assert promoted(measured, ("3", "other"), "score") is None and promoted(measured, ("3", "d3"), "token_f1") is None
