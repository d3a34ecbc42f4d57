"""An answered request that a server kept: the question in the form of a training row, the answer, and who gave it. A JSON object a line, one file a day.

They lie in a folder per server, `SERVER/YYYY-MM-DD.jsonl` (UTC), the pictures once each beside them, named by their digest. What is read here another process,
a redaction hook or a hand may have written: it is checked.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

IMAGE_FOLDER = "images"
DAYS = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"
ImageName = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\.(png|jpg|webp|gif|bmp)$")]
"""SHA-256 of the picture's bytes, and what kind of file they are."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]
    """Each `<image>` stands for one of the sample's pictures, in order."""


class Sample(BaseModel):
    """`name` is the served model, `answered_by` the version as the engine names it: catalog/3@c969cdde."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    at: str
    """ISO time in UTC of the request's arrival."""
    name: str
    answered_by: str
    answer_id: str = ""
    """What the answer calls itself, so that the application that got it can name it; '' if that is no plain word."""
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    images: tuple[ImageName, ...] = ()
    answer: str
    finish: str
    """stop, or length for an answer that was cut."""

    @property
    def question(self) -> str:
        return self.messages[-1].content


def read_line(line: str | bytes) -> Sample | None:
    """The sample in a line; None if it holds none, such as half a line after a power cut."""
    try:
        return Sample.model_validate_json(line)
    except ValidationError:
        return None


def day_files(folder: Path) -> list[Path]:
    """Of one server, the oldest first."""
    return sorted(folder.glob(DAYS))


def read_samples(folder: Path, naming: Sequence[str] = ()) -> Iterator[tuple[Sample, Path]]:
    """The samples of all servers below `folder`, or those whose lines hold one of these texts, each with the folder of its pictures, in no order.

    Lines that hold none are passed over.
    """
    texts = [text.encode(errors="backslashreplace") for text in naming]
    for file in folder.glob(f"*/{DAYS}"):
        try:
            with file.open("rb") as lines:
                for line in lines:
                    if (not texts or any(text in line for text in texts)) and (sample := read_line(line)):
                        yield sample, file.parent / IMAGE_FOLDER
        except FileNotFoundError:  # its days were over while we looked
            continue
