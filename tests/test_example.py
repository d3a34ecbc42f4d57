"""What a row may look like, each rule by a row that breaks it."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import tinyglm
from pipeline.example import GLM_TOKENS, read_example
from tests.conftest import row, write_image


def turns(*pairs: tuple[str, str], images: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in pairs], "images": images or [], **more}


def found(content: Any, folder: Path = Path()) -> list[tuple[str, str]]:
    return read_example(content, folder, 1)[1]


def only(content: Any, folder: Path = Path()) -> tuple[str, str]:
    (fault,) = found(content, folder)
    return fault


@pytest.mark.parametrize(
    "pairs",
    [
        [("user", "Hi"), ("assistant", "Yes?")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")],
        [("assistant", "Good day."), ("user", "Hi"), ("assistant", "Yes?")],
        [("user", "Hi"), ("user", "You!"), ("assistant", "Yes?")],
        [("user", "Hi"), ("assistant", "<think>hm</think>\nYes?"), ("user", "2 < 3 > 1, [a] and <b>?"), ("assistant", "<think></think>\n</b>")],
    ],
)
def test_good_rows_have_no_fault(pairs: list[tuple[str, str]]) -> None:
    example, faults = read_example(turns(*pairs), Path(), 7)
    assert faults == [] and example is not None
    assert (example.row, example.answer, [m["role"] for m in example.messages]) == (7, pairs[-1][1], [role for role, _ in pairs])


@pytest.mark.parametrize(
    ("pairs", "where", "said"),
    [
        ([("user", "Hi")], ".messages", "must ask"),
        ([("system", "Hi"), ("assistant", "x")], ".messages", "must ask"),
        ([("assistant", "x")], ".messages", "must ask"),
        ([("user", "x"), ("system", "y"), ("assistant", "z")], ".messages.1.role", "must be the first"),
        ([("user", "x"), ("assistant", "y"), ("assistant", "z")], ".messages", "must follow a user"),
        ([("user", "x"), ("tool", "y"), ("assistant", "z")], ".messages.1.role", "'tool' is not one of"),
        ([("user", " \n"), ("assistant", "z")], ".messages.0.content", "non-empty"),
        ([("user", "x"), ("assistant", "<think>hm</think>\n")], ".messages.1.content", "no answer"),
        ([("user", "x"), ("assistant", "<think>hm")], ".messages.1.content", "'<think>'"),
        ([("user", "x"), ("assistant", "so <think>hm</think> y")], ".messages.1.content", "'<think>'"),
        ([("user", "<think>x</think>"), ("assistant", "y")], ".messages.0.content", "'<think>'"),
        ([("user", "x"), ("assistant", "<image>")], ".messages.1.content", "user's turn"),
        ([("system", "<image>"), ("user", "x"), ("assistant", "y")], ".messages.0.content", "user's turn"),
        ([("user", "half \ud83d"), ("assistant", "y")], ".messages.0.content", "half a character"),
        ([("user", "see http://a.b/nothinking"), ("assistant", "y")], ".messages.0.content", "'/nothink'"),
        ([("user", "round {{ROUND1}}"), ("assistant", "y")], ".messages.0.content", "'{{ROUND1}}'"),
        ([("user", "<img>/etc/passwd</img>"), ("assistant", "y")], ".messages.0.content", "<img>"),
    ],
)
def test_bad_turns_have_one_fault_where_it_is(pairs: list[tuple[str, str]], where: str, said: str) -> None:
    fault = only(turns(*pairs))
    assert fault[0] == where and said in fault[1]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", [*tinyglm.SPECIAL_TOKENS, "<video>", "<audio>", "<bbox>", "<ref-object>", "<cot-process>", "<start-image>"])
def test_prompt_tokens_hidden_in_text_are_refused(token: str, role: str) -> None:
    texts = {"system": "s", "user": "u", "assistant": "a"}
    texts[role] += f" {token} "
    assert token in only(turns(*texts.items()))[1]


def test_every_special_token_of_the_tiny_model_is_glms() -> None:
    assert set(tinyglm.SPECIAL_TOKENS) <= set(GLM_TOKENS)


def test_tags_and_images_must_agree(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    two_for_one = turns(("user", "<image><image>?"), ("assistant", "x"), images=["a.png"])
    assert only(two_for_one, tmp_path) == (".images", "1 images for 2 <image> tags; every tag stands for one image")
    assert only(turns(("user", "?"), ("assistant", "x"), images=["a.png"]), tmp_path)[0] == ".images"
    over_turns = turns(("user", "<image>?"), ("assistant", "x"), ("user", "and <image>?"), ("assistant", "y"), images=["a.png", "a.png"])
    assert found(over_turns, tmp_path) == []


def test_only_plain_files_are_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_image(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    said = {
        image: found(row(image=image), tmp_path)
        for image in ("link.png", "pipe", ".", "none.png", "a.png/b", "/dev/zero", "https://a/b.png", "n\0ul", "a.png ")
    }
    assert said.pop("link.png") == []
    assert all(len(faults) == 1 and faults[0][0] == ".images.0" for faults in said.values())
    assert "plain file" in said["pipe"][0][1] and "plain file" in said["/dev/zero"][0][1]
    assert "does not exist" in said["none.png"][0][1] and "save the picture" in said["https://a/b.png"][0][1]


def test_a_flat_row_is_the_row_it_stands_for(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    wanted, _ = read_example(turns(("system", "Be brief."), ("user", "<image>What?"), ("assistant", "x"), images=["a.png"], kind="k"), tmp_path, 1)
    for images in ({"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}):
        flat, faults = read_example({"system": "Be brief.", "question": "What?", "answer": "x", "kind": "k", **images}, tmp_path, 1)
        assert faults == [] and flat == wanted and wanted is not None
    placed, _ = read_example({"question": "What is <image>?", "answer": "x", "image": "a.png"}, tmp_path, 1)
    assert placed is not None and placed.messages[0]["content"] == "What is <image>?"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ([], ""),
        ({}, ".messages"),
        ({"question": "x"}, ".answer"),
        ({"question": "x", "answer": 12}, ".answer"),
        ({"question": "x", "answer": ""}, ".answer"),
        ({"question": "<|user|>", "answer": "y"}, ".question"),
        ({"question": "x", "answer": "y", "messages": []}, ".question"),
        ({"question": "x", "answer": "y", "image": "a", "images": []}, ".image"),
        ({"question": "x", "answer": "y", "images": "a.png"}, ".images"),
        ({"question": "x", "answer": "y", "colour": "red"}, ".colour"),
        ({"question": "x", "answer": "y", "kind": 1}, ".kind"),
        ({"messages": [{"role": "user", "content": "x", "loss": 1}, {"role": "assistant", "content": "y"}]}, ".messages.0.loss"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "y"}]}, ".messages.0.content"),
        ({"question": "x", "answer": "y", "kind": "\udcff"}, ".kind"),
        ({"question": "x", "answer": "y", "slice": "\ud83d"}, ".slice"),
        (turns(("user", "x"), ("assistant", "y"), rejected_response="y"), ".rejected_response"),
        (turns(("user", "x"), ("assistant", "y"), rejected_response=""), ".rejected_response"),
        (turns(("user", "x"), ("assistant", "y"), rejected_response="<|user|>"), ".rejected_response"),
    ],
)
def test_bad_keys_and_values_are_named(content: Any, where: str) -> None:
    assert where in [place for place, _ in found(content)]


def test_a_preference_row_keeps_its_rejected_answer() -> None:
    example, _ = read_example(turns(("user", "x"), ("assistant", "y"), rejected_response="z", images=None), Path(), 1)
    assert example is not None and example.rejected == "z"


@pytest.mark.parametrize(
    "weight", [0, -1, 0.0009, 1000.1, 10**400, -(10**400), float("nan"), float("inf"), True, "2", [2], {}], ids=lambda weight: repr(weight)[:8]
)
def test_a_weight_is_a_number_within_bounds(weight: Any) -> None:
    where, said = only({"question": "x", "answer": "y", "weight": weight})
    assert where == ".weight" and said.endswith("is not a number from 0.001 to 1000") and len(said) < 80


@pytest.mark.parametrize("weight", [0.001, 0.5, 1, 2, 1000])
def test_a_good_weight_is_kept_as_a_float(weight: float) -> None:
    example, faults = read_example({"question": "x", "answer": "y", "weight": weight}, Path(), 1)
    assert faults == [] and example is not None and example.weight == weight and isinstance(example.weight, float)


@pytest.mark.parametrize("folder", ["", "\udcff"])
def test_a_path_that_is_not_utf8_is_a_fault_though_the_file_is_there(tmp_path: Path, folder: str) -> None:
    name = "a.png" if folder else "caf\udce9.png"
    write_image(tmp_path / folder / name)
    where, said = only(row(image=name), tmp_path / folder)
    assert where == ".images.0" and "is not UTF-8; rename" in said
    said.encode()
