"""Samples on disk: what is kept, for how long, how much, who may read it; and the redaction hook."""

import json
import stat
import sys
import types
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.sample import Message, Sample, read_samples
from pipeline.serving import sample_writer
from pipeline.serving.sample_writer import SampleFolder, load_hook, write
from tests.serving.test_exchange import asked, picture, whole

PNG = b"\x89PNG"
TODAY = date(2026, 11, 27)


class Days:
    def __init__(self) -> None:
        self.today = TODAY

    def __call__(self) -> date:
        return self.today


def image(number: int, size: int = 100) -> dict[str, bytes]:
    return {f"{number:064x}.png": PNG + bytes(size - 4)}


def sample(number: int, pictures: dict[str, bytes]) -> Sample:
    turns = (Message(role="user", content="<image>" * len(pictures) + "What is it?"),)
    return Sample(id=f"{number:016x}", at="", name="catalog", answered_by="catalog/1@ab", messages=turns, images=tuple(pictures), answer="A", finish="stop")


def add(folder: SampleFolder, number: int, *, shows: int | None = None, size: int = 100) -> bool:
    pictures = image(number if shows is None else shows, size)
    return folder.write(sample(number, pictures), pictures)


def kept(folder: SampleFolder) -> list[int]:
    return sorted(int(found.id, 16) for found, _ in read_samples(folder.folder.parent))


def pictures(folder: SampleFolder) -> list[int]:
    return sorted(int(file.stem, 16) for file in folder.images.iterdir())


@pytest.fixture
def days() -> Days:
    return Days()


def made(tmp_path: Path, days: Callable[[], date], keep_days: int = 3, max_bytes: int = 10**6) -> SampleFolder:
    return SampleFolder(tmp_path / "samples" / "server", keep_days, max_bytes, days)


def test_samples_are_their_owners_alone_and_a_picture_lies_there_once(tmp_path: Path, days: Days) -> None:
    (made(tmp_path, days).images / f".{1:064x}.png").write_bytes(b"a draft of a writer that was killed")
    folder = made(tmp_path, days)
    assert add(folder, 1) and add(folder, 2, shows=1)
    assert kept(folder) == [1, 2] and pictures(folder) == [1]
    (found,) = [each for each, _ in read_samples(folder.folder.parent) if each.id.endswith("2")]
    assert found == sample(2, image(1))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder.folder, *folder.folder.rglob("*"))}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()) and len(modes) == 4


def test_samples_go_after_their_days_with_the_pictures_that_nothing_else_shows(tmp_path: Path, days: Days) -> None:
    folder = made(tmp_path, days)
    add(folder, 1)
    add(folder, 2)
    days.today += timedelta(days=2)
    add(folder, 3, shows=1)
    folder.expire()
    assert kept(folder) == [1, 2, 3]
    days.today += timedelta(days=1)
    folder.expire()
    assert kept(folder) == [3] and pictures(folder) == [1]
    days.today += timedelta(days=30)
    again = made(tmp_path, days)  # a server that was down meanwhile
    assert kept(again) == [] and pictures(again) == []


def test_the_oldest_days_make_room_and_today_does_not(tmp_path: Path, days: Days) -> None:
    line = len(sample(1, image(1)).model_dump_json()) + 1
    folder = made(tmp_path, days, max_bytes=3 * (line + 100))
    add(folder, 1)
    days.today += timedelta(days=1)
    assert add(folder, 2) and add(folder, 3) and add(folder, 4)
    assert kept(folder) == [2, 3, 4] and pictures(folder) == [2, 3, 4]
    assert not add(folder, 5) and not add(folder, 6, size=10**6) and kept(folder) == [2, 3, 4]
    assert not add(made(tmp_path, days, max_bytes=3 * (line + 100)), 5), "what a server finds at its start counts"
    size = sum(file.stat().st_size for file in folder.folder.rglob("*") if file.is_file())
    assert size <= 3 * (line + 100)


def test_half_a_line_is_passed_over(tmp_path: Path, days: Days) -> None:
    folder = made(tmp_path, days)
    (folder.folder / f"{TODAY.isoformat()}.jsonl").write_text('{"id": "00\n{}\n\n')
    add(folder, 1)
    assert kept(folder) == [1]


def exchange(folder: SampleFolder, hook: Any = None, body: bytes | None = None, keep_images: bool = True) -> str:
    url = "data:image/png;base64,iVBORw=="
    parts = [asked(picture(url)) if body is None else body, whole()]
    header = json.dumps({"name": "catalog", "at": datetime.now(UTC).timestamp(), "body": len(parts[0]), "answer": len(parts[1])}).encode()
    left = iter(parts)
    return write(header, lambda size: next(left)[:size], folder, hook, keep_images)


def test_pictures_are_kept_only_if_the_recipe_says_so(tmp_path: Path, days: Days) -> None:
    folder = made(tmp_path, days)
    assert exchange(folder, keep_images=False) == "kept" and pictures(folder) == []
    assert [len(found.images) for found, _ in read_samples(tmp_path / "samples")] == [1]
    assert exchange(folder) == "kept" and len(pictures(folder)) == 1
    assert exchange(folder, body=b"{}") == "unusable"


def test_what_the_hook_makes_of_a_sample_is_what_is_written(tmp_path: Path, days: Days) -> None:
    folder = made(tmp_path, days)

    def masks(given: dict[str, Any]) -> dict[str, Any]:
        given["messages"][0]["content"] = given["messages"][0]["content"].replace("it", "***")
        return given | {"answer": "*", "answered_by": "another", "extra": 1}

    assert exchange(folder, masks) == "kept"
    (found, _), *_ = read_samples(tmp_path / "samples")
    assert (found.question, found.answer, found.answered_by) == ("<image>What is ***?", "*", "catalog/3@c969cdde")
    assert exchange(folder, lambda given: None) == "redacted"
    assert exchange(folder, lambda given: given | {"images": []}) == "kept"  # refused later, as a row


@pytest.mark.parametrize("returned", [1, [], {"messages": "no"}, {"messages": []}, {"images": ["../../etc/passwd"]}, {"answer": None}])
def test_a_hook_that_returns_no_sample_has_it_left_out(tmp_path: Path, days: Days, returned: object, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, days)
    assert exchange(folder, lambda given: returned) == ("kept" if returned == [] else "failed")
    if returned != []:
        assert kept(folder) == [] and "sample not written" in capsys.readouterr().err


def test_a_hook_that_fails_quotes_nothing(tmp_path: Path, days: Days, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(given: dict[str, Any]) -> None:
        raise RuntimeError(given["messages"][0]["content"])

    folder = made(tmp_path, days)
    assert exchange(folder, fails) == "failed" and kept(folder) == []
    said = capsys.readouterr().err
    assert "RuntimeError at" in said and "What" not in said


def test_a_full_disk_is_told(tmp_path: Path, days: Days, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = made(tmp_path, days)
    monkeypatch.setattr(sample_writer, "_append", full)
    assert exchange(folder) == "failed" and "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "says"), [("nowhere.redact", "No module named"), ("json.nothing", "nothing"), ("json.__doc__", "is no function"), ("loud.f", "boom")]
)
def test_a_hook_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, says: str) -> None:
    (tmp_path / "loud.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=says):
        load_hook(path)
    module = types.ModuleType("shop_privacy")
    module.redact = lambda given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_privacy", module)
    assert load_hook("shop_privacy.redact") is module.redact
