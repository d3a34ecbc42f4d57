"""The deep look at rows whose structure is good: every image decoded, every row's tokens counted, pictures of one split found again in the other."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Fault, InvalidInput
from pipeline.example import Example, Found
from pipeline.image_file import Look, look_at_all
from pipeline.likeness import Likeness, alike
from pipeline.progress import Report
from pipeline.prompt import Task, Tokens, count_all, read_counter
from pipeline.split import MAX_WARNINGS, Split
from pipeline.workers import FEW, Workers, workers

SMALL_BYTES = 4 * 2**20
"""Image files that one process decodes before a second one has started."""


@dataclass(frozen=True)
class Inspection:
    """What was seen of the good rows."""

    looks: dict[Path, Look]
    tokens: dict[tuple[str, int], Tokens]
    """By split and row; empty if they were not counted."""
    faults: tuple[Fault, ...] = ()
    """What kept tokens from being counted with the base model."""


def inspect(splits: Sequence[Split], base: Path | None, max_length_tokens: int, preferences: bool, report: Report) -> Inspection:
    """Refuses rows with images that do not decode or with too many tokens; without a `base` that can be read tokens are not counted.

    Rejected answers count only with `preferences`: else nothing is trained on them.
    """
    base, faults = _readable(base)
    paths = list({image: None for split in splits for example in split.examples for image in example.images})
    steps = len(paths) + (sum(len(split.examples) for split in splits) if base else 0)
    looks: dict[Path, Look] = {}
    tokens: dict[tuple[str, int], Tokens] = {}
    with workers() as hired:
        small = len(paths) <= FEW and sum(path.stat().st_size for path in paths) <= SMALL_BYTES
        for path, look in zip(paths, hired.map(look_at_all, paths, small), strict=True):
            looks[path] = look
            report(f"{len(looks)} of {len(paths)} images", len(looks) / steps)
        for split in splits:
            split.refuse(_image_faults(split, looks))
            if base:
                done = len(paths) + len(tokens)
                split.refuse(_count(hired, split, looks, base, max_length_tokens, preferences, tokens))
                report(f"{len(tokens)} rows counted", min(1.0, (done + len(split.examples)) / max(1, steps)))  # no row may be left to look at
    return Inspection(looks, tokens, faults)


def _readable(base: Path | None) -> tuple[Path | None, tuple[Fault, ...]]:
    """The base if its tokenizer and image processor can be read, else why not."""
    try:
        if base:
            read_counter(base)
    except InvalidInput as error:
        return None, error.faults
    return base, ()


def _image_faults(split: Split, looks: dict[Path, Look]) -> dict[int, list[Found]]:
    found = {
        example.row: [(f".images.{index}", f"{split.shown(image)} {looks[image].fault}") for index, image in enumerate(example.images) if looks[image].fault]
        for example in split.examples
    }
    return {row: faults for row, faults in found.items() if faults}


def _count(
    hired: Workers, split: Split, looks: dict[Path, Look], base: Path, limit: int, preferences: bool, tokens: dict[tuple[str, int], Tokens]
) -> dict[int, list[Found]]:
    """Adds the rows' lengths to `tokens`; returns what is wrong with rows that are too long or cannot be counted."""
    bad: dict[int, list[Found]] = {}
    sizes = [tuple(looks[image].size for image in example.images) for example in split.examples]
    tasks = [Task(row.messages, size, row.rejected if preferences else "") for row, size in zip(split.examples, sizes, strict=True)]
    for example, counted in zip(split.examples, hired.map(functools.partial(count_all, base), tasks), strict=True):
        if isinstance(counted, str):
            bad[example.row] = [("", counted)]
            continue
        tokens[split.label, example.row] = counted
        if counted.row > limit:
            bad[example.row] = [
                ("", f"is {counted.row} tokens long, {counted.images} of them images; training.max_length_tokens is {limit}: shorten it or raise that")
            ]
    return bad


def warn_of_images(train: Split, held_out: Split, looks: dict[Path, Look]) -> None:
    """Warns of held-out pictures that are trained on, as the same file or saved again, and of pictures that serving would show otherwise."""
    for split in (train, held_out):
        doubts = {image: looks[image].doubt for example in split.examples for image in example.images if looks[image].doubt}
        rows = {image: example.row for example in reversed(split.examples) for image in example.images}
        split.warn((f"row {rows[image]}", f"{split.shown(image)} {doubt}") for image, doubt in doubts.items())
    new_rows = [example for example in held_out.examples if example.row not in held_out.trained]  # the others are faults already
    trained, judged = _first_rows(train.examples, looks), _first_rows(new_rows, looks)
    if same := [digest for digest in judged if digest in trained]:
        pairs = ", ".join(f"row {judged[digest].row} and row {trained[digest].row}" for digest in same[:MAX_WARNINGS])
        held_out.warn([("", f"{len(same)} of {len(judged)} images are also in {train.label}, with another question or answer ({pairs})")])
    held_out.warn(
        (f"row {judged[new].row}", f"an image looks like that of row {trained[old].row} of {train.label}, saved again; a held-out picture should be new")
        for old, new in _alike([digest for digest in trained if digest not in judged], [digest for digest in judged if digest not in trained], looks)
    )


def _first_rows(examples: Sequence[Example], looks: dict[Path, Look]) -> dict[str, Example]:
    """Digest of each image to the first row that shows it."""
    return {looks[image].digest: example for example in reversed(examples) for image in example.images}


def _alike(old: list[str], new: list[str], looks: dict[Path, Look]) -> Iterator[tuple[str, str]]:
    likenesses: dict[str, Likeness] = {look.digest: look.likeness for look in looks.values() if look.likeness}
    for one, other in alike([likenesses[digest] for digest in old], [likenesses[digest] for digest in new]):
        yield old[one], new[other]
