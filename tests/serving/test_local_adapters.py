import asyncio
import stat
from pathlib import Path

import pytest

from pipeline.adapter import ADAPTER_FILES
from pipeline.errors import VersionRefused
from pipeline.serving.local_adapters import LocalAdapters


def filler(source: Path):
    calls = []

    async def fill(folder: Path) -> None:
        calls.append(folder)
        await asyncio.sleep(0)
        for name in ADAPTER_FILES:
            (folder / name).write_bytes((source / name).read_bytes())

    return fill, calls


def test_folder_is_named_by_digest_and_read_only(tmp_path, write_adapter):
    digest = write_adapter(tmp_path / "a", 1)
    folder = asyncio.run(LocalAdapters(tmp_path / "root").obtain(digest, filler(tmp_path / "a")[0]))
    assert folder == tmp_path / "root" / digest
    assert stat.S_IMODE(folder.stat().st_mode) == 0o555
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(ADAPTER_FILES, 0o444)
    assert [path.name for path in (tmp_path / "root").iterdir()] == [digest]


def test_callers_at_the_same_time_share_one_download(tmp_path, write_adapter):
    digest = write_adapter(tmp_path / "a", 1)
    fill, calls = filler(tmp_path / "a")

    async def both():
        adapters = LocalAdapters(tmp_path / "root")
        return await asyncio.gather(adapters.obtain(digest, fill), adapters.obtain(digest, fill))

    first, second = asyncio.run(both())
    assert first == second and len(calls) == 1


def test_other_content_than_the_tag_says_is_refused_without_trace(tmp_path, write_adapter):
    write_adapter(tmp_path / "a", 1)
    with pytest.raises(VersionRefused, match="its tag says 0000"):
        asyncio.run(LocalAdapters(tmp_path / "root").obtain("0" * 64, filler(tmp_path / "a")[0]))
    assert list((tmp_path / "root").iterdir()) == []


def test_failed_or_cancelled_download_leaves_no_trace(tmp_path):
    async def hangs(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("half")
        await asyncio.sleep(60)

    async def cancel():
        task = asyncio.create_task(LocalAdapters(tmp_path / "root").obtain("0" * 64, hangs))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert list((tmp_path / "root").iterdir()) == []


def test_restart_verifies_a_folder_and_replaces_a_damaged_one(tmp_path, write_adapter):
    digest = write_adapter(tmp_path / "a", 1)
    folder = asyncio.run(LocalAdapters(tmp_path / "root").obtain(digest, filler(tmp_path / "a")[0]))
    assert asyncio.run(LocalAdapters(tmp_path / "root").get(digest)) == folder
    weights = folder / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    restarted = LocalAdapters(tmp_path / "root")
    assert asyncio.run(restarted.get(digest)) is None
    fill, calls = filler(tmp_path / "a")
    assert asyncio.run(restarted.obtain(digest, fill)) == folder and len(calls) == 1


def test_start_sweeps_what_a_killed_process_left(tmp_path):
    left = tmp_path / "root" / ".unfinished-ab12cd34-x"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("half")
    LocalAdapters(tmp_path / "root")
    assert not left.exists()
