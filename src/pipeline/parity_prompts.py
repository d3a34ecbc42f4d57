"""Which prompts a parity reference holds: one of each kind that a served model meets, from held-out rows where they have it, else composed of them.

Pictures are kept as the files that they are; one that is large (MAX_IMAGE_BYTES, MAX_PIXELS) only where no row has a smaller one, and then saved again within
SMALL_SIDE, so that a reference stays below 2 MB and a replay below a few thousand tokens. How a server resizes large pictures is then not looked at.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.example import IMAGE_TAG, Example
from pipeline.reference import Message, Question

MAX_IMAGE_BYTES, MAX_PIXELS, SMALL_SIDE = 160 * 1024, 512 * 1024, 448
SHORT_ANSWER, SHORT_QUESTION, SYSTEM = "Yes.", "What do you see?", "You are a helpful assistant. Answer briefly."
MAX_TEXT, MAX_ROWS = 8000, 2000
"""Characters of a row, a longer one is not taken; and how many rows are looked at."""


@dataclass(frozen=True)
class Questions:
    """The prompts, and their pictures in base64 by SHA-256."""

    questions: tuple[Question, ...]
    images: Mapping[str, str]


def questions_of(rows: Sequence[Example]) -> Questions:
    """One prompt each with one image, two images, text only, several turns, a system message, and a picture that must be resized. Reads the pictures it takes."""
    pictures = _Pictures()
    fit = [row for row in rows[:MAX_ROWS] if _is_short(row)]
    light = [row for row in fit if all(map(_is_light, row.images))]
    plain = [row for row in (light or fit) if [message["role"] for message in row.prompt] == ["user"]]
    one = [row for row in plain if len(row.images) == 1]
    first, second = (
        (pictures.add_file(row.images[0]) for row in (one[0], _other(one))) if one else (pictures.add(_picture(56, 56)), pictures.add(_picture(84, 56)))
    )
    asked, other = (_text(one[0]), _text(_other(one))) if one else (SHORT_QUESTION, SHORT_QUESTION)
    answer, other_answer = (_answer(one[0]), _answer(_other(one))) if one else (SHORT_ANSWER, SHORT_ANSWER)
    user = Message(role="user", content=f"{IMAGE_TAG}{asked}")
    composed = {
        "one image": Question(kind="one image", messages=(user,), images=(first,), answer=answer, composed=not one),
        "two images": Question(
            kind="two images", messages=(Message(role="user", content=f"{IMAGE_TAG}{IMAGE_TAG}{asked}"),), images=(first, second), answer=answer, composed=True
        ),
        "text": Question(kind="text", messages=(Message(role="user", content=asked),), images=(), answer=answer, composed=True),
        "turns": Question(
            kind="turns",
            messages=(user, Message(role="assistant", content=answer), Message(role="user", content=other)),
            images=(first,),
            answer=other_answer,
            composed=True,
        ),
        "system": Question(kind="system", messages=(Message(role="system", content=SYSTEM), user), images=(first,), answer=answer, composed=True),
    }
    own = {
        "one image": one,
        "two images": [row for row in plain if len(row.images) == 2],
        "text": [row for row in plain if not row.images],
        "turns": [row for row in light if sum(message["role"] == "user" for message in row.prompt) > 1 and len(row.images) <= 2],
        "system": [row for row in light if row.prompt[0]["role"] == "system" and len(row.images) <= 1],
    }
    questions = [_of_row(kind, own[kind][0], pictures) if own[kind] else question for kind, question in composed.items()]
    odd = pictures.add(_picture(75, 50))  # no multiple of GLM's 28 pixels: whoever looks at it resizes it
    questions.append(Question(kind="resized image", messages=(user,), images=(odd,), answer=answer, composed=True))
    used = {image for question in questions for image in question.images}
    return Questions(tuple(questions), {digest: picture for digest, picture in pictures.files.items() if digest in used})


def _of_row(kind: str, row: Example, pictures: "_Pictures") -> Question:
    messages = tuple(Message.model_validate(message) for message in row.prompt)
    return Question(kind=kind, messages=messages, images=tuple(pictures.add_file(image) for image in row.images), answer=_answer(row))


def _is_short(row: Example) -> bool:
    return sum(len(message["content"]) for message in row.messages) <= MAX_TEXT


def _is_light(image: Path) -> bool:
    if image.stat().st_size > MAX_IMAGE_BYTES:
        return False
    with Image.open(image) as opened:
        return opened.width * opened.height <= MAX_PIXELS


def _other(rows: Sequence[Example]) -> Example:
    """The first row that shows something else than the first, if there is one."""
    return next((row for row in rows if row.images != rows[0].images), rows[0])


def _text(row: Example) -> str:
    """The question without its picture."""
    return row.prompt[-1]["content"].replace(IMAGE_TAG, "").strip() or SHORT_QUESTION


def _answer(row: Example) -> str:
    """Its own, but for one that thinks: no served prompt leads to it."""
    return SHORT_ANSWER if "<think>" in row.answer else row.answer


def _picture(width: int, height: int) -> bytes:
    """A picture without a meaning, in which no two places look alike."""
    image = Image.new("RGB", (width, height))
    image.putdata([(5 * x % 256, 7 * y % 256, 3 * (x + y) % 256) for y in range(height) for x in range(width)])
    return _saved(image, "PNG")


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class _Pictures:
    """Picture files by SHA-256, in base64."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def add(self, picture: bytes) -> str:
        digest = hashlib.sha256(picture).hexdigest()
        self.files[digest] = base64.b64encode(picture).decode()
        return digest

    def add_file(self, path: Path) -> str:
        if _is_light(path):
            return self.add(path.read_bytes())
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((SMALL_SIDE, SMALL_SIDE))
            return self.add(_saved(small, "JPEG", quality=90))
