"""Rows of both splits: all faults at once, digested by content, held-out rows never trained on, bad rows left out only where the recipe says so."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pyarrow import parquet

from pipeline.dataset import Check, Deep, check_dataset, load_dataset, read_examples, write_swift_rows
from pipeline.errors import InvalidInput
from pipeline.project import Project
from pipeline.recipe import DatasetFiles
from tests.conftest import ROOT, row, write_counting_base, write_image, write_rows


def files(project: Project, train: list[object], held_out: list[object], max_bad_rows: int = 0) -> DatasetFiles:
    write_rows(project.root / "t.jsonl", train)
    write_rows(project.root / "e.jsonl", held_out)
    return DatasetFiles(train=Path("t.jsonl"), eval=Path("e.jsonl"), max_bad_rows=max_bad_rows)


def deep_check(project: Project, given: DatasetFiles, max_length_tokens: int = 1000) -> Check:
    return check_dataset(given, project, Deep(write_counting_base(project.root / "base"), max_length_tokens))


def picture(path: Path, seed: int) -> Path:
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (7, 7), random.Random(seed).randbytes(147)).resize((70, 70), Image.Resampling.BICUBIC).save(path)
    return path


def places(faults: Any) -> list[tuple[str, str]]:
    return [(fault.file, fault.path) for fault in faults]


def six_faults(project: Project) -> DatasetFiles:
    """A missing image, a truncated PNG, an image tag too many, a role typo, a line that is not UTF-8, and a held-out row that is trained on."""
    for seed, name in enumerate(("a", "b", "c", "copy", "cut")):
        picture(project.root / "images" / f"{name}.png", 0 if name == "copy" else seed)
    cut = project.root / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    typo = row(image="images/b.png")
    typo["messages"][0]["role"] = "usr"  # type: ignore[index]
    train = [row(image="images/a.png"), row(image="images/none.png"), row(image="images/cut.png"), row(image="images/b.png", question="<image>?"), typo]
    given = files(project, train, [row("x", "images/c.png"), row(image="images/copy.png")])
    with (project.root / "t.jsonl").open("ab") as file:
        file.write(json.dumps(row("caf\u00e9", None), ensure_ascii=False).encode("latin-1") + b"\n")
    return given


SIX = [
    ("t.jsonl", "row 2.images.0", "none.png does not exist"),
    ("t.jsonl", "row 3.images.0", "images/cut.png does not decode"),
    ("t.jsonl", "row 4.images", "1 images for 2 <image> tags"),
    ("t.jsonl", "row 5.messages.0.role", "'usr' is not one of"),
    ("t.jsonl", "row 6", "is not UTF-8"),
    ("e.jsonl", "row 2", "is also row 1 of t.jsonl"),
]


def test_six_faults_are_six_errors_at_once(project: Project) -> None:
    found = deep_check(project, six_faults(project))
    assert [(fault.file, fault.path) for fault in found.faults] == [(file, path) for file, path, _ in SIX]
    assert all(said in fault.message for fault, (_, _, said) in zip(found.faults, SIX, strict=True))
    assert found.warnings == ()


def test_without_the_deep_look_five_of_the_six_are_found(project: Project) -> None:
    found = check_dataset(six_faults(project), project)
    assert places(found.faults) == [(file, path) for file, path, _ in SIX if path != "row 3.images.0"]
    assert found.statistics == {}


def test_bad_rows_may_be_left_out_but_overlap_never(project: Project) -> None:
    given = six_faults(project).model_copy(update={"max_bad_rows": 5})
    found = deep_check(project, given)
    assert places(found.faults) == [("e.jsonl", "row 2")]
    assert places(found.warnings) == [(file, path) for file, path, _ in SIX[:5]] and all(each.message.startswith("left out: ") for each in found.warnings)
    write_rows(project.root / "e.jsonl", [row("x", "images/c.png")])
    rows = load_dataset(given, project, Deep(project.root / "base", 1000))
    assert ([example.row for example in rows.train], rows.dropped, dict(rows.statistics)["train"].dropped) == ([1], (5, 0), 5)
    alone = load_dataset(files(project, [row(image="images/a.png")], [row("x", "images/c.png")]), project)
    assert rows.digest == alone.digest, "of the rows that are trained on"


def test_more_bad_rows_than_allowed_fail(project: Project) -> None:
    found = deep_check(project, six_faults(project).model_copy(update={"max_bad_rows": 4}))
    assert len(found.faults) == 7 and "5 bad rows, more than dataset.max_bad_rows 4" in found.faults[0].message


def test_a_file_whose_rows_are_all_left_out_is_a_fault(project: Project) -> None:
    found = check_dataset(files(project, ["{"], [row("x", None)], max_bad_rows=3), project)
    assert places(found.faults) == [("t.jsonl", "")]


def test_no_rows_is_a_fault(project: Project) -> None:
    with pytest.raises(InvalidInput, match="holds no rows"):
        read_examples(write_rows(project.root / "d.jsonl", []), project)


def test_many_faults_are_counted_not_all_shown(project: Project) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_examples(write_rows(project.root / "d.jsonl", ["{"] * 80), project)
    assert len(caught.value.faults) == 51 and caught.value.faults[-1].message == "and 30 more faults"


def test_the_digest_is_of_content_not_of_names(project: Project) -> None:
    write_image(project.root / "a.png")
    write_image(project.root / "b.png")
    write_image(project.root / "c.png", (0, 0, 0))
    held_out: list[object] = [row("x", None, "hello")]

    def digest(*train: object) -> str:
        return load_dataset(files(project, list(train), held_out), project).digest

    first = digest(row())
    assert digest(row(image="b.png")) == first
    others = [digest(row(image="c.png")), digest(row("other")), digest(row(rejected_response="no")), digest(row(rejected_response="never"))]
    assert len({first, *others}) == 5


def test_a_held_out_row_that_is_trained_on_is_refused_by_content(project: Project) -> None:
    write_image(project.root / "a.png")
    write_image(project.root / "copy.png")
    with pytest.raises(InvalidInput, match="row 2.*also row 1"):
        load_dataset(files(project, [row()], [row("x", None, "hello"), row(image="copy.png", kind="k")]), project)


def test_one_file_for_both_splits_is_one_fault(project: Project) -> None:
    write_rows(project.root / "t.jsonl", [row("x", None), row("y", None)])
    (project.root / "link.jsonl").symlink_to("t.jsonl")
    found = check_dataset(DatasetFiles(train=Path("t.jsonl"), eval=Path("link.jsonl")), project)
    assert places(found.faults) == [("link.jsonl", "")]


def test_rows_that_stand_twice_are_warned_of(project: Project) -> None:
    found = check_dataset(files(project, [row("x", None), row("y", None), row("x", None)], [row("z", None)]), project)
    assert found.faults == () and places(found.warnings) == [("t.jsonl", "row 3")] and "also row 1" in found.warnings[0].message


def test_answers_with_thoughts_are_warned_of_once(project: Project) -> None:
    train: list[object] = [row("<think></think>\nx", None), row("<think>hm</think>\ny", None), row("<think>so</think>z", None)]
    found = check_dataset(files(project, train, [row("z", None)]), project)
    assert found.faults == () and places(found.warnings) == [("t.jsonl", "")] and "2 answers begin with a thought (first: row 2)" in found.warnings[0].message


def test_a_missing_file_is_named_by_its_key(project: Project) -> None:
    write_rows(project.root / "e.jsonl", [row("x", None)])
    found = check_dataset(DatasetFiles(train=Path("t.jsonl"), eval=Path("e.jsonl")), project, recipe=Path("r.yaml"))
    assert places(found.faults) == [("r.yaml", "dataset.train")]


def test_rows_too_long_and_the_bases_own_tokens_are_faults(project: Project) -> None:
    write_image(project.root / "a.png")
    given = files(project, [row("x" * 100), row(), row("<|own|>", None)], [row("y", None)])
    found = deep_check(project, given, max_length_tokens=80)
    assert places(found.faults) == [("t.jsonl", "row 1"), ("t.jsonl", "row 3")]
    assert "tokens long, 4 of them images; training.max_length_tokens is 80" in found.faults[0].message and "'<|own|>'" in found.faults[1].message


def test_statistics_count_tokens_of_rows_images_and_answers(project: Project) -> None:
    write_image(project.root / "a.png")
    rows = load_dataset(files(project, [row("abc"), row("abcdefg")], [row("z", None)]), project, Deep(write_counting_base(project.root / "base"), 1000))
    train = dict(rows.statistics)["train"]
    assert (train.rows, train.images, train.image_tokens.total, train.answer_tokens.max, train.answer_tokens.mean) == (2, 1, 8, 8, 6.0)
    # [gMASK]<sop><|user|> \n image-begin (4) image-end question <|assistant|> \n <think></think> \n answer <|user|>
    assert train.tokens.max == 3 + 1 + 6 + len("What product is this?") + 2 + 3 + len("abcdefg") + 1
    metrics = rows.metrics()
    assert metrics["dataset.train.rows"] == 2 and metrics["dataset.eval.image_tokens_mean"] == 0 and metrics["dataset.train.answer_tokens_p95"] == 8


def test_a_held_out_picture_that_is_trained_on_is_warned_of(project: Project) -> None:
    picture(project.root / "a.png", 1)
    Image.open(project.root / "a.png").save(project.root / "again.jpg", quality=75)
    picture(project.root / "b.png", 2)
    (project.root / "b2.png").write_bytes((project.root / "b.png").read_bytes())
    picture(project.root / "new.png", 3)
    train = [row("x", "a.png"), row("y", "b.png")]
    found = deep_check(project, files(project, train, [row("x", "new.png"), row("x", "again.jpg"), row("z", "b2.png"), row("z2", "b2.png")]))
    assert found.faults == ()
    assert places(found.warnings) == [("e.jsonl", ""), ("e.jsonl", "row 2")]
    assert "1 of 3 images are also in t.jsonl" in found.warnings[0].message and "row 3 and row 2" in found.warnings[0].message
    assert "row 1 of t.jsonl" in found.warnings[1].message


def test_pictures_that_serving_shows_otherwise_are_warned_of(project: Project) -> None:
    clear = Image.new("RGBA", (56, 56), (10, 20, 30, 128))
    clear.save(project.root / "clear.png")
    turned = Image.new("RGB", (56, 56), (90, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(project.root / "turned.jpg", exif=exif)
    found = deep_check(project, files(project, [row("x", "clear.png"), row("y", "turned.jpg")], [row("z", None)]))
    assert found.faults == () and places(found.warnings) == [("t.jsonl", "row 1"), ("t.jsonl", "row 2")]


def test_the_catalog_has_neither_faults_nor_warnings(project: Project) -> None:
    catalog = ROOT / "data" / "catalog"
    found = deep_check(project, DatasetFiles(train=catalog / "train.jsonl", eval=catalog / "eval.jsonl"))
    assert (found.faults, found.warnings) == ((), ())
    assert (len(found.train), len(found.eval), found.statistics["train"].images) == (1288, 400, 306)


def test_rows_to_train_on_all_have_a_rejected_answer_or_none_has(project: Project) -> None:
    mixed: list[object] = [row("x", None), row("y", None, rejected_response="no")]
    found = check_dataset(files(project, mixed, [row("z", None)]), project)
    assert places(found.faults) == [("t.jsonl", "")] and "1 of 2 rows have a rejected_response" in found.faults[0].message
    held_out: list[object] = [row("v", None), row("w", None, rejected_response="no")]
    assert check_dataset(files(project, [row("z", None)], held_out), project).faults == (), "nothing is trained on these"
    assert len(read_examples(project.root / "e.jsonl", project)) == 2


@pytest.mark.parametrize(("trained", "judged"), [("1", "1 "), ("caf\u00e9", "cafe\u0301"), ("x", "\n x"), ("\u212b", "\u00c5")])
def test_text_that_reads_the_same_is_the_same_row(project: Project, trained: str, judged: str) -> None:
    write_image(project.root / "a.png")
    found = check_dataset(files(project, [row(trained), row(judged)], [row(judged), row("other", question="What product is this? ")]), project)
    assert places(found.faults) == [("e.jsonl", "row 1")] and places(found.warnings) == [("t.jsonl", "row 2")]
    asked = check_dataset(files(project, [row(trained, question="a\u0301?")], [row(judged, question="\u00e1? ")]), project)
    assert places(asked.faults) == [("e.jsonl", "row 1")]
    one, two = (load_dataset(files(project, [row(text)], [row("z", None)]), project).digest for text in (trained, judged))
    assert one != two, "the digest is of what is trained on"


def test_text_that_differs_within_is_another_row(project: Project) -> None:
    assert check_dataset(files(project, [row("a b", None), row("\ufb01", None)], [row("a  b", None), row("fi", None)]), project).faults == ()


@pytest.mark.parametrize("name", ["n" * 300 + ".jsonl", "loop.jsonl", "nul\0.jsonl"])
def test_a_path_that_cannot_be_looked_up_is_missing(project: Project, name: str) -> None:
    (project.root / "loop.jsonl").symlink_to("loop.jsonl")
    write_rows(project.root / "d.jsonl", [row("x", None)])
    for train, held_out, key in ((name, "d.jsonl", "train"), ("d.jsonl", name, "eval")):
        found = check_dataset(DatasetFiles(train=Path(train), eval=Path(held_out)), project, recipe=Path("r.yaml"))
        assert places(found.faults) == [("r.yaml", f"dataset.{key}")] and "does not exist" in found.faults[0].message


def test_a_path_in_a_folder_that_may_not_be_entered_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    found = check_dataset(DatasetFiles(train=Path("t.jsonl"), eval=Path("e.jsonl")), project, recipe=Path("r.yaml"))
    assert places(found.faults) == [("r.yaml", "dataset.train"), ("r.yaml", "dataset.eval")]


def test_the_digest_changes_with_a_weight(project: Project) -> None:
    kinds: list[dict[str, object]] = [{}, {"weight": 2}, {"weight": 0.5}, {"rejected_response": "2"}, {"rejected_response": "2", "weight": 2}]
    digests = [load_dataset(files(project, [row("x", None, **more)], [row("z", None)]), project).digest for more in kinds]
    assert len(set(digests)) == 5
    assert load_dataset(files(project, [row("x", None, weight=1)], [row("z", None)]), project).digest == digests[0]


def written(project: Project, rows: list[object]) -> list[dict[str, Any]]:
    write_swift_rows(read_examples(write_rows(project.root / "d.jsonl", rows), project), project.root / "out.parquet")
    return list(parquet.read_table(project.root / "out.parquet").to_pylist())


def test_swift_rows_hold_absolute_paths_and_nothing_of_ours(project: Project) -> None:
    write_image(project.root / "a.png")
    for more in ({}, {"rejected_response": "Noir tote"}):
        assert written(project, [row(kind="name", slice="seen", **more)]) == [{"messages": row()["messages"], "images": [str(project.root / "a.png")], **more}]
    assert [each["images"] for each in written(project, [row("x", None), row("y", None)])] == [[], []]


def test_a_weight_stands_at_every_answer_of_every_row_if_any_row_has_one(project: Project) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    plain, weighted = written(project, [row("x", None), {"messages": turns, "weight": 2}])
    assert [message["loss_scale"] for message in plain["messages"]] == [None, 1.0]
    assert [message["loss_scale"] for message in weighted["messages"]] == [None, None, 2.0, None, 2.0]
    assert all("loss_scale" not in message for message in written(project, [row("x", None)])[0]["messages"])


def test_many_rows_are_written_in_their_order(project: Project) -> None:
    assert [each["messages"][1]["content"] for each in written(project, [row(str(number), None) for number in range(2500)])] == [*map(str, range(2500))]
