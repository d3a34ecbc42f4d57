"""Rows are checked one by one, digested by content, and held-out rows may not be trained on."""

from pathlib import Path

import pytest

from pipeline.dataset import check_files, load_dataset, read_examples, write_swift_rows
from pipeline.errors import InvalidInput
from pipeline.project import Project
from pipeline.recipe import DatasetFiles
from tests.conftest import row, write_image, write_rows


def faults(path: Path) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        read_examples(path)
    return [(fault.path, fault.message) for fault in caught.value.faults]


def files(project: Project, train: list[object], held_out: list[object]) -> DatasetFiles:
    write_rows(project.root / "t.jsonl", train)
    write_rows(project.root / "e.jsonl", held_out)
    return DatasetFiles(train=Path("t.jsonl"), eval=Path("e.jsonl"))


def test_every_bad_row_is_named_with_its_reason(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    two_tags = row(question="<image>?")
    typo = row()
    typo["messages"][0]["role"] = "usr"  # type: ignore[index]
    rows = [row(), row(image="none.png"), two_tags, typo, "{", [], row(colour="red"), row(answer="")]
    found = faults(write_rows(tmp_path / "d.jsonl", rows))
    assert [where for where, _ in found] == [
        "row 2.images.0",
        "row 3.images",
        "row 4.messages.0.role",
        "row 5",
        "row 6",
        "row 7.colour",
        "row 8.messages.1.content",
    ]
    assert "none.png does not exist" in found[0][1] and "1 images for 2" in found[1][1] and "'usr'" in found[2][1]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    assert faults(path)[0][0] == "row 1"


def test_no_rows_is_a_fault(tmp_path: Path) -> None:
    assert faults(write_rows(tmp_path / "d.jsonl", [])) == [("", "holds no rows")]


def test_many_faults_are_counted_not_all_shown(tmp_path: Path) -> None:
    assert faults(write_rows(tmp_path / "d.jsonl", ["{"] * 80))[-1][1] == "and 30 more faults"


def test_the_digest_is_of_content_not_of_names(project: Project) -> None:
    write_image(project.root / "a.png")
    write_image(project.root / "b.png")
    write_image(project.root / "c.png", (0, 0, 0))
    held_out = [row("x", None, "hello")]
    first = load_dataset(files(project, [row()], held_out), project).digest
    assert load_dataset(files(project, [row(image="b.png")], held_out), project).digest == first
    assert load_dataset(files(project, [row(image="c.png")], held_out), project).digest != first
    assert load_dataset(files(project, [row("other")], held_out), project).digest != first


def test_a_held_out_row_that_is_trained_on_is_refused_by_content(project: Project) -> None:
    write_image(project.root / "a.png")
    write_image(project.root / "copy.png")
    with pytest.raises(InvalidInput, match="row 2.*also row 1"):
        load_dataset(files(project, [row()], [row("x", None, "hello"), row(image="copy.png")]), project)


def test_check_names_a_missing_file_by_its_key(project: Project) -> None:
    write_rows(project.root / "e.jsonl", [row("x", None)])
    found = check_files(DatasetFiles(train=Path("t.jsonl"), eval=Path("e.jsonl")), Path("r.yaml"), project)
    assert [(fault.file, fault.path) for fault in found] == [("r.yaml", "dataset.train")]


def test_swift_rows_hold_absolute_paths_and_nothing_of_ours(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    examples = read_examples(write_rows(tmp_path / "d.jsonl", [row(kind="name", slice="seen")]))
    write_swift_rows(examples, tmp_path / "out.jsonl")
    (written,) = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert str(tmp_path / "a.png") in written and "slice" not in written and "kind" not in written
