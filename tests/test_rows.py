"""Every format gives the same rows; what cannot be read is one row's fault where it can be."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import load_dataset, read_examples
from pipeline.errors import InvalidInput
from pipeline.project import Project
from pipeline.recipe import DatasetFiles
from pipeline.rows import read_rows
from tests.conftest import row, write_image, write_rows

ROWS: list[dict[str, Any]] = [
    row("001", "a.png", 'A number, quoted: "x"?', kind="name", slice="seen"),
    row("NA", None, "Two\nlines; Ω and 猫?", kind="", slice=""),
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>and <image>?"},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "yes"},
        ],
        "images": ["a.png", "b.png"],
        "kind": "pair",
        "slice": "",
    },
]


def as_jsonl(folder: Path) -> Path:
    return write_rows(folder / "d.jsonl", list(ROWS))


def as_jsonl_with_bom(folder: Path) -> Path:
    path = as_jsonl(folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def as_json(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps(ROWS, indent=1), "utf-8")
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "d.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["messages", "images", "kind", "slice", "rejected_response"])
        writer.writeheader()
        for content in ROWS:
            writer.writerow({**content, "messages": json.dumps(content["messages"]), "images": json.dumps(content["images"])})
    return path


def _table() -> Any:
    import datasets

    return datasets.Dataset.from_list(ROWS)


def as_parquet(folder: Path) -> Path:
    path = folder / "d [1].parquet"  # a name that is no glob pattern
    _table().to_parquet(str(path))
    return path


def as_parquet_shards(folder: Path) -> Path:
    (folder / "data").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "data" / name).write_bytes((folder / name).read_bytes())
    for index in range(2):
        _table().shard(2, index, contiguous=True).to_parquet(str(folder / "data" / f"train-{index:05d}-of-00002.parquet"))
    return folder / "data"


def as_jsonl_shards(folder: Path) -> Path:
    for name in ("a.png", "b.png"):
        write_image(folder / "shards" / name, (1, 2, 3) if name == "b.png" else (200, 10, 10))
    write_rows(folder / "shards" / "1.jsonl", list(ROWS[:1]))
    write_rows(folder / "shards" / "2.jsonl", list(ROWS[1:]))
    return folder / "shards"


def as_saved_folder(folder: Path) -> Path:
    _table().save_to_disk(str(folder / "saved"))
    for name in ("a.png", "b.png"):
        (folder / "saved" / name).write_bytes((folder / name).read_bytes())
    return folder / "saved"


def as_saved_folder_with_pictures(folder: Path) -> Path:
    import datasets

    inside = [{**content, "images": [str(folder / image) for image in content["images"]]} for content in ROWS]
    table = datasets.Dataset.from_list(inside).cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(str(folder / "pictures"))
    return folder / "pictures"


def as_parquet_with_pictures(folder: Path) -> Path:
    import datasets

    path = folder / "pictures.parquet"
    inside = [{**content, "images": [{"bytes": (folder / image).read_bytes(), "path": "elsewhere.png"} for image in content["images"]]} for content in ROWS]
    datasets.Dataset.from_list(inside).to_parquet(str(path))
    return path


FORMATS = [
    as_jsonl_with_bom, as_json, as_csv, as_parquet, as_parquet_shards, as_jsonl_shards, as_saved_folder, as_saved_folder_with_pictures, as_parquet_with_pictures,
]  # fmt: skip


@pytest.fixture
def rows_project(project: Project) -> Project:
    write_image(project.root / "a.png")
    write_image(project.root / "b.png", (1, 2, 3))
    write_rows(project.root / "e.jsonl", [row("x", None, "held out")])
    return project


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_rows_and_digest(write: Callable[[Path], Path], rows_project: Project) -> None:
    plain, other = as_jsonl(rows_project.root), write(rows_project.root)
    wanted, got = (read_examples(path, rows_project) for path in (plain, other))
    assert [(e.messages, e.kind, e.slice, e.row) for e in got] == [(e.messages, e.kind, e.slice, e.row) for e in wanted]
    assert [[image.read_bytes() for image in e.images] for e in got] == [[image.read_bytes() for image in e.images] for e in wanted]
    one, two = (load_dataset(DatasetFiles(train=path, eval=Path("e.jsonl")), rows_project).digest for path in (plain, other))
    assert one == two


def test_pictures_inside_a_table_become_files_named_by_content(rows_project: Project) -> None:
    for _ in range(2):
        examples = read_examples(as_parquet_with_pictures(rows_project.root), rows_project)
    assert {image.parent for example in examples for image in example.images} == {rows_project.images}
    assert len(list(rows_project.images.iterdir())) == 2


def test_flat_columns_of_a_csv(rows_project: Project) -> None:
    path = rows_project.root / "flat.csv"
    path.write_text("question,answer,image,system,kind\nWhat?,001,a.png,,k\nBoth?,no,a.png; b.png,Be brief.,\nHi,there,,,\n", "utf-8")
    first, second, third = read_examples(path, rows_project)
    assert (first.messages[0]["content"], first.answer, first.kind) == ("<image>What?", "001", "k")
    assert second.images == (rows_project.root / "a.png", rows_project.root / "b.png")
    assert [m["content"] for m in second.messages] == ["Be brief.", "<image><image>Both?", "no"]
    assert third.images == () and [m["role"] for m in third.messages] == ["user", "assistant"]


def test_a_bad_line_is_that_rows_fault_alone(rows_project: Project) -> None:
    jsonl, table = rows_project.root / "bad.jsonl", rows_project.root / "bad.csv"
    good = json.dumps(row(image=None)).encode()
    jsonl.write_bytes(b"\n".join([good, b'"\xff"', good, b"{", b"", b"[" * 100_000, good]))
    table.write_bytes("question,answer\nä,b\n".encode() + b"\xe4,b\nc\nd,e\n")
    assert [(r.number, bool(r.fault)) for r in read_rows(jsonl, rows_project)] == [(1, False), (2, True), (3, False), (4, True), (6, True), (7, False)]
    assert [(r.number, r.fault[:9]) for r in read_rows(table, rows_project)] == [(1, ""), (2, "is not UT"), (3, "has 1 cel"), (4, "")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.txt", b"x", "is not one of"),
        ("d.json", b"{}", "not a list"),
        ("d.json", b"[\xff]", "not JSON in UTF-8"),
        ("d.csv", b"", "no header"),
        ("d.csv", b"a,a\n", "no header"),
        ("d.csv", b'question,answer\n"a,b\n', "not CSV"),
        ("d.parquet", b"PAR1", "not Parquet"),
        ("folder/d.txt", b"x", "holds no rows"),
        ("folder/state.json", b"{}", "save_to_disk"),
        ("folder/dataset_dict.json", b"{}", "holds the splits"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_whole(rows_project: Project, name: str, content: bytes, said: str) -> None:
    path = rows_project.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=said) as caught:
        list(read_rows(rows_project.root / Path(name).parts[0], rows_project))
    assert [fault.path for fault in caught.value.faults] == [""]


def write_empty_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS).schema.empty_table(), path)


def test_a_shard_without_rows_does_not_spoil_its_folder(rows_project: Project) -> None:
    shards = as_parquet_shards(rows_project.root)
    write_empty_parquet(shards / "train-00000-of-00000.parquet")
    assert [example.row for example in read_examples(shards, rows_project)] == [1, 2, 3]


def test_a_table_without_rows_holds_no_rows(rows_project: Project) -> None:
    import datasets

    write_empty_parquet(rows_project.root / "empty.parquet")
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(str(rows_project.root / "empty"))
    for name in ("empty.parquet", "empty"):
        with pytest.raises(InvalidInput) as caught:
            read_examples(rows_project.root / name, rows_project)
        assert [fault.message for fault in caught.value.faults] == ["holds no rows"]


@pytest.mark.parametrize("name", ["saved", "d.parquet"])
def test_text_in_a_table_that_is_not_utf8_is_refused(rows_project: Project, name: str) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"question": pyarrow.array([b"caf\xe9"]).view(pyarrow.string()), "answer": ["x"]})
    if name == "saved":
        datasets.Dataset(table).save_to_disk(str(rows_project.root / name))
    else:
        parquet.write_table(table, rows_project.root / name)
    with pytest.raises(InvalidInput, match="utf-8") as caught:
        list(read_rows(rows_project.root / name, rows_project))
    assert [fault.path for fault in caught.value.faults] == [""]


def test_a_folder_of_two_splits_or_formats_is_refused(rows_project: Project) -> None:
    write_rows(rows_project.root / "two" / "train.jsonl", list(ROWS))
    write_rows(rows_project.root / "two" / "test.jsonl", list(ROWS))
    with pytest.raises(InvalidInput, match=r"several splits \(test, train\)"):
        list(read_rows(rows_project.root / "two", rows_project))
    (rows_project.root / "two" / "x.csv").write_text("a\n", "utf-8")
    with pytest.raises(InvalidInput, match="several formats"):
        list(read_rows(rows_project.root / "two", rows_project))
