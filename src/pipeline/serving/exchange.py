"""A request of the chat completions API and its answer, as they went over HTTP, as a sample. Pure; knows the API's format and nothing of vLLM."""

import base64
import binascii
import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from pipeline.example import IMAGE_TAG
from pipeline.rows import image_ending
from pipeline.sample import Message, Sample

PLAIN_WORD = re.compile(r"[A-Za-z0-9._-]{1,128}")
DATA_URL = re.compile(r"data:[^,]{0,100};base64,")


class Unusable(ValueError):
    """What was asked or answered cannot become a training row."""


def sample_of(body: bytes, answer: bytes, name: str, at: float) -> tuple[Sample, dict[str, bytes]]:
    """The sample, and its pictures by name. `name` is the served model, `at` the request's unix time. Raises Unusable.

    Of the request it takes the messages alone: neither its user nor its other fields, which may name people or hold keys.
    """
    try:
        asked = json.loads(body)
        if asked.get("tools") or asked.get("functions"):
            raise Unusable("it has tools")
        pictures: dict[str, bytes] = {}
        names: list[str] = []
        messages = tuple(_message(message, names, pictures) for message in asked["messages"])
        given = _answer(answer)
        answer_id = str(given["id"])
        sample = Sample(
            id=secrets.token_hex(8),
            at=datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds"),
            name=name,
            answered_by=str(given["model"]),
            answer_id=answer_id if PLAIN_WORD.fullmatch(answer_id) else "",
            messages=messages,
            images=tuple(names),
            answer=given["text"],
            finish=given["finish"],
        )
    except (ValidationError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise Unusable(type(error).__name__) from error
    return sample, pictures


def _message(message: dict[str, Any], names: list[str], pictures: dict[str, bytes]) -> Message:
    """The text with a tag for each picture, whose names and bytes are added to the other two."""
    content = message["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for part in parts:
        if part.get("type") == "image_url":
            picture = _picture(part["image_url"]["url"])
            name = f"{hashlib.sha256(picture).hexdigest()}.{image_ending(picture)}"
            names.append(name)
            pictures[name] = picture
            text += IMAGE_TAG
        elif part.get("type") == "text" and IMAGE_TAG not in part["text"]:
            text += part["text"]
        else:
            raise Unusable("a part is neither text nor picture")
    return Message(role=message["role"], content=text)


def _picture(url: str) -> bytes:
    """The bytes of a data URL. Those of another URL are not here, and it may hold a key."""
    if not (start := DATA_URL.match(url)):
        raise Unusable("a picture is elsewhere")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except binascii.Error as error:
        raise Unusable("a picture is not base64") from error


def _answer(answer: bytes) -> dict[str, Any]:
    """Id, model, text and finish of a whole answer, given at once or streamed."""
    if not answer.lstrip().startswith((b"data:", b":", b"event:")):
        given = json.loads(answer)
        choice = given["choices"][0]
        return {"id": given["id"], "model": given["model"], "text": choice["message"]["content"] or "", "finish": choice["finish_reason"]}
    text, finish, last = "", None, {}
    for event in _events(answer):
        last = event
        for choice in event["choices"]:
            if choice["index"] == 0:
                text += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
    if finish is None:
        raise Unusable("it was broken off")
    return {"id": last["id"], "model": last["model"], "text": text, "finish": finish}


def _events(answer: bytes) -> Iterator[dict[str, Any]]:
    """Those of a stream of server-sent events, up to [DONE]."""
    for line in answer.decode().split("\n"):
        data = line.strip().removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)
