"""Every way in which serving can be other than training was, told apart; and what never passes."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.errors import AdapterInvalid
from pipeline.parity import NO_REFERENCE, TOLERANCES, Parity, Tolerance, compare, replay
from pipeline.reference import Expected, Reference, Replayed, digest_of, read_reference
from pipeline.registry import Version

PICTURE = b"a picture's bytes"
DIGEST = hashlib.sha256(PICTURE).hexdigest()
TEXTS = {1: "<|user|>", 2: "\n", 3: "<|image|>", 4: "What", 5: "Rubio", 6: " watch"}
STRICT = TOLERANCES["float32", "float32"]
BASE, ADAPTER = (-13.0, -8.0), (-0.5, -0.25)


def prompt(kind: str = "one image", **changed: Any) -> Expected:
    values = {
        "kind": kind,
        "messages": [{"role": "user", "content": "<image>What"}],
        "images": [DIGEST],
        "answer": "Rubio watch",
        "prompt_tokens": [1, 2, 3, 4],
        "answer_tokens": [5, 6],
        "pixels": [{"uint8": "8" * 64, "float32": "f" * 64, "bfloat16": "b" * 64}],
        "grids": [(1, 4, 4)],
        "base": BASE,
        "adapter": ADAPTER,
    }
    return Expected.model_validate(values | changed)


def reference(*prompts: Expected, **changed: Any) -> Reference:
    values = {
        "adapter_digest": "a" * 64,
        "base_revision": "base-1",
        "template_digest": "template-1",
        "precision": "float32",
        "device": "cpu",
        "versions": {"peft": "0.20.0"},
        "prompts": [each.model_dump() for each in prompts or [prompt()]],
        "images": {DIGEST: base64.b64encode(PICTURE).decode()},
        "texts": TEXTS,
    }
    return Reference.model_validate(values | changed)


def served(**changed: Any) -> Replayed:
    values = {"digest": "a" * 64, "precision": "float32", "prompt_tokens": [1, 2, 3, 4], "grids": [(1, 4, 4)], "texts": TEXTS}
    values |= {"pixels_in": "float32", "pixels": ["f" * 64]}
    return Replayed.model_validate(values | {"base": BASE, "adapter": ADAPTER} | changed)


def judged(*answers: Replayed, **changed: Any) -> Parity:
    prompts = [prompt(f"prompt {number}", **changed) for number in range(len(answers))]
    return compare(reference(*prompts), answers)


def kinds(found: Parity) -> list[str]:
    return [mismatch.kind for mismatch in found.mismatches]


def moved(values: Sequence[float], *by: float) -> tuple[float, ...]:
    return tuple(value + step for value, step in zip(values, by, strict=True))


def test_what_is_served_as_trained_is_faithful() -> None:
    found = judged(served(base=moved(BASE, 5e-4, 0), adapter=moved(ADAPTER, 0, -9e-4)), served())
    assert found.faithful and not found.mismatches and found.compared == ("prompt 0", "prompt 1")
    assert found.base and found.adapter and found.tolerance == STRICT
    assert found.base.max == pytest.approx(5e-4) and found.adapter.mean == pytest.approx(9e-4 / 4) and found.adapter.tokens == 4
    assert found.effect == 12.5


def test_the_first_token_that_differs_is_named_with_its_neighbours_on_both_sides() -> None:
    found = judged(served(prompt_tokens=[1, 3, 4]))
    assert found.verdict == "prompt-differs" and kinds(found) == ["tokens"] and found.base is None
    assert (
        found.reason == "prompt 0: token 1 of the prompt differs: training has '\\n' (id 2) after '<|user|>' and before '<|image|>What', the server "
        "'<|image|>' (id 3) after '<|user|>' and before 'What'; serve with the template of training"
    )


@pytest.mark.parametrize(("tokens", "says"), [([1, 2, 3], "the server its end after"), ([1, 2, 3, 4, 9], "training has its end after .* the server '<9>'")])
def test_a_prompt_that_ends_early_or_goes_on_differs_at_its_end(tokens: list[int], says: str) -> None:
    found = judged(served(prompt_tokens=tokens))
    assert kinds(found) == ["tokens"] and re.search(says, found.reason), found.reason


def test_the_image_that_looks_otherwise_is_named() -> None:
    two: dict[str, Any] = {"images": [DIGEST, DIGEST], "pixels": [{"float32": "f" * 64}, {"float32": "e" * 64}], "grids": [(1, 4, 4), (1, 4, 6)]}
    same = {"pixels": ["f" * 64, "e" * 64], "grids": [(1, 4, 4), (1, 4, 6)]}
    assert judged(served(**same), **two).faithful
    other = judged(served(**same | {"pixels": ["f" * 64, "0" * 64]}), **two)
    assert other.verdict == "prompt-differs" and kinds(other) == ["pixels"] and f"prompt 0: image 2 of 2 ({DIGEST[:12]})" in other.reason
    resized = judged(served(**same | {"grids": [(1, 8, 8), (1, 4, 6)]}), **two)
    assert kinds(resized) == ["grid"] and "image 1 of 2" in resized.reason and "1x8x8 patches by the server, 1x4x4 in training" in resized.reason
    lost = judged(served(pixels=["f" * 64], grids=[(1, 4, 4)]), **two)
    assert kinds(lost) == ["grid"] and "1 images reach the served model, 2" in lost.reason


def test_pixels_are_compared_in_the_form_in_which_the_server_has_them() -> None:
    for form, digest in (("uint8", "8"), ("float32", "f"), ("bfloat16", "b")):
        assert judged(served(pixels_in=form, pixels=[digest * 64])).faithful
        assert kinds(judged(served(pixels_in=form, pixels=["0" * 64]))) == ["pixels"]
    assert judged(served(pixels_in="float16")).verdict == "not-compared"


def test_a_base_that_differs_is_the_stack_and_not_the_adapter() -> None:
    found = judged(served(), served(base=moved(BASE, -0.002, 0.004), adapter=moved(ADAPTER, 2, 0)))
    assert found.verdict == "base-differs" and kinds(found) == ["base"]
    assert "prompt 1: the base's log-probability of ' watch', token 1 of the answer, is -8.0000 in training, -7.9960 served" in found.reason
    assert "0.001 allowed; token 0 is the first that is too far" in found.reason
    assert found.base and found.base.max == pytest.approx(0.004) and found.adapter and found.adapter.max == 2


def test_an_adapter_that_is_lost_is_told_from_one_that_is_applied_in_part() -> None:
    lost = judged(served(adapter=BASE))
    assert lost.verdict == "adapter-differs" and kinds(lost) == ["adapter"] and "it is not applied" in lost.reason
    half = judged(served(adapter=moved(ADAPTER, -0.5, 0)))
    assert half.verdict == "adapter-differs" and "in part or at another scale" in half.reason


def test_many_small_differences_fail_by_their_mean() -> None:
    mild = Tolerance(1.0, 0.1, "")
    prompts = [prompt(str(number)) for number in range(3)]
    answers = [served(adapter=moved(ADAPTER, 0.2, 0.2)), served(), served()]
    assert compare(reference(*prompts), answers, mild).faithful, "0.4 over 6 tokens"
    answers = [served(adapter=moved(ADAPTER, 0.2, 0.2)) for _ in prompts]
    found = compare(reference(*prompts), answers, mild)
    assert found.verdict == "adapter-differs" and "0.2 apart on average over 6 tokens, 0.1 allowed" in found.reason


@pytest.mark.parametrize("side", ["base", "adapter"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_never_passes(side: str, value: float | None) -> None:
    wide = Tolerance(1e9, 1e9, "")
    broken = served(**{side: (-1.0, value)})
    assert compare(reference(), [broken], wide).verdict == f"{side}-differs"
    both = compare(reference(prompt(**{side: (-1.0, value)})), [broken], wide)
    assert both.verdict == f"{side}-differs"
    assert json.loads(json.dumps(both.as_dict(), allow_nan=False))[side]["max"] is None
    assert compare(reference(), [served(**{side: (-1.0,)})], wide).verdict == f"{side}-differs", "too few"


def test_a_prompt_that_is_refused_counts_if_it_is_a_rows_own() -> None:
    refused = Replayed(refused="at most 1 image")
    assert judged(served(), refused).verdict == "not-compared"
    found = compare(reference(prompt("one"), prompt("two", composed=True)), [served(), refused])
    assert found.faithful and found.compared == ("one",) and found.skipped == ("two: at most 1 image",)
    nothing = compare(reference(prompt("two", composed=True)), [refused])
    assert nothing.verdict == "not-compared" and "none of the prompts" in nothing.reason


def test_without_a_known_tolerance_nothing_passes() -> None:
    found = judged(served(quantization="int4"))
    assert found.verdict == "not-compared" and "int4" in found.reason


@pytest.mark.parametrize("pair", TOLERANCES)
def test_every_tolerance_lies_between_what_was_measured_and_what_must_be_seen(pair: tuple[str, str]) -> None:
    """Measured on the tiny model: noise, and what the smallest damage that was tried moved (an adapter at 1.1 times its scale)."""
    tolerance = TOLERANCES[pair]
    noise, mean = (1.7e-5, 1.6e-6) if pair == ("float32", "float32") else (0.233, 0.0183)
    assert 2 * noise < tolerance.max < 0.57 and 2 * mean < tolerance.mean < 0.067


def test_the_first_cause_on_the_way_is_the_verdict() -> None:
    found = judged(served(prompt_tokens=[1, 3, 4]), served(base=moved(BASE, 1, 1)), served(adapter=BASE))
    assert found.verdict == "prompt-differs" and kinds(found) == ["tokens", "base"]


class FakeReplica:
    url = "http://replica"

    def __init__(self, *answers: Replayed) -> None:
        self.answers, self.asked = list(answers), []

    def parity(self, model: str, messages: Any, answer_tokens: Sequence[int]) -> Replayed:
        self.asked.append((model, messages, tuple(answer_tokens)))
        return self.answers.pop(0)


VERSION = Version("shop", "7", "a" * 64, "base-1", "template-1", "run")


def test_a_replica_is_asked_for_the_version_with_the_pictures_of_the_reference() -> None:
    replica = FakeReplica(served())
    assert replay(replica, VERSION, reference()).faithful
    ((model, messages, answer),) = replica.asked
    assert (model, answer) == ("shop/7", (5, 6))
    url = messages[0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition("base64,")[2]) == PICTURE and messages[0]["content"][1] == {"type": "text", "text": "What"}


def test_another_adapter_than_the_references_proves_nothing() -> None:
    other = Version("shop", "7", "c" * 64, "base-1", "template-1", "run")
    assert replay(FakeReplica(), other, reference()).verdict == "not-compared"
    found = replay(FakeReplica(served(digest="c" * 64)), VERSION, reference())
    assert found.verdict == "not-compared" and "tuneserve status" in found.reason
    assert NO_REFERENCE.verdict == "no-reference" and "train it again" in NO_REFERENCE.reason


def test_a_reference_is_read_as_it_was_written() -> None:
    made = reference(prompt(adapter=(-0.5, None)))
    assert read_reference(made.model_dump_json(), "shop/7") == made


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompts": []}, "holds no prompt"),
        ({"images": {}}, "is missing"),
        ({"images": {DIGEST: base64.b64encode(b"another").decode()}}, "not the one of that digest"),
        ({"images": {DIGEST: "@"}}, "images|base64|Only"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_a_reference_that_is_none_is_refused(changed: dict[str, Any], says: str) -> None:
    text = json.dumps(json.loads(reference().model_dump_json()) | changed)
    with pytest.raises(AdapterInvalid, match=f"shop/7: its parity.json is not a reference.*({says}).*train it again"):
        read_reference(text, "shop/7")
    for broken in ("", "[]", text[:-5]):
        with pytest.raises(AdapterInvalid, match="not a reference"):
            read_reference(broken, "shop/7")


@pytest.mark.parametrize("changed", [{"base": (-1.0,)}, {"answer_tokens": []}, {"grids": []}, {"prompt_tokens": []}])
def test_a_prompt_must_be_whole(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one image: not one"):
        prompt(**changed)


def test_equal_digests_are_equal_numbers_of_equal_shape() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest_of(values) == digest_of(np.asfortranarray(values)) == digest_of(values.astype(np.float64)) == digest_of(values.astype(">f4"))
    assert digest_of(values.astype(np.uint8)) == digest_of(np.where(values == 0, np.float32(-0.0), values)) == digest_of(values)
    assert len({digest_of(values), digest_of(values.reshape(4, 3)), digest_of(values + np.float32(1e-6)), digest_of(values.T)}) == 4
