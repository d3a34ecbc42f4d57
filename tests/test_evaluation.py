"""Exact match per kind and slice, over prompts whose images stand where their tags stood."""

from pathlib import Path

from pipeline.dataset import Example
from pipeline.evaluation import Answer, Evaluation, openai_messages
from tests.conftest import write_image


def example(answer: str, kind: str = "", slice_: str = "") -> Example:
    return Example(({"role": "user", "content": "?"}, {"role": "assistant", "content": answer}), (), kind, slice_)


def test_scores() -> None:
    rows = [("a", "a ", "name", "seen"), ("b", "x", "name", "new"), ("c", "c", "use", "new"), ("d", "D", "use", "new")]
    result = Evaluation(tuple(Answer(example(wanted, kind, part), text, "m/1@ab") for wanted, text, kind, part in rows))
    assert result.exact_match == 0.5
    assert result.by("kind") == {"name": 0.5, "use": 0.5}
    assert result.by("slice") == {"new": 1 / 3, "seen": 1.0}
    assert result.models == ("m/1@ab",)


def test_an_image_part_stands_where_its_tag_stood(tmp_path: Path) -> None:
    one, two = write_image(tmp_path / "1.png"), write_image(tmp_path / "2.png", (0, 0, 0))
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>first, <image>second"}, {"role": "assistant", "content": "x"})
    system, user = openai_messages(Example(messages, (one, two)))
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["type"] for part in user["content"]] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in user["content"] if part["type"] == "text"] == ["first, ", "second"]
    urls = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    assert len(set(urls)) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)
