"""The folder of a benchmark: a JSON line for everything measured, written at once, since machines get lost; and what is made from these lines."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import Fault, InvalidInput

LINES, RESULT, TABLE = "rounds.jsonl", "result.json", "result.md"
BenchKind = Literal["serve", "swap", "train"]


class Record:
    """A new folder whose first line is `header`: the kind, the settings, the machine. Raises InvalidInput if the folder holds anything already."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        refuse_used(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.add(header)

    def add(self, line: Mapping[str, Any]) -> None:
        """On the disk when this returns."""
        with (self.folder / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput([Fault("--out", "", f"{folder} is there and not empty; name another folder, so that no figures are mixed")])


def new_folder(bench: Path, kind: BenchKind) -> Path:
    """A folder below `bench` that is not there yet."""
    stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(bench / name for name in names if not (bench / name).exists())


def read_record(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the lines after it; a last one that was cut is left out. Raises InvalidInput if the folder holds no benchmark."""
    try:
        written = (folder / LINES).read_text("utf-8").splitlines(keepends=True)
        header, *lines = [json.loads(line) for line in written if line.endswith("\n")]
        if header["kind"] not in get_args(BenchKind):
            raise ValueError(header["kind"])
    except FileNotFoundError:
        raise InvalidInput([Fault(str(folder), "", f"holds no {LINES}; name a folder that tuneserve bench has written")]) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput([Fault(str(folder / LINES), "", f"is no benchmark's record ({error}); name a folder that tuneserve bench has written")]) from None
    return header, lines
