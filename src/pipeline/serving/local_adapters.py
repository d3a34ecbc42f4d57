"""Adapters on this replica's disk: one read-only folder per digest, complete and of that digest from the moment it has its name."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Container
from pathlib import Path

from pipeline.adapter import ADAPTER_FILES, adapter_digest
from pipeline.errors import AdapterInvalid, VersionRefused

Fill = Callable[[Path], Awaitable[None]]
"""Puts an adapter's files into the given empty folder."""
UNFINISHED = ".unfinished-"
FOLDER_MODE, FILE_MODE = 0o555, 0o444

Look = tuple[tuple[int, int, int, int], ...]
"""Mode, size, inode and time of change of a folder's files: what changes when somebody touches them."""


class LocalAdapters:
    """The folders `<root>/<digest>/`. One process at a time owns `root`: it sweeps away what a killed one left half done.

    A folder is never changed once it was handed out, and goes only through `trim`, `damage` and `mend`: vLLM may read it again and dies if it cannot.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._looks: dict[str, Look] = {}
        """How each folder looked when its content was verified by this process."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        root.mkdir(parents=True, exist_ok=True)
        for unfinished in root.glob(f"{UNFINISHED}*"):
            discard(unfinished)

    def holds(self, digest: str) -> bool:
        """Whether a folder of this digest was verified by this process."""
        return digest in self._looks

    async def get(self, digest: str) -> Path | None:
        """The folder of `digest` if it is here and its content has that digest; a damaged one is removed. Read fully once per process."""
        async with self._locks[digest]:
            return await self._get(digest)

    async def obtain(self, digest: str, fill: Fill) -> Path:
        """The folder of `digest`, filled by `fill` unless it is here; callers at the same time share one filling.

        Raises VersionRefused (digest-mismatch) if what was filled in has another digest; whatever `fill` raises goes through. Neither leaves a trace.
        """
        async with self._locks[digest]:
            return await self._get(digest) or await self._fill(digest, fill)

    async def mend(self, digest: str, fill: Fill) -> None:
        """Puts a whole folder in the place of a damaged one; raises as `obtain`, and then the damaged one is still there."""
        async with self._locks[digest]:
            await self._fill(digest, fill)

    def damage(self, digest: str) -> str | None:
        """What happened to a verified folder since, by a look at its files' status; None if nothing."""
        try:
            if look(self.root / digest) != self._looks.get(digest):
                return "its local files were changed"
        except OSError as error:
            return f"its local files cannot be read ({error.strerror})"
        return None

    def trim(self, limit_bytes: int, keep: Container[str]) -> tuple[int, int]:
        """Removes folders, the ones unused for longest first, until all together hold at most `limit_bytes`; none of `keep`. Returns folders and bytes left."""
        found = []
        for folder in self.root.iterdir():
            with contextlib.suppress(OSError):
                if not folder.name.startswith("."):
                    found.append((folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder))
        total, count = sum(size for _, size, _ in found), len(found)
        for _, size, folder in sorted(found):
            if total <= limit_bytes:
                break
            if folder.name not in keep:
                discard(folder)
                self._looks.pop(folder.name, None)
                total, count = total - size, count - 1
        return count, total

    async def _get(self, digest: str) -> Path | None:
        folder = self.root / digest
        if digest in self._looks and not self.damage(digest):
            os.utime(folder)  # used now: `trim` goes by this
            return folder
        if not folder.exists():
            return None
        try:
            await asyncio.to_thread(check, folder, digest)
            folder.chmod(FOLDER_MODE)
            os.utime(folder)
            self._looks[digest] = look(folder)
        except (AdapterInvalid, VersionRefused, OSError):
            discard(folder)
            self._looks.pop(digest, None)
            return None
        return folder

    async def _fill(self, digest: str, fill: Fill) -> Path:
        unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{digest[:8]}-", dir=self.root))
        folder = self.root / digest
        try:
            await fill(unfinished)
            await asyncio.to_thread(check, unfinished, digest)
            for name in ADAPTER_FILES:
                (unfinished / name).chmod(FILE_MODE)
            if folder.exists():  # damaged; both renames together are over before anybody opens a file
                damaged = unfinished.with_name(unfinished.name + "-damaged")
                folder.chmod(0o700)  # moving a directory needs write permission on it
                folder.rename(damaged)
                unfinished.rename(folder)
                discard(damaged)
            else:
                unfinished.rename(folder)
        except BaseException:  # also a cancelled download
            if unfinished.exists():
                discard(unfinished)
            raise
        folder.chmod(FOLDER_MODE)
        self._looks[digest] = look(folder)
        return folder


def check(folder: Path, digest: str) -> None:
    """Raises unless `folder` holds an adapter's files with this digest: AdapterInvalid if they are not there, VersionRefused if they are others."""
    found = adapter_digest(folder)
    if found != digest:
        raise VersionRefused(
            "digest-mismatch",
            f"its files have digest {found[:16]}, its tag says {digest[:16]}; they were changed after registration: register the adapter again",
        )


def look(folder: Path) -> Look:
    of_folder, of_files = folder.stat(), [(folder / name).stat() for name in ADAPTER_FILES]
    # The folder's own time and size change with its use (`os.utime`) and say nothing of its files.
    return ((of_folder.st_mode, 0, of_folder.st_ino, 0), *((file.st_mode, file.st_size, file.st_ino, file.st_mtime_ns) for file in of_files))


def discard(folder: Path) -> None:
    """Removes a folder of ours, read-only or not."""
    folder.chmod(0o700)
    shutil.rmtree(folder)
