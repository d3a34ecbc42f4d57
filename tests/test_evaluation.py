"""Exact match and field accuracy per kind and slice, over prompts whose images stand where their tags stood."""

from pathlib import Path

import pytest

from pipeline import evaluation
from pipeline.dataset import Example
from pipeline.errors import ServingError
from pipeline.evaluation import Answer, Evaluation, evaluate, openai_messages
from pipeline.journal import failure_fields
from tests.conftest import write_image


def example(answer: str, kind: str = "", slice_: str = "") -> Example:
    return Example(({"role": "user", "content": "?"}, {"role": "assistant", "content": answer}), (), kind, slice_)


def test_scores() -> None:
    rows = [("a", "a ", "name", "seen"), ("b", "x", "name", "new"), ("c", "c", "use", "new"), ("d", "D", "use", "new")]
    result = Evaluation(tuple(Answer(example(wanted, kind, part), text, "m/1@ab") for wanted, text, kind, part in rows))
    assert result.exact_match == result.score == 0.5
    assert result.by("kind") == {"name": 0.5, "use": 0.5}
    assert result.by("slice") == {"new": 1 / 3, "seen": 1.0}
    assert result.models == ("m/1@ab",)


WANTED = '{"brand": "Rubio", "kind": "watch", "sizes": [1, 2], "new": true}'


@pytest.mark.parametrize(
    ("wanted", "text", "score", "correct"),
    [
        (WANTED, WANTED, 1.0, True),
        (WANTED, ' {"new":true,"sizes":[1,2],"kind":"watch","brand":"Rubio"}\n', 1.0, False),  # the same object, written otherwise
        (WANTED, '{"brand": "Rubio", "kind": "tote", "sizes": [1, 2], "new": true}', 0.75, False),
        (WANTED, '{"brand": "Rubio", "kind": "watch", "sizes": [2, 1], "new": 1}', 0.5, False),  # a list has an order; 1 is not true
        (WANTED, '{"brand": "Rubio"}', 0.25, False),  # missing fields
        (WANTED, WANTED[:-1] + ', "price": 5}', 0.8, False),  # an invented field
        (WANTED, '{"Brand": "Rubio"}', 0.0, False),
        (WANTED, '{"brand": "Rubio", "kind": "wat', 0.0, False),  # cut off
        (WANTED, f"Here it is: {WANTED}", 0.0, False),
        (WANTED, '["brand", "Rubio"]', 0.0, False),
        (WANTED, "null", 0.0, False),
        (WANTED, "", 0.0, False),
        ('{"use": {"day": 1, "night": 2}}', '{"use": {"night": 2, "day": 1}}', 1.0, False),
        ("{}", "{}", 1.0, True),
        ("{}", "no", 0.0, False),
        ("[1, 2]", "[1,2]", 0.0, False),  # anything but an object: exact match
        ("12", "12", 1.0, True),
        ("Rubio watch", "Rubio watch ", 1.0, True),
        ("Rubio watch", '{"brand": "Rubio"}', 0.0, False),
    ],
)
def test_a_json_object_is_scored_by_its_fields(wanted: str, text: str, score: float, correct: bool) -> None:
    answer = Answer(example(wanted), text, "m/1@ab")
    assert (answer.score, answer.correct) == (score, correct)


@pytest.mark.parametrize(
    ("wanted", "text", "f1"),
    [
        ("Rubio watch", "rubio  watch.", 1.0),
        ("a red watch", "a blue watch", 2 / 3),
        ("red red watch", "red watch", 0.8),
        ("watch", "", 0.0),
        ("watch", "...", 0.0),
        ("...", "...", 1.0),
        ("红色手表", "红手表", 6 / 7),
        ("3.5 cm", "3.5 cm", 1.0),
    ],
)
def test_token_f1_is_the_overlap_of_words(wanted: str, text: str, f1: float) -> None:
    assert Answer(example(wanted), text, "m").token_f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't help.", "I cannot tell.", "I can\u2019t see it", "As an AI model", "抱歉, 我无法回答", " I am unable to say"]
)
def test_refusals_and_empty_answers_are_told_apart_from_wrong_ones(text: str) -> None:
    assert Answer(example("a watch"), text, "m").refusal and not Answer(example("a watch"), text, "m").empty
    assert not Answer(example("I'm sorry, we do not sell that."), text, "m").refusal  # what was wanted


@pytest.mark.parametrize("text", ["a watch", "Sorry Sally brand", "I can see a watch", "Unfortunate brand", ""])
def test_what_is_no_refusal(text: str) -> None:
    assert not Answer(example("a watch"), text, "m").refusal
    assert Answer(example("a watch"), text, "m").empty == (text == "")


def test_parts_and_seconds() -> None:
    rows = [("name", "seen", 0.1), ("name", "new", 0.4), ("seen", "seen", 0.2), ("", "", 0.3)]
    result = Evaluation(tuple(Answer(example("a", kind, part), "a", "m", seconds) for kind, part, seconds in rows))
    assert result.parts == ("images=0", "name", "new", "seen")
    assert result.answers[2].parts == ("seen", "images=0")  # a kind and a slice of one name are one part
    assert (result.indices("seen"), result.indices("images=0"), result.indices("none")) == ([0, 2], [0, 1, 2, 3], [])
    assert (result.seconds(50), result.seconds(95), result.seconds(0)) == (0.2, 0.4, 0.1)


def test_fields_count_per_kind_and_overall() -> None:
    answers = (Answer(example(WANTED, "json"), '{"brand": "Rubio"}', "m"), Answer(example("a", "name"), "a", "m"))
    result = Evaluation(answers)
    assert result.by("kind") == {"json": 0.25, "name": 1.0}
    assert (result.score, result.exact_match) == (0.625, 0.5)


def test_an_image_part_stands_where_its_tag_stood(tmp_path: Path) -> None:
    one, two = write_image(tmp_path / "1.png"), write_image(tmp_path / "2.png", (0, 0, 0))
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>first, <image>second"}, {"role": "assistant", "content": "x"})
    system, user = openai_messages(Example(messages, (one, two)))
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["type"] for part in user["content"]] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in user["content"] if part["type"] == "text"] == ["first, ", "second"]
    urls = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    assert len(set(urls)) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)


def test_a_row_that_is_not_answered_is_named_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "RETRIES", 0)  # the client would wait between them
    messages = ({"role": "user", "content": "Which Rubio watch?"}, {"role": "assistant", "content": "x"})
    with pytest.raises(ServingError) as failed:
        evaluate("http://127.0.0.1:9", "shop", [Example(messages, (), row=7)], lambda text, fraction: None, file="e.jsonl")
    assert failure_fields(failed.value)["reason"] == "shop at http://127.0.0.1:9 did not answer row 7 of e.jsonl (APIConnectionError)"
    assert "Rubio" not in str(failed.value) and "Connection error" in str(failed.value)
