"""Questions are made by code: the same from the same numbers, and no two alike in what a server could cache."""

import base64
import io
from typing import Any

from PIL import Image

from pipeline.bench.questions import MIXES, SIDE, Question, picture, questions


def urls(question: Question) -> list[str]:
    return [part["image_url"]["url"] for part in question.messages[1]["content"] if part["type"] == "image_url"]


def words(question: Question) -> Any:
    return question.messages[1]["content"][-1]["text"]


def test_a_picture_has_its_size_and_is_made_again_from_its_numbers() -> None:
    made = Image.open(io.BytesIO(picture(3, 0, 7)))
    assert (made.size, made.format) == ((SIDE, SIDE), "JPEG")
    assert picture(3, 0, 7) == picture(3, 0, 7)
    assert len({picture(3, 0, 7), picture(4, 0, 7), picture(3, 1, 7), picture(3, 0, 8)}) == 4


def test_every_picture_is_another_one_and_every_text_begins_otherwise() -> None:
    asked = questions("mixed", 0, 20, 1) + questions("mixed", 20, 20, 1)
    pictures = [url for question in asked for url in urls(question)]
    assert len(set(pictures)) == len(pictures) == 20 + 16
    sheets = [words(question).split(".")[0] for question in asked if question.kind == "text"]
    assert len(set(sheets)) == len(sheets) == 12
    assert base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,")) == picture(0, 0, 1)


def test_arms_are_asked_alike_whatever_the_numbers() -> None:
    one, other = (questions("mixed", first, 13, 1) for first in (0, 500))
    assert [question.kind for question in one] == [question.kind for question in other]
    assert [words(each) for each in one if each.kind != "text"] == [words(each) for each in other if each.kind != "text"]


def test_the_mix_has_the_shares_that_the_help_states() -> None:
    kinds = MIXES["mixed"]
    assert {kind: kinds.count(kind) / len(kinds) for kind in kinds} == {"image": 0.5, "text": 0.3, "two-images": 0.2}
    assert [len(urls(question)) for question in questions("mixed", 0, 4, 1)] == [1, 0, 1, 2]
    assert {question.kind for question in questions("text", 0, 3, 1)} == {"text"}
