"""What was measured is on the disk at once, and results are made from that alone."""

import json
from pathlib import Path

import pytest

from pipeline.bench.record import LINES, Record, new_folder, read_record
from pipeline.errors import InvalidInput


def test_lines_are_read_as_written_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path / "new/folder", {"kind": "serve", "n": 1})
    record.add({"arm": "base"})
    with (record.folder / LINES).open("a") as file:
        file.write('{"arm": "o')
    assert read_record(record.folder) == ({"kind": "serve", "n": 1}, [{"arm": "base"}])


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Record(tmp_path / "empty", {"kind": "swap"})
    for taken in (tmp_path / "empty", tmp_path / "empty" / LINES):
        with pytest.raises(InvalidInput, match="--out: .*name another folder"):
            Record(taken, {"kind": "swap"})


def test_default_folders_of_the_same_second_differ(tmp_path: Path) -> None:
    made = []
    for _ in range(3):
        made.append(new_folder(tmp_path, "serve"))
        made[-1].mkdir(parents=True)
    assert len(set(made)) == 3 and all(folder.parent == tmp_path and folder.name.startswith("serve-") for folder in made)


@pytest.mark.parametrize("text", [None, "", "x\n", json.dumps({"kind": "other"}) + "\n", "[]\n"])
def test_what_is_no_record_says_which_folder_to_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / LINES).write_text(text)
    with pytest.raises(InvalidInput, match="tuneserve bench has written"):
        read_record(tmp_path)
