"""The process that writes a server's samples: it has no part in answering, so that neither reading pictures nor a redaction hook can hold up or end a request.

`python -m pipeline.serving.sample_writer SETTINGS` says `ready`, or why not, and then for each exchange on stdin what became of it, a line each. It ends with its stdin.
"""

import importlib
import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.sample import IMAGE_FOLDER, Sample, day_files, read_line
from pipeline.serving.exchange import Unusable, sample_of
from pipeline.serving.sampling import READY, Outcome
from pipeline.serving.settings import SamplingSettings

Redact = Callable[[dict[str, Any]], dict[str, Any] | None]
LOOK_SECONDS = 600.0
"""How often an idle writer looks whether samples are too old."""
REDACTED = ("messages", "images", "answer")
"""What a redaction hook may change."""
NICENESS = 10


class SampleFolder:
    """One server's samples on disk: files that only their owner can read, no more bytes and no older than was said. For one process."""

    def __init__(self, folder: Path, keep_days: int, max_bytes: int, today: Callable[[], date] = lambda: datetime.now(UTC).date()) -> None:
        self.folder, self.images = folder, folder / IMAGE_FOLDER
        self._keep, self._max_bytes, self._today = timedelta(days=keep_days), max_bytes, today
        self.images.mkdir(parents=True, exist_ok=True, mode=0o700)
        for made in (folder, self.images):
            made.chmod(0o700)
        self._bytes = 0
        self._looked: date | None = None
        self._remove([])
        self.expire()

    def expire(self) -> None:
        """Removes days that are too old, and pictures that only they showed; looks once a day."""
        if self._looked != (today := self._today()):
            self._looked = today
            if old := [file for file in day_files(self.folder) if date.fromisoformat(file.stem) + self._keep <= today]:
                self._remove(old)

    def _remove(self, files: list[Path]) -> None:
        """Also whatever picture no sample shows, as a writer that was killed may leave one."""
        for file in files:
            file.unlink()
        shown = {name for file in day_files(self.folder) for name in _images(file)}
        for image in self.images.iterdir():
            if image.name not in shown:
                image.unlink()
        self._bytes = sum(file.stat().st_size for file in (*day_files(self.folder), *self.images.iterdir()))

    def write(self, sample: Sample, pictures: dict[str, bytes]) -> bool:
        """Adds the sample and those of its pictures that are not there yet; False if there is no room. The oldest days make room, today does not."""
        line = sample.model_dump_json().encode() + b"\n"
        while True:
            new = {name: picture for name, picture in pictures.items() if not (self.images / name).is_file()}
            size = len(line) + sum(map(len, new.values()))
            if self._bytes + size <= self._max_bytes:
                break
            older = [file for file in day_files(self.folder) if file.stem != self._day]
            if not older:
                return False
            self._remove(older[:1])
        for name, picture in new.items():
            draft = self.images / f".{name}"
            _append(draft, picture, os.O_TRUNC)
            draft.replace(self.images / name)
        _append(self.folder / f"{self._day}.jsonl", line, os.O_APPEND)
        self._bytes += size
        return True

    @property
    def _day(self) -> str:
        return self._today().isoformat()


def _append(path: Path, content: bytes, how: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "wb") as file:
        file.write(content)


def _images(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for line in lines:
            if sample := read_line(line):
                yield from sample.images


def load_hook(path: str) -> Redact:
    """The function at a dotted path. Raises ValueError, saying what is wrong."""
    module, _, name = path.rpartition(".")
    try:
        hook = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(
            f"redact: {path} cannot be imported ({type(error).__name__}: {error}); give module.function, importable from the project's folder"
        ) from error
    if not callable(hook):
        raise ValueError(f"redact: {path} is no function; give one that takes a sample and returns it, changed or not, or None to leave it out")
    found: Redact = hook
    return found


def redacted(sample: Sample, hook: Redact | None) -> Sample | None:
    """What the hook lets pass; None: nothing. Of what it returns only question, answer and pictures count. Raises whatever it raises, ValidationError if it returns no sample."""
    if hook is None:
        return sample
    whole = sample.model_dump(mode="json")
    given = hook(sample.model_dump(mode="json"))
    if given is None:
        return None
    return Sample.model_validate_json(json.dumps(whole | {key: given[key] for key in REDACTED if key in given}))


def write(header: bytes, read: Callable[[int], bytes], folder: SampleFolder, hook: Redact | None, keep_images: bool) -> Outcome:
    """What became of one exchange. A sample that its hook fails on is not written."""
    said = json.loads(header)
    body, answer = read(said["body"]), read(said["answer"])
    try:
        folder.expire()
        taken, pictures = sample_of(body, answer, said["name"], said["at"])
        sample = redacted(taken, hook)
        if sample is None:
            return "redacted"
        kept = {name: pictures[name] for name in sample.images if name in pictures} if keep_images else {}
        return "kept" if folder.write(sample, kept) else "full"
    except Unusable:
        return "unusable"
    except Exception as error:  # its words may quote the sample, which no log may
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        print(f"tuneserve: sample not written: {type(error).__name__}{reason} at {where.filename}:{where.lineno}", file=sys.stderr, flush=True)
        return "failed"


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server drains first; our stdin ends with it
    os.umask(0o077)
    os.nice(NICENESS)
    says, sys.stdout = sys.stdout, sys.stderr  # whatever a hook prints is no answer
    settings = SamplingSettings.model_validate_json(sys.argv[1])
    hook = None
    try:
        hook = load_hook(settings.redact) if settings.redact else None
        folder = SampleFolder(settings.folder, settings.keep_days, settings.max_bytes)
    except (ValueError, OSError) as error:
        print(re.sub(r"\s+", " ", str(error)), file=says, flush=True)
        return
    print(READY, file=says, flush=True)
    stdin = sys.stdin.buffer
    while True:
        while not select.select([stdin], [], [], LOOK_SECONDS)[0]:  # nothing is in its buffer: an exchange comes after the word about the one before
            folder.expire()
        if not (header := stdin.readline()):
            return
        print(write(header, stdin.read, folder, hook, settings.keep_images), file=says, flush=True)


if __name__ == "__main__":
    main()
