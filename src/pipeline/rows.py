"""Rows as they lie in files: JSONL, JSON, CSV, Parquet and Hugging Face dataset folders, each row with its number. Local files only.

JSONL, JSON and CSV are read with the standard library: a bad line is that row's fault alone, text stays text ("001", "NA"), and a check starts at once.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import Fault, InvalidInput
from pipeline.project import Project

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BATCH_ROWS = 64
"""Rows of a table in memory at a time; embedded images may be megabytes each."""
MAX_CELL = 16 * 2**20
"""Characters of one CSV cell."""
SPLIT_NAME = re.compile(r"(?<![a-z])(train|training|test|testing|validation|valid|dev|val|eval|evaluation)(?![a-z])")
"""What `datasets` takes for a split in the name of a file or folder."""
SAME_SPLIT = {"training": "train", "testing": "test", "valid": "validation", "dev": "validation", "val": "validation", "eval": "test", "evaluation": "test"}
IMAGE_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


class Row(NamedTuple):
    number: int
    """Its line in a JSONL file, else its place among the rows of a file or folder; from 1."""
    content: Any
    folder: Path
    """What its image paths are relative to."""
    fault: str = ""
    """Why the row could not be read at all."""


def read_rows(path: Path, project: Project) -> Iterator[Row]:
    """The rows of a file or a dataset folder, one at a time. Raises InvalidInput if the file as a whole cannot be read."""
    try:
        yield from _folder_rows(path, project) if path.is_dir() else _file_rows(path, project)
    except OSError as error:
        raise _refused(path, project, f"cannot be read ({error.strerror or error}); give a file of rows") from error


def _file_rows(path: Path, project: Project) -> Iterator[Row]:
    readers: dict[str, Callable[[Path, Project], Iterator[Row]]] = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": lambda path, project: _parquet_rows([path], project),
    }
    if path.suffix.lower() not in readers:
        raise _refused(path, project, f"is not one of {', '.join(SUFFIXES)} or a dataset folder; convert it")
    if not path.is_file():
        raise _refused(path, project, "cannot be read (no such plain file); give a file of rows")
    return readers[path.suffix.lower()](path, project)


def _jsonl_rows(path: Path, project: Project) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901
            if line.strip():
                yield _json_line(number, line, path.parent)


def _json_line(number: int, line: bytes, folder: Path) -> Row:
    try:
        return Row(number, json.loads(line.decode()), folder)
    except UnicodeDecodeError as error:
        return Row(number, None, folder, f"is not UTF-8 ({error.reason} at byte {error.start + 1}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(number, None, folder, f"is not JSON ({error}); write one object a line")


def _json_rows(path: Path, project: Project) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _refused(path, project, f"is not JSON in UTF-8 ({error}); a .json file is one list of rows, one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise _refused(path, project, "is not a list of rows; put the rows into [ ]")
    for number, row in enumerate(rows, 1):
        yield Row(number, row, path.parent)


def _csv_rows(path: Path, project: Project) -> Iterator[Row]:
    """Bytes that are not UTF-8 become lone surrogates, which make the row's fault when it is checked."""
    csv.field_size_limit(MAX_CELL)
    with io.TextIOWrapper(path.open("rb"), "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise _refused(path, project, f"has no header row of different names (got {', '.join(header) or 'nothing'})")
            for number, cells in enumerate((cells for cells in reader if cells), 1):
                yield _csv_row(number, header, cells, path.parent)
        except csv.Error as error:
            raise _refused(path, project, f"is not CSV (line {reader.line_num}: {error}); quote cells with commas or line breaks") from error


def _csv_row(number: int, header: list[str], cells: list[str], folder: Path) -> Row:
    if len(cells) != len(header):
        return Row(number, None, folder, f"has {len(cells)} cells for {len(header)} columns; quote cells with commas or line breaks")
    if any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
        return Row(number, None, folder, "is not UTF-8; save the file as UTF-8")
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    try:
        for name in ("messages", "images", "weight"):
            if name in row and (name != "images" or row[name].startswith("[")):
                row[name] = json.loads(row[name])
    except (ValueError, RecursionError) as error:
        return Row(number, None, folder, f"column {name} is not JSON ({error})")
    for name in ("image", "images"):
        if isinstance(row.get(name), str):
            row[name] = [part.strip() for part in row[name].split(";") if part.strip()]
    return Row(number, row, folder)


def _folder_rows(path: Path, project: Project) -> Iterator[Row]:
    """A folder that `save_to_disk` wrote, or one of shards of one format and one split."""
    if (path / "dataset_dict.json").is_file():
        folders = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise _refused(path, project, f"holds the splits {folders}; name one of its folders")
    if (path / "state.json").is_file():
        return _saved_rows(path, project)
    shards = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not any(part[0] in "._" for part in file.relative_to(path).parts))
    shards = [file for file in shards if file.name not in ("dataset_info.json", "dataset_infos.json")]
    kinds = {file.suffix.lower() for file in shards}
    if len(kinds) != 1:
        raise _refused(path, project, f"holds {'files of several formats' if kinds else 'no rows'}; give a folder of shards of one of {', '.join(SUFFIXES)}")
    names = {match[0] for file in shards for match in SPLIT_NAME.finditer(file.relative_to(path).as_posix().lower())}
    if len(splits := {SAME_SPLIT.get(name, name) for name in names}) > 1:
        raise _refused(path, project, f"holds several splits ({', '.join(sorted(splits))}); name the file or folder of one")
    return _parquet_rows(shards, project) if kinds == {".parquet"} else _numbered(shards, project)


def _numbered(shards: list[Path], project: Project) -> Iterator[Row]:
    """The rows of all shards, counted through."""
    rows = (row for shard in shards for row in _file_rows(shard, project))
    return (row._replace(number=number) for number, row in enumerate(rows, 1))


def _parquet_rows(shards: list[Path], project: Project) -> Iterator[Row]:
    numbers = itertools.count(1)
    for shard in shards:
        for row in _parquet_contents(shard, project):
            yield Row(next(numbers), _with_stored_images(row, project), shard.parent)


def _parquet_contents(shard: Path, project: Project) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet  # not `datasets`, which refuses a shard without rows

    try:
        with parquet.ParquetFile(shard) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise _refused(shard, project, f"is not Parquet that can be read ({str(error).splitlines()[0] if str(error) else error!r})") from error


def _saved_rows(path: Path, project: Project) -> Iterator[Row]:
    for number, row in enumerate(_saved_contents(path, project), 1):
        yield Row(number, _with_stored_images(row, project), path)


def _saved_contents(path: Path, project: Project) -> Iterator[dict[str, Any]]:
    import pyarrow

    datasets = _datasets(project)
    try:
        for batch in datasets.load_from_disk(str(path)).with_format("arrow").iter(BATCH_ROWS):
            yield from batch.to_pylist()
    except IndexError:  # what `load_from_disk` raises where no rows were saved
        return
    except (ValueError, OSError, KeyError, TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise _refused(path, project, f"is not a dataset that `save_to_disk` wrote ({error}); save it again") from error


def _datasets(project: Project) -> Any:
    """The library, its hub off and its caches inside the project; it reads where they are from the environment, once, when it is imported."""
    before = os.environ.get("HF_HOME")
    os.environ.setdefault("HF_HOME", project.environment().get("HF_HOME", ""))
    try:
        import datasets
    finally:
        if before is None:
            del os.environ["HF_HOME"]
    datasets.config.HF_HUB_OFFLINE = True  # else even a local file is counted as a download over the network
    datasets.disable_progress_bars()
    return datasets


def _with_stored_images(row: dict[str, Any], project: Project) -> dict[str, Any]:
    """The row with pictures that lie inside the table written to files of the project."""
    for key in ("image", "images"):
        if isinstance(row.get(key), list):
            row[key] = [_stored(image, project) for image in row[key]]
        elif key in row:
            row[key] = _stored(row[key], project)
    return row


def _stored(image: Any, project: Project) -> Any:
    """The path of a picture given as {bytes, path}: its own if it has no bytes, else a file named by the bytes' digest, written once."""
    if not isinstance(image, dict) or not image.keys() <= {"bytes", "path"}:
        return image
    content = image.get("bytes")
    if not isinstance(content, bytes):
        return image.get("path")
    path = project.images / f"{hashlib.sha256(content).hexdigest()}.{image_ending(content)}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(content)
        draft.replace(path)
    return str(path)


def image_ending(content: bytes) -> str:
    """What a file with a picture of these bytes is called after the dot; bin if they are of no kind that we know."""
    return next((ending for start, ending in IMAGE_ENDINGS.items() if content.startswith(start)), "bin")


def _refused(path: Path, project: Project, message: str) -> InvalidInput:
    return InvalidInput([Fault(project.relative(path), "", message)])
