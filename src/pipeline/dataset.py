"""Question-answer rows with images: checked row by row, digested by content, held-out rows kept out of training."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Fault, InvalidInput
from pipeline.example import IMAGE_TAG, Example
from pipeline.progress import Report
from pipeline.project import Project
from pipeline.recipe import DatasetFiles
from pipeline.row_statistics import SplitStatistics, lengths
from pipeline.split import Split, read_split

if TYPE_CHECKING:
    from pipeline.inspection import Inspection

__all__ = ["IMAGE_TAG", "Check", "Dataset", "Deep", "Example", "check_dataset", "load_dataset", "plain", "question_keys", "read_examples", "write_swift_rows"]

BATCH_ROWS = 1024
"""Rows written at a time."""


@dataclass(frozen=True)
class Deep:
    """Asks for the deep check: every image decoded, every row's tokens counted."""

    base: Path | None
    """The base model's folder; None leaves tokens uncounted."""
    max_length_tokens: int
    preferences: bool = False
    """Rejected answers are trained on too, so they count."""


@dataclass(frozen=True)
class Dataset:
    """Checked rows. `digest` is SHA-256 over the content of both splits (text and image bytes), whatever the files are called."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    digest: str
    warnings: tuple[Fault, ...] = ()
    statistics: tuple[tuple[str, SplitStatistics], ...] = ()
    """Of each split by name; empty unless tokens were counted."""
    dropped: tuple[int, int] = (0, 0)
    """Bad rows left out of train and eval."""
    row_digests: tuple[tuple[str, ...], ...] = ()
    """Of each row of train and of eval."""

    @property
    def train_digest(self) -> str:
        """SHA-256 over the content of the training rows, in their order."""
        return hashlib.sha256(json.dumps(self.row_digests[0]).encode()).hexdigest()

    @property
    def eval_digest(self) -> str:
        """The same of the held-out rows: scores on equal ones can be held against each other."""
        return hashlib.sha256(json.dumps(self.row_digests[1]).encode()).hexdigest()

    def is_of(self, given: "Dataset") -> bool:
        """Whether these are the rows of `given`, in their order, but for those that were left out since."""
        for mine, theirs, dropped in zip(self.row_digests, given.row_digests, (a - b for a, b in zip(self.dropped, given.dropped, strict=True)), strict=True):
            left = iter(theirs)
            if len(mine) + dropped != len(theirs) or not all(digest in left for digest in mine):
                return False
        return True

    def metrics(self) -> dict[str, float]:
        """Its statistics as metrics of a run."""
        return {key: value for name, split in self.statistics for key, value in split.metrics(name).items()}


@dataclass(frozen=True)
class Check:
    """What a check found. With no faults the rows are fit to be trained on, as far as was looked."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    faults: tuple[Fault, ...]
    """At most MAX_FAULTS and their count for each file."""
    warnings: tuple[Fault, ...]
    statistics: dict[str, SplitStatistics]
    dropped: tuple[int, int]
    image_digests: dict[Path, str]
    """SHA-256 of image files, as far as they were read."""


def _quiet(text: str, fraction: float) -> None:
    pass


def load_dataset(files: DatasetFiles, project: Project, deep: Deep | None = None, report: Report = _quiet, recipe: Path | None = None) -> Dataset:
    """Both splits of a recipe. Raises InvalidInput with every fault that `check_dataset` finds."""
    check = check_dataset(files, project, deep, report, recipe)
    if check.faults:
        raise InvalidInput(check.faults)
    digest_of = _ImageDigests(check.image_digests)
    digests = tuple(tuple(_example_digest(example, digest_of) for example in split) for split in (check.train, check.eval))
    digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return Dataset(check.train, check.eval, digest, check.warnings, tuple(check.statistics.items()), check.dropped, digests)


def read_examples(path: Path, project: Project, max_bad_rows: int = 0) -> tuple[Example, ...]:
    """The rows of one file or folder, checked without opening an image. Raises InvalidInput with row numbers (from 1) and reasons."""
    split = read_split(path, project)
    split.settle(max_bad_rows)
    if split.faults:
        raise InvalidInput(split.shown_faults())
    return tuple(split.examples)


def check_dataset(files: DatasetFiles, project: Project, deep: Deep | None = None, report: Report = _quiet, recipe: Path | None = None) -> Check:
    """Everything wrong or doubtful with a recipe's rows, at once: one fault per cause.

    Without `deep` no image is opened but those of rows that may be equal. A missing file is a fault of `recipe`, if given, by its key there."""
    train, held_out = splits = tuple(_read(files, key, project, recipe) for key in ("train", "eval"))
    train.refuse_mixed()
    inspection = _inspect(splits, deep, report) if deep else None
    digest_of = _ImageDigests({path: look.digest for path, look in inspection.looks.items() if not look.fault} if inspection else {})
    _refuse_overlap(train, held_out, digest_of)
    if inspection:
        from pipeline.inspection import warn_of_images

        warn_of_images(train, held_out, inspection.looks)
    for split in splits:
        split.settle(files.max_bad_rows)
    return Check(
        tuple(train.examples),
        tuple(held_out.examples),
        (*(inspection.faults if inspection else ()), *(fault for split in splits for fault in split.shown_faults())),
        tuple(warning for split in splits for warning in split.warnings),
        {name: _statistics(split, inspection) for name, split in zip(("train", "eval"), splits, strict=True)} if inspection and inspection.tokens else {},
        (train.dropped, held_out.dropped),
        digest_of.known,
    )


def _read(files: DatasetFiles, key: str, project: Project, recipe: Path | None) -> Split:
    given: Path = getattr(files, key)
    path = project.resolve(given)
    if not _exists(path):
        message = f"{given} does not exist below {project.root}; correct the path"
        return Split(path, project.relative(path), faults=[Fault(str(recipe) if recipe else project.relative(path), f"dataset.{key}", message)])
    train = project.resolve(files.train)
    if key == "eval" and _exists(train) and path.resolve() == train.resolve():
        return Split(path, project.relative(path), faults=[Fault(project.relative(path), "", "is the training file too; held-out rows must not be trained on")])
    return read_split(path, project)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be looked into
        return False


def _inspect(splits: Sequence[Split], deep: Deep, report: Report) -> "Inspection":
    from pipeline.inspection import inspect  # numpy, PIL and the tokenizer

    return inspect(splits, deep.base, deep.max_length_tokens, deep.preferences, report)


class _ImageDigests:
    """SHA-256 of image files, each read once."""

    def __init__(self, known: dict[Path, str]) -> None:
        self.known = known

    def __call__(self, image: Path) -> str:
        if image not in self.known:
            self.known[image] = file_digest(image)
        return self.known[image]


def _refuse_overlap(train: Split, held_out: Split, digest_of: Callable[[Path], str]) -> None:
    """Held-out rows that are also trained on are faults; rows that stand twice in one split are warnings."""
    keys = _keys_of_equals([*train.examples, *held_out.examples], digest_of)
    first_trained, twice_trained = _first_and_again(train.examples, keys)
    _, twice_judged = _first_and_again(held_out.examples, keys[len(train.examples) :])
    train.warn((f"row {row}", f"is also row {first}: it is trained on twice; remove one") for row, first in twice_trained)
    held_out.warn((f"row {row}", f"is also row {first}: it counts twice; remove one") for row, first in twice_judged)
    held_out.trained = {
        example.row: [("", f"is also row {first_trained[key]} of {train.label}; held-out rows must not be trained on: remove one of them")]
        for example, key in zip(held_out.examples, keys[len(train.examples) :], strict=True)
        if key in first_trained
    }


def _first_and_again(examples: Sequence[Example], keys: Iterable[str]) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """The first row of each key, and every later row of it with that first one."""
    first: dict[str, int] = {}
    again: list[tuple[int, int]] = []
    for example, key in zip(examples, keys, strict=False):
        if key and key in first:
            again.append((example.row, first[key]))
        elif key:
            first[key] = example.row
    return first, again


def _keys_of_equals(examples: Sequence[Example], digest_of: Callable[[Path], str]) -> list[str]:
    """A digest of text and images for each row that may equal another, '' for one that cannot: only images of equal size under equal text are read.

    Text is compared as a reader would, `Dataset.digest` is of it as it is."""
    sizes: dict[Path, int] = {}
    rough: list[tuple[Any, ...]] = []
    for example in examples:
        sizes |= {image: image.stat().st_size for image in example.images if image not in sizes}
        turns = (text for message in example.messages for text in (message["role"], plain(message["content"])))
        rough.append((*turns, *map(sizes.get, example.images)))
    counts = Counter(rough)
    return [_digest_of([key, [*map(digest_of, example.images)]]) if counts[key] > 1 else "" for example, key in zip(examples, rough, strict=True)]


def question_keys(examples: Sequence[Example]) -> list[str]:
    """A digest of question and images, whatever the answer, for each row that may ask what another asks, '' for one that cannot."""
    return _keys_of_equals([replace(example, messages=example.prompt) for example in examples], _ImageDigests({}))


def plain(text: str) -> str:
    """What equal texts have in common: written with other white space around them or with accents apart they are still equal."""
    return unicodedata.normalize("NFC", text).strip()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_digest(example: Example, digest_of: Callable[[Path], str], *more: str) -> str:
    return _digest_of([example.messages, [digest_of(image) for image in example.images], *more])


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _example_digest(example: Example, digest_of: Callable[[Path], str]) -> str:
    more = [example.rejected] if example.rejected or example.weight != 1 else []
    return _content_digest(example, digest_of, *more, *([str(example.weight)] if example.weight != 1 else []))


def _statistics(split: Split, inspection: "Inspection") -> SplitStatistics:
    counted = [inspection.tokens[split.label, example.row] for example in split.examples]
    images = {inspection.looks[image].digest for example in split.examples for image in example.images}
    columns = ([row[column] for row in counted] for column in range(3))
    return SplitStatistics(len(counted), split.dropped, len(images), *map(lengths, columns))


def write_swift_rows(examples: Sequence[Example], path: Path) -> None:
    """Writes rows as ms-swift reads them: absolute image paths, nothing but messages, images, rejected answers and the weight of the answers' loss.

    As Parquet, whose types are said: in JSONL `datasets` guesses them anew every 16 MB, so that lists that begin empty break it and dates are no text."""
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    weight = [("loss_scale", pyarrow.float64())] if any(example.weight != 1 for example in examples) else []
    rejected = [("rejected_response", text)] if any(example.rejected for example in examples) else []
    message = pyarrow.struct([("role", text), ("content", text), *weight])
    schema = pyarrow.schema([("messages", pyarrow.list_(message)), ("images", pyarrow.list_(text)), *rejected])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(examples), BATCH_ROWS):
            rows = [_swift_row(example) for example in examples[start : start + BATCH_ROWS]]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))


def _swift_row(example: Example) -> dict[str, Any]:
    """Of its keys those are written that the file's schema has."""
    messages = [message | ({"loss_scale": example.weight} if message["role"] == "assistant" else {}) for message in example.messages]
    return {"messages": messages, "images": [str(image.absolute()) for image in example.images], "rejected_response": example.rejected or None}
