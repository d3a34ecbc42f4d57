"""Question-answer rows with images: read, check every row, digest by content, refuse overlap of training and held-out rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.errors import Fault, InvalidInput
from pipeline.project import Project
from pipeline.recipe import DatasetFiles

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
ROW_KEYS = {"messages", "images", "kind", "slice"}
MAX_FAULTS = 50
"""Shown per file; a file with more is wrong as a whole."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation that ends with the answer to learn, and the images that its `<image>` tags stand for, in order."""

    messages: tuple[dict[str, str], ...]
    images: tuple[Path, ...]
    kind: str = ""
    """Kind of question; scores are reported per kind."""
    slice: str = ""
    """A part of the held-out rows whose score is reported on its own."""
    row: int = 0
    """Its line in the file, from 1."""

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Dataset:
    """Checked rows. `digest` is SHA-256 over the content of both splits (text and image bytes), whatever the files are called."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    digest: str


def load_dataset(files: DatasetFiles, project: Project) -> Dataset:
    """Both splits of a recipe. Raises InvalidInput with a fault per bad row, or per held-out row that is also trained on."""
    faults: list[Fault] = []
    splits: list[tuple[Example, ...]] = []
    for path in (project.resolve(files.train), project.resolve(files.eval)):
        try:
            splits.append(read_examples(path))
        except InvalidInput as error:
            faults += error.faults
    if faults:
        raise InvalidInput(faults)
    train, held_out = splits
    image_digests = {image: file_digest(image) for example in (*train, *held_out) for image in example.images}
    digests = [[_example_digest(example, image_digests) for example in split] for split in splits]
    trained = {digest: example.row for digest, example in zip(digests[0], train, strict=True)}
    overlap = [
        Fault(
            str(files.eval), f"row {example.row}", f"is also row {trained[digest]} of {files.train}; held-out rows must not be trained on: remove one of them"
        )
        for digest, example in zip(digests[1], held_out, strict=True)
        if digest in trained
    ]
    if overlap:
        raise InvalidInput(overlap[:MAX_FAULTS])
    return Dataset(train, held_out, hashlib.sha256(json.dumps(digests).encode()).hexdigest())


def read_examples(path: Path) -> tuple[Example, ...]:
    """The rows of one JSONL file. Raises InvalidInput with row numbers (from 1) and reasons."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidInput([Fault(str(path), "", f"cannot be read ({error.strerror}); give a JSONL file")]) from error
    faults: list[Fault] = []
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.append(Fault(str(path), f"row {number}", f"is not JSON in UTF-8 ({error})"))
            continue
        found = _row_faults(row, path.parent)
        faults += [Fault(str(path), f"row {number}{where}", message) for where, message in found]
        if not found:
            messages = tuple({"role": message["role"], "content": message["content"]} for message in row["messages"])
            images = tuple(path.parent / image for image in row.get("images", ()))
            examples.append(Example(messages, images, row.get("kind", ""), row.get("slice", ""), number))
    if not examples and not faults:
        faults.append(Fault(str(path), "", "holds no rows"))
    if faults:
        more = [Fault(str(path), "", f"and {len(faults) - MAX_FAULTS} more faults")] if len(faults) > MAX_FAULTS else []
        raise InvalidInput([*faults[:MAX_FAULTS], *more])
    return tuple(examples)


def _row_faults(row: Any, folder: Path) -> list[tuple[str, str]]:
    """What is wrong with one row: (where inside the row, message)."""
    if not isinstance(row, dict):
        return [("", "is not an object with `messages` and `images`")]
    faults = [(f".{key}", "unknown key; a row has messages, images, kind, slice") for key in row.keys() - ROW_KEYS]
    faults += [(f".{key}", "must be a string") for key in ("kind", "slice") if not isinstance(row.get(key, ""), str)]
    messages, images = row.get("messages"), row.get("images", [])
    if not _is_list_of(messages, dict) or not messages:
        return [*faults, (".messages", "must be a list of {role, content} that ends with the assistant's answer")]
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            faults.append((f".messages.{index}.role", f"{message.get('role')!r} is not one of {', '.join(ROLES)}"))
        if not isinstance(message.get("content"), str) or not message["content"]:
            faults.append((f".messages.{index}.content", "must be a non-empty string"))
    if faults:
        return faults
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        faults.append((".messages", "must ask something and end with the assistant's answer"))
    if not _is_list_of(images, str):
        return [*faults, (".images", "must be a list of paths relative to the file")]
    tags = sum(message["content"].count(IMAGE_TAG) for message in messages)
    if tags != len(images):
        faults.append((".images", f"{len(images)} images for {tags} {IMAGE_TAG} tags; every tag stands for one image"))
    faults += [(f".images.{index}", f"{image} does not exist") for index, image in enumerate(images) if not (folder / image).is_file()]
    return faults


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _example_digest(example: Example, image_digests: dict[Path, str]) -> str:
    content = [example.messages, [image_digests[image] for image in example.images]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def write_swift_rows(examples: Sequence[Example], path: Path) -> None:
    """Writes rows as ms-swift reads them: absolute image paths, nothing but messages and images."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"messages": example.messages, "images": [str(image.absolute()) for image in example.images]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check_files(files: DatasetFiles, recipe: Path, project: Project) -> list[Fault]:
    """What a recipe's dataset files lack, without opening an image: a missing file by its key in the recipe, bad rows by their number."""
    faults: list[Fault] = []
    for key, path in (("dataset.train", files.train), ("dataset.eval", files.eval)):
        if not project.resolve(path).is_file():
            faults.append(Fault(str(recipe), key, f"{path} does not exist below {project.root}; correct the path"))
            continue
        try:
            read_examples(project.resolve(path))
        except InvalidInput as error:
            faults += error.faults
    return faults
