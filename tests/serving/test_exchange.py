"""What a sample takes of a request and its answer, and what it leaves."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from pipeline.evaluation import chat_body, openai_messages
from pipeline.example import Example
from pipeline.serving.exchange import Unusable, sample_of
from tests.conftest import write_image

MODEL = "catalog/3@c969cdde"
TURNS = [{"role": "user", "content": "What is it?"}]


def whole(text: str | None = "Azul tote", finish: str = "stop", **more: object) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "model": MODEL, "choices": [choice]} | more).encode()


def streamed(*texts: str, finish: str | None = "stop") -> bytes:
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    events = [{"id": "chatcmpl-1", "model": MODEL, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events[-1]["choices"][0]["finish_reason"] = finish
    events.append({"id": "chatcmpl-1", "model": MODEL, "choices": [], "usage": {"total_tokens": 3}})
    return b": keep-alive\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def asked(messages: object = TURNS, **more: object) -> bytes:
    return json.dumps({"model": "catalog", "messages": messages, **more}).encode()


def test_a_question_becomes_what_a_row_would_have_asked_it_with(tmp_path: Path) -> None:
    images = (write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png", (0, 0, 200)))
    turns = [("system", "Be brief."), ("user", "<image>And this?<image>"), ("assistant", "A tote"), ("user", "Sure?"), ("assistant", "Yes")]
    example = Example(tuple({"role": role, "content": text} for role, text in turns), images)
    sample, pictures = sample_of(json.dumps(chat_body("catalog", openai_messages(example), 16)).encode(), whole(), "catalog", 1_700_000_000.5)
    assert [message.model_dump() for message in sample.messages] == list(example.prompt)
    assert [pictures[name] for name in sample.images] == [image.read_bytes() for image in images]
    assert all(name == f"{hashlib.sha256(picture).hexdigest()}.png" for name, picture in pictures.items())
    assert (sample.name, sample.answered_by, sample.answer, sample.finish, sample.answer_id) == ("catalog", MODEL, "Azul tote", "stop", "chatcmpl-1")
    assert sample.at == "2023-11-14T22:13:20.500+00:00"


def test_a_streamed_answer_is_put_together() -> None:
    sample, _ = sample_of(asked(), streamed("Azul", " tote", "\u2028é"), "catalog", 0.0)
    assert (sample.answer, sample.finish, sample.answered_by, sample.answer_id) == ("Azul tote\u2028é", "stop", MODEL, "chatcmpl-1")
    assert sample_of(asked(), whole(None), "catalog", 0.0)[0].answer == ""


def test_nothing_else_of_the_request_is_taken() -> None:
    more = {"user": "ann@example.com", "metadata": {"key": "sk-secret"}, "safety_identifier": "sk-secret"}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?", "x": "sk-secret"}], "name": "ann"}]
    sample, _ = sample_of(asked(messages, **more), whole(id="key=sk-secret", system_fingerprint="sk-secret"), "catalog", 0.0)
    assert "secret" not in sample.model_dump_json() and "ann" not in sample.model_dump_json() and sample.answer_id == ""


def picture(url: str) -> list[object]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]}]


PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG...").decode()


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"{", whole()),
        (b"[]", whole()),
        (asked([]), whole()),
        (asked("hi"), whole()),
        (asked([{"role": "user", "content": ""}]), whole()),
        (asked([{"role": "tool", "content": "x"}]), whole()),
        (asked([{"role": "assistant", "content": None, "tool_calls": []}]), whole()),
        (asked(TURNS, tools=[{"type": "function"}]), whole()),
        (asked(picture("https://user:password@images.example/a.png?token=1")), whole()),
        (asked(picture("data:image/png;base64,%%%")), whole()),
        (asked(picture("data:text/plain;base64," + base64.b64encode(b"hello").decode())), whole()),
        (asked([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": PNG}}]}]), whole()),
        (asked([{"role": "user", "content": "an <image> of mine"}]), whole()),
        (asked(), whole(finish=None)),
        (asked(), b'{"error": {"message": "no"}}'),
        (asked(), b""),
        (asked(), streamed("Azul", finish=None)),
        (asked(), b'data: {"error": {"message": "no"}}\n\n'),
        (asked(), b"data: \xff\n\n"),
    ],
)
def test_what_cannot_become_a_row_is_told(body: bytes, answer: bytes) -> None:
    assert sample_of(asked(picture(PNG)), whole(), "catalog", 0.0)[1]
    with pytest.raises(Unusable):
        sample_of(body, answer, "catalog", 0.0)
