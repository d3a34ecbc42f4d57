"""Which prompts a reference is made of: held-out rows of each kind, else prompts composed of them, and no more than a few small pictures."""

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import read_examples
from pipeline.example import IMAGE_TAG, Example
from pipeline.parity_prompts import MAX_IMAGE_BYTES, MAX_PIXELS, SHORT_ANSWER, SYSTEM, Questions, questions_of
from pipeline.project import Project
from pipeline.reference import Question
from tests.conftest import ROOT, write_image

KINDS = ["one image", "two images", "text", "turns", "system", "resized image"]


def example(*turns: tuple[str, str], images: tuple[Path, ...] = ()) -> Example:
    return Example(tuple({"role": role, "content": text} for role, text in turns), images)


def by_kind(made: Questions) -> dict[str, Question]:
    assert [question.kind for question in made.questions] == KINDS
    for question in made.questions:
        tags = sum(message.content.count(IMAGE_TAG) for message in question.messages)
        assert tags == len(question.images) and set(question.images) <= made.images.keys() and question.answer
    for digest, picture in made.images.items():
        assert hashlib.sha256(base64.b64decode(picture)).hexdigest() == digest
    return {question.kind: question for question in made.questions}


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    return write_image(tmp_path / "a.png", (250, 0, 0)), write_image(tmp_path / "b.png", (0, 250, 0))


def test_rows_of_a_kind_are_taken_as_they_are(pictures: tuple[Path, Path]) -> None:
    a, b = pictures
    rows = [
        example(("user", "<image>What?"), ("assistant", "A"), images=(a,)),
        example(("user", "Colour?"), ("assistant", "B")),
        example(("user", "<image>or<image>?"), ("assistant", "C"), images=(a, b)),
        example(("user", "<image>Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "D"), images=(b,)),
        example(("system", "Be kind."), ("user", "<image>What?"), ("assistant", "E"), images=(b,)),
    ]
    made = questions_of(rows)
    found = by_kind(made)
    for kind, row in {"one image": rows[0], "text": rows[1], "two images": rows[2], "turns": rows[3], "system": rows[4]}.items():
        assert not found[kind].composed and found[kind].answer == row.answer
        assert [message.model_dump() for message in found[kind].messages] == list(row.prompt)
        assert found[kind].images == tuple(hashlib.sha256(image.read_bytes()).hexdigest() for image in row.images)
    assert found["resized image"].composed and len(made.images) == 3


def test_what_rows_lack_is_composed_of_them(pictures: tuple[Path, Path]) -> None:
    a, b = pictures
    rows = [example(("user", "<image>What?"), ("assistant", "A"), images=(a,)), example(("user", "How much?<image>"), ("assistant", "B"), images=(b,))]
    found = by_kind(questions_of(rows))
    assert {kind for kind, question in found.items() if question.composed} == set(KINDS) - {"one image"}
    assert len(set(found["two images"].images)) == 2 and found["two images"].messages[0].content == "<image><image>What?"
    assert [message.content for message in found["turns"].messages] == ["<image>What?", "A", "How much?"] and found["turns"].answer == "B"
    assert found["system"].messages[0].content == SYSTEM and found["text"].messages[0].content == "What?" and not found["text"].images


@pytest.mark.parametrize("rows", [[], [example(("user", "Colour?"), ("assistant", "B"))]])
def test_rows_without_pictures_are_asked_about_made_ones(rows: list[Example]) -> None:
    made = questions_of(rows)
    found = by_kind(made)
    assert found["text"].composed == (not rows)
    assert found["one image"].composed and len(made.images) == 3
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in made.images.values()}
    assert sizes == {(56, 56), (84, 56), (75, 50)}


def test_an_answer_that_thinks_is_replaced(pictures: tuple[Path, Path]) -> None:
    row = example(("user", "<image>What?"), ("assistant", "<think>well</think>\nA"), images=pictures[:1])
    assert by_kind(questions_of([row]))["one image"].answer == SHORT_ANSWER


def noise(path: Path, width: int, height: int) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), "uint8")).save(path)
    return path


def test_small_pictures_are_preferred_and_large_ones_made_small(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    heavy = [noise(tmp_path / f"{number}.png", 900 + number, 700) for number in range(2)]
    assert heavy[0].stat().st_size > MAX_IMAGE_BYTES and MAX_PIXELS < 900 * 700
    large = [example(("user", "<image>What?"), ("assistant", "A"), images=(image,)) for image in heavy]
    small = example(("user", "<image>And this?"), ("assistant", "B"), images=pictures[:1])
    assert by_kind(questions_of([*large, small]))["one image"].answer == "B"
    only_large = questions_of(large)
    assert not by_kind(only_large)["one image"].composed
    for picture in only_large.images.values():
        content = base64.b64decode(picture)
        assert len(content) <= MAX_IMAGE_BYTES and max(Image.open(io.BytesIO(content)).size) <= 448
    assert sum(map(len, only_large.images.values())) < 2e6


def test_the_embedded_catalog_has_rows_for_most_kinds() -> None:
    rows = read_examples(ROOT / "data/catalog/eval.jsonl", Project(ROOT))
    made = questions_of(rows)
    assert {kind for kind, question in by_kind(made).items() if not question.composed} == {"one image", "two images", "text"}
    assert sum(map(len, made.images.values())) < 20_000
