"""Approved feedback as rows: what is written, what is there already, what is refused."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from pipeline import feedback_rows
from pipeline.dataset import check_dataset, load_dataset, read_examples
from pipeline.errors import InvalidInput
from pipeline.feedback import decide, find, give, judged_samples
from pipeline.feedback_rows import Export, export, rows_since
from pipeline.project import Project
from pipeline.recipe import DatasetFiles, FinetuneRecipe
from pipeline.sample import Sample
from tests.conftest import row, write_image, write_rows
from tests.feedback import ANSWERED_BY, picture_of, write_sample


@pytest.fixture
def shop(project: Project) -> Project:
    """A shard of two training rows, one of a picture, and a held-out row."""
    write_image(project.root / "data/a.png")
    write_rows(project.root / "data/train/own.jsonl", [row("Rubio watch", "../a.png"), row("red", None, "What colour?")])
    write_rows(project.root / "data/held-out.jsonl", [row("Sol tent", None, "What is held out?")])
    return project


def recipe(**more: Any) -> FinetuneRecipe:
    return FinetuneRecipe(name="shop", base_model="tiny", dataset=DatasetFiles(train=Path("data/train"), eval=Path("data/held-out.jsonl")), **more)


def approve(project: Project, sample: Sample, correction: str | None = "Rubio watch") -> Sample:
    found = find(judged_samples(project), sample.id)
    give(project, found, None if correction else "good", correction, "ann@a")
    decide(project, [find(judged_samples(project), sample.id)], "approved", "bob@b")
    return sample


def exported(project: Project, **more: Any) -> Export:
    return export(project, recipe(**more), file(project), "me@here")


def file(project: Project) -> Path:
    return project.root / "data/train/feedback.jsonl"


def written(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file(project).read_text().splitlines()]


def state(project: Project, sample: Sample) -> tuple[str, str]:
    found = find(judged_samples(project), sample.id).feedback
    return found.state, found.why


def test_a_correction_becomes_a_row_that_can_be_trained_on_with_where_it_comes_from(shop: Project) -> None:
    corrected, good = approve(shop, write_sample(shop, 1)), approve(shop, write_sample(shop, 2, "And its colour?", "scarlet", picture=False), None)
    write_sample(shop, 3)
    approve(shop, write_sample(shop, 4, name="other"))
    done = exported(shop)
    assert done == Export(file(shop), (corrected.id, good.id), {}, {})
    first, second = written(shop)
    assert first["messages"] == [{"role": "user", "content": "<image>What product is this?"}, {"role": "assistant", "content": "Rubio watch"}]
    assert first["images"] == [f"feedback-images/{corrected.images[0]}"] and second["messages"][-1]["content"] == "scarlet"
    origin = first["provenance"]
    assert origin.pop("approved_at").startswith("20") and origin == {
        "sample": corrected.id,
        "asked_at": corrected.at,
        "answered_by": ANSWERED_BY,
        "said": "correction",
        "given_by": "ann@a",
        "approved_by": "bob@b",
    }
    copied = file(shop).parent / first["images"][0]
    assert copied.read_bytes() == picture_of(shop, corrected).read_bytes()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file(shop), copied, copied.parent)] == [0o600, 0o600, 0o700]
    shutil.rmtree(shop.samples)  # the samples' days are over
    rows = load_dataset(recipe().dataset, shop)
    assert len(rows.train) == 4 and not rows.warnings and not check_dataset(recipe().dataset, shop).faults


def test_nothing_is_exported_twice(shop: Project) -> None:
    write_rows(file(shop), [row("Verda tote", None, "Before?")])
    file(shop).write_text(file(shop).read_text().rstrip("\n"))
    file(shop).chmod(0o640)
    one = approve(shop, write_sample(shop, 1))
    assert exported(shop).written == (one.id,)
    before = file(shop).read_bytes()
    again = exported(shop)
    assert again.written == () and again.there == {one.id: "is in data/train/feedback.jsonl already"} and file(shop).read_bytes() == before
    asked_again = approve(shop, write_sample(shop, 2, "What colour?", "a red", picture=False), "red ")
    same = approve(shop, write_sample(shop, 3, picture=False, question="Why?"), "So")
    twin = approve(shop, write_sample(shop, 4, picture=False, question="Why?"), "So")
    done = exported(shop)
    assert done.written == (same.id,)
    assert done.there | {one.id: ""} == {one.id: "", asked_again.id: "is also row 4 of data/train", twin.id: f"is also sample {same.id}"}
    assert [each["messages"][0]["content"] for each in written(shop)] == ["Before?", "<image>What product is this?", "Why?"]
    assert stat.S_IMODE(file(shop).stat().st_mode) == 0o640 and not list(file(shop).parent.glob(".*.draft"))


def test_what_is_held_out_or_contradicts_is_refused_on_record_and_not_tried_again(shop: Project) -> None:
    held_out = approve(shop, write_sample(shop, 1, " What is held out?\n", "?", picture=False), "Something else")
    shutil.copy(shop.root / "data/a.png", shop.samples / "p.png")
    contradicts = approve(shop, write_sample(shop, 2, "What colour?", "?", picture=False), "blue")
    first, second = (approve(shop, write_sample(shop, number, "Why?", "?", picture=False), text) for number, text in ((3, "So"), (4, "Not so")))
    fine = approve(shop, write_sample(shop, 5))
    done = exported(shop)
    assert done.written == (first.id, fine.id) and set(done.refused) == {held_out.id, contradicts.id, second.id}
    assert "held-out row" in done.refused[held_out.id] and "row 2 of data/train answers the same question otherwise" in done.refused[contradicts.id]
    assert state(shop, held_out) == ("refused", done.refused[held_out.id]) and f"sample {first.id} answers" in done.refused[second.id]
    again = exported(shop)
    assert again.written == () and again.refused == {}
    decide(shop, [find(judged_samples(shop), held_out.id)], "approved", "bob@b")
    write_rows(shop.root / "data/held-out.jsonl", [row("Sol tent", None, "What else is held out?")])
    assert exported(shop).written == (held_out.id,)


def test_an_answer_that_was_corrected_again_after_its_export_is_told(shop: Project) -> None:
    sample = approve(shop, write_sample(shop, 1))
    exported(shop)
    approve(shop, sample, "Rubio clock")
    assert "with another answer" in exported(shop).refused[sample.id] and len(written(shop)) == 1
    file(shop).write_text("")
    decide(shop, [find(judged_samples(shop), sample.id)], "approved", "bob@b")
    assert exported(shop).written == (sample.id,) and written(shop)[0]["messages"][-1]["content"] == "Rubio clock"


def test_the_picture_of_a_held_out_row_makes_the_question(shop: Project) -> None:
    sample = write_sample(shop, 1)
    shutil.copy(picture_of(shop, sample), shop.root / "data/b.png")
    write_rows(shop.root / "data/held-out.jsonl", [row("Sol tent", "b.png")])
    approve(shop, sample)
    approve(shop, write_sample(shop, 2))
    done = exported(shop)
    assert list(done.refused) == [sample.id] and len(done.written) == 1


def test_what_is_no_row_is_refused(shop: Project) -> None:
    unkept = approve(shop, write_sample(shop, 1, keep=False))
    odd = approve(shop, write_sample(shop, 2, "<|user|>", picture=False))
    done = exported(shop)
    assert "sampling.keep_images" in done.refused[unkept.id] and "part of the prompt format" in done.refused[odd.id] and not file(shop).exists()


def test_preferences_say_what_not_to_answer(shop: Project) -> None:
    corrected, good = approve(shop, write_sample(shop, 1)), approve(shop, write_sample(shop, 2), None)
    done = exported(shop, method="dpo")
    assert done.written == (corrected.id,) and "learns from corrections" in done.refused[good.id]
    assert written(shop)[0]["rejected_response"] == "a red circle"


def test_an_export_that_dies_leaves_the_rows_as_they_were(shop: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    approve(shop, write_sample(shop, 1))
    exported(shop)
    before = file(shop).read_bytes()
    approve(shop, write_sample(shop, 2))

    def dies(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(feedback_rows.shutil, "copymode", dies)
        exported(shop)
    assert file(shop).read_bytes() == before and len(exported(shop).written) == 1 and len(read_examples(file(shop), shop)) == 2


@pytest.mark.parametrize(
    ("to", "says"),
    [("data/held-out.jsonl", "among the held-out rows"), ("data/train/x.csv", "is no .jsonl file"), ("data/none/x.jsonl", "its folder does not exist")],
)
def test_rows_go_where_rows_belong(shop: Project, to: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        export(shop, recipe(), shop.root / to, "me@here")


def test_wrong_rows_of_the_recipe_are_told_first(shop: Project) -> None:
    approve(shop, write_sample(shop, 1))
    write_rows(shop.root / "data/held-out.jsonl", ["{"])
    with pytest.raises(InvalidInput, match="is not JSON"):
        exported(shop)
    os.remove(shop.root / "data/held-out.jsonl")  # noqa: PTH107
    with pytest.raises(InvalidInput, match="no such plain file"):
        exported(shop)
    assert not file(shop).exists()


def test_fresh_rows_are_those_approved_since(shop: Project) -> None:
    old, new = row("a", None, "Old?"), row("b", None, "New?")
    old["provenance"], new["provenance"] = {"approved_at": "2026-11-01T00:00:00+00:00"}, {"approved_at": "2026-11-20T00:00:00+00:00"}
    others = [row("c", None, "By hand?"), row("d", None, "Odd?", provenance="a friend"), row("e", None, "Odder?", provenance={"approved_at": "soon"})]
    path = write_rows(shop.root / "data/x.jsonl", [old, new, *others])
    assert [example.answer for example in rows_since(path, shop, 1_794_000_000.0)] == ["b"]
    assert [example.answer for example in rows_since(path, shop, 0.0)] == ["a", "b"]
    assert rows_since(shop.root / "data/none.jsonl", shop, 0.0) == ()
