"""Samples as a server's writer leaves them."""

import hashlib
from pathlib import Path

from pipeline.project import Project
from pipeline.sample import IMAGE_FOLDER, Message, Sample
from tests.conftest import write_image

ANSWERED_BY = "shop/1@c969cdde"


def write_sample(
    project: Project,
    number: int,
    question: str = "What product is this?",
    answer: str = "a red circle",
    *,
    name: str = "shop",
    picture: bool = True,
    keep: bool = True,
) -> Sample:
    """The sample with that number, taken that many seconds after midnight; its picture is one of its own."""
    folder = project.samples / "server"
    names = []
    if picture:
        image = write_image(folder / IMAGE_FOLDER / f"{number}.png", (number % 256, 10, 10))
        names.append(f"{hashlib.sha256(image.read_bytes()).hexdigest()}.png")
        image.rename(image.with_name(names[0])) if keep else image.unlink()
    made = Sample(
        id=f"{number:016x}",
        at=f"2026-11-27T00:{number // 60:02}:{number % 60:02}.000+00:00",
        name=name,
        answered_by=ANSWERED_BY,
        answer_id=f"chatcmpl-{number}",
        messages=(Message(role="user", content="<image>" * len(names) + question),),
        images=tuple(names),
        answer=answer,
        finish="stop",
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "2026-11-27.jsonl").open("a") as file:
        file.write(made.model_dump_json() + "\n")
    return made


def picture_of(project: Project, sample: Sample) -> Path:
    return project.samples / "server" / IMAGE_FOLDER / sample.images[0]
