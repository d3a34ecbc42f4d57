"""Training rows in front of a question: of its kind, as many as its images leave room for."""

from pathlib import Path

from pipeline.example import Example
from pipeline.in_context import with_shots


def row(number: int, kind: str = "name", images: int = 1, system: str = "") -> Example:
    said = [{"role": "system", "content": system}] if system else []
    said += [{"role": "user", "content": "<image>" * images + f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return Example(tuple(said), tuple(Path(f"{number}-{image}.png") for image in range(images)), kind, row=number)


def said(example: Example) -> list[str]:
    return [message["content"].replace("<image>", "") for message in example.messages]


def test_shots_are_of_the_kind_and_stand_before_the_question_with_their_images_in_order() -> None:
    shown = with_shots(row(9), [row(1, "use"), row(2), row(3), row(4)], 2, 4)
    assert said(shown) == ["q2", "a2", "q3", "a3", "q9", "a9"]
    assert [image.name for image in shown.images] == ["2-0.png", "3-0.png", "9-0.png"]
    assert (shown.answer, shown.row) == ("a9", 9)


def test_images_limit_the_shots() -> None:
    shown = with_shots(row(9, images=2), [row(1, images=3), row(2), row(3), row(4)], 3, 4)
    assert said(shown) == ["q2", "a2", "q3", "a3", "q9", "a9"]
    assert with_shots(row(9, images=4), [row(1)], 3, 4) == row(9, images=4)


def test_a_kind_without_rows_gets_others_and_the_question_keeps_its_own_system_message() -> None:
    shown = with_shots(row(9, "new", system="Be brief."), [row(1, system="Be long.")], 3, 4)
    assert said(shown) == ["Be brief.", "q1", "a1", "q9", "a9"]
