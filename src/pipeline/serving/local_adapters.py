"""Adapters on this replica's disk: one read-only folder per digest, complete and checked from the moment it has its name."""

import asyncio
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from pipeline.adapter import ADAPTER_FILES, adapter_digest, read_adapter
from pipeline.errors import AdapterInvalid

Fill = Callable[[Path], Awaitable[None]]
"""Puts an adapter's files into the given empty folder."""
UNFINISHED = ".unfinished-"


class LocalAdapters:
    """The folders `<root>/<digest>/`. One process at a time owns `root`: it sweeps away what a killed one left half done.

    A folder is never changed nor removed once `get` or `obtain` has handed it out: vLLM reads it again whenever it likes, and dies if it cannot.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        root.mkdir(parents=True, exist_ok=True)
        for unfinished in root.glob(f"{UNFINISHED}*"):
            discard(unfinished)

    def holds(self, digest: str) -> bool:
        """Whether a folder of this digest was verified by this process."""
        return digest in self._verified

    async def get(self, digest: str) -> Path | None:
        """The folder of `digest` if it is here and its content has that digest; a damaged one is removed. Read fully once per process."""
        async with self._locks[digest]:
            return await self._get(digest)

    async def obtain(self, digest: str, fill: Fill) -> Path:
        """The folder of `digest`, filled by `fill` unless it is here; callers at the same time share one filling.

        Raises AdapterInvalid if what was filled in is damaged or has another digest; whatever `fill` raises goes through. Neither leaves a trace.
        """
        async with self._locks[digest]:
            if folder := await self._get(digest):
                return folder
            unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{digest[:8]}-", dir=self.root))
            try:
                await fill(unfinished)
                await asyncio.to_thread(check, unfinished, digest)
                for name in ADAPTER_FILES:
                    (unfinished / name).chmod(0o444)
                folder = self.root / digest
                unfinished.rename(folder)
            except BaseException:  # also a cancelled download
                discard(unfinished)
                raise
            folder.chmod(0o555)  # after the rename: moving a directory needs write permission on it
            self._verified.add(digest)
            return folder

    async def _get(self, digest: str) -> Path | None:
        folder = self.root / digest
        if digest in self._verified:
            return folder
        if not folder.exists():
            return None
        try:
            await asyncio.to_thread(check, folder, digest)
        except AdapterInvalid:
            discard(folder)
            return None
        self._verified.add(digest)
        return folder


def check(folder: Path, digest: str) -> None:
    """Raises AdapterInvalid unless `folder` holds a readable adapter of this digest."""
    found = adapter_digest(folder)
    if found != digest:
        raise AdapterInvalid(
            f"its files have digest {found[:16]}, its tag says {digest[:16]}; they were changed after registration: register the adapter again"
        )
    try:
        read_adapter(folder)
    except AdapterInvalid as error:
        # The folder's passing name says nothing to a reader and would make the same fault look new at every attempt.
        raise AdapterInvalid(str(error).replace(f"{folder}/", "")) from error


def discard(folder: Path) -> None:
    """Removes a folder of ours, read-only or not."""
    folder.chmod(0o700)
    shutil.rmtree(folder)
