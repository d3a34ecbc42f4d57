"""What a recipe's method asks of its rows, and that everything wrong is said at once, through `tuneserve check` and before `tuneserve train`."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight
from pipeline.errors import Fault, InvalidInput
from pipeline.preflight import check_recipe_and_rows, checked_rows
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, load_recipe
from tests.conftest import row, write_counting_base, write_image, write_rows

HELD_OUT: list[object] = [row("z", None)]


def write_recipe(project: Project, train: list[object], held_out: list[object], more: str = "") -> Path:
    write_rows(project.root / "t.jsonl", train)
    write_rows(project.root / "e.jsonl", held_out)
    path = project.root / "r.yaml"
    path.write_text(f"name: shop\nbase_model: {project.root / 'base'}\ndataset: {{train: t.jsonl, eval: e.jsonl}}\n{more}\n", "utf-8")
    return path


@pytest.fixture
def with_base(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose base model has what tokens are counted with."""
    base = write_counting_base(project.root / "base")
    monkeypatch.setattr(preflight, "base_folder_at_hand", lambda name, project: base)
    monkeypatch.setattr(preflight, "resolve_base_model", lambda name, project, report: type("Base", (), {"folder": base}))
    return project


def before_training(path: Path, project: Project) -> list[Fault]:
    try:
        checked_rows(path, load_recipe(path, FinetuneRecipe), project)
    except InvalidInput as error:
        return list(error.faults)
    return []


def checked(path: Path, project: Project, deep: bool = True) -> list[Fault]:
    faults, check = check_recipe_and_rows(path, project, deep)
    return [*faults, *(check.faults if check else ())]


def places(faults: list[Fault]) -> list[tuple[str, str]]:
    return [(fault.file, fault.path) for fault in faults]


@pytest.mark.parametrize("pictures", [False, True])
def test_rows_that_are_all_bad_are_faults_whatever_else_is_looked_at(with_base: Project, pictures: bool) -> None:
    bad: list[object] = [row(image="none.png")] if pictures else ["{"]
    path = write_recipe(with_base, bad * 2, bad)
    wanted = [("t.jsonl", "row 1"), ("t.jsonl", "row 2"), ("e.jsonl", "row 1")]
    for faults in (checked(path, with_base), before_training(path, with_base)):
        assert [(file, place.removesuffix(".images.0")) for file, place in places(faults)] == wanted


@pytest.mark.parametrize(
    ("train", "settings", "where", "said"),
    [
        ([row("x", None), row("y", None)], "method: dpo", "row 1.rejected_response", "in 2 rows; method: dpo"),
        ([row("x", None), row("y", None, weight=2)], "", "row 2.weight", "set training.row_weights: true, or remove it"),
        ([row("x", None, weight=2, rejected_response="w")], "method: dpo", "row 1.weight", "not used; remove it"),
    ],
)
def test_rows_that_do_not_fit_the_method_are_one_fault(with_base: Project, train: list[object], settings: str, where: str, said: str) -> None:
    path = write_recipe(with_base, train, HELD_OUT, settings)
    for faults in (
        check_recipe_and_rows(path, with_base, deep=False)[0],
        check_recipe_and_rows(path, with_base, deep=True)[0],
        before_training(path, with_base),
    ):
        assert places(faults) == [("t.jsonl", where)] and said in faults[0].message


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, ""),
        ({"weight": 1}, ""),
        ({"weight": 2}, "training: {row_weights: true}"),
        ({"rejected_response": "w"}, "method: dpo"),
        ({"rejected_response": "w"}, ""),
    ],
)
def test_rows_that_fit_the_method_have_no_fault(with_base: Project, fields: dict[str, Any], settings: str) -> None:
    path = write_recipe(with_base, [row("x", None, **fields)], HELD_OUT, settings)
    assert checked(path, with_base) == before_training(path, with_base) == []


@pytest.mark.parametrize(("method", "faults"), [("sft", 0), ("dpo", 1)])
def test_a_rejected_answer_counts_only_where_it_is_trained_on(with_base: Project, method: str, faults: int) -> None:
    path = write_recipe(with_base, [row("x", None, rejected_response="w" * 200)], HELD_OUT, f"method: {method}\ntraining: {{max_length_tokens: 100}}")
    found = checked(path, with_base)
    assert len(found) == faults and all("tokens long" in fault.message for fault in found)
    write_rows(with_base.root / "e.jsonl", ["{"])
    assert len(before_training(path, with_base)) == faults + 1, "all at once"


def test_bad_structure_bad_pictures_and_long_rows_are_said_at_once(with_base: Project) -> None:
    (with_base.root / "cut.png").write_bytes(write_image(with_base.root / "a.png").read_bytes()[:50])
    train = ["{", row(image="cut.png"), row("x" * 200, None)]
    path = write_recipe(with_base, train, HELD_OUT, "training: {max_length_tokens: 100}")
    assert [place for _, place in places(before_training(path, with_base))] == ["row 1", "row 2.images.0", "row 3"]
