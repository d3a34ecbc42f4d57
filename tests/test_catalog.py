"""The committed catalog is what the code makes, and judges by pictures and a pair that training never saw."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.catalog import BRANDS, KINDS, UNSEEN_PAIR, make_catalog
from pipeline.pictures import COLOURS, PARTS, SHAPES, draw, placements

COMMITTED = Path(__file__).parents[1] / "data" / "catalog"


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def _pixels(path: Path) -> str:
    with Image.open(path) as image:
        assert (image.mode, image.size, image.info) == ("RGB", (56, 56), {}), f"{path.name}: 56x56 RGB without metadata"
        return hashlib.sha256(image.tobytes()).hexdigest()


def _images(rows: list[dict[str, Any]]) -> set[str]:
    return {name for row in rows for name in row["images"]}


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return _rows(COMMITTED, "train.jsonl")


@pytest.fixture(scope="module")
def evaluation() -> list[dict[str, Any]]:
    return _rows(COMMITTED, "eval.jsonl")


def test_committed_files_are_what_the_code_makes(tmp_path: Path) -> None:
    make_catalog(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert _rows(tmp_path, name) == _rows(COMMITTED, name)
    made, committed = ({path.name: _pixels(path) for path in (folder / "images").iterdir()} for folder in (tmp_path, COMMITTED))
    assert made == committed
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) < 400_000


def test_counts_kinds_and_slices(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    assert 550 <= len(train) <= 650 and len(evaluation) >= 240
    assert {row["slice"] for row in train} == {"seen"}
    slices = Counter(row["slice"] for row in evaluation)
    assert set(slices) == {"seen", "unseen-pair"} and slices["unseen-pair"] >= 24
    for rows in (train, evaluation):
        assert Counter(row["kind"] for row in rows) == {"name": len(rows) // 2, "use": len(rows) // 2}
        assert all(set(row) == {"messages", "images", "kind", "slice"} and len(row["images"]) == 1 for row in rows)
        assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)


def test_no_picture_is_in_both(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    taught, judged = _images(train), _images(evaluation)
    digests = {name: _pixels(COMMITTED / name) for name in taught | judged}
    assert len(set(digests.values())) == len(digests), "every picture is another one"
    assert not {digests[name] for name in taught} & {digests[name] for name in judged}
    assert {f"images/{path.name}" for path in (COMMITTED / "images").iterdir()} == taught | judged


def test_the_unseen_pair_is_only_judged(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    colour, shape = UNSEEN_PAIR
    product = f"{BRANDS[colour]} {KINDS[shape]}"
    taught = {row["messages"][1]["content"] for row in train}
    assert product not in taught and len({answer for answer in taught if not answer.startswith("for ")}) == len(COLOURS) * len(SHAPES) - 1
    named = [row for row in evaluation if row["kind"] == "name"]
    assert all((row["messages"][1]["content"] == product) == (row["slice"] == "unseen-pair") for row in named)


def test_no_placement_belongs_to_two_parts() -> None:
    parts = sorted(set(PARTS.values()))
    together = [placement for part in parts for placement in placements(part)]
    assert len(together) == len(set(together)) == 14 * 14 * 11


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="square, circle, triangle"):
        draw("red", "star", (2, 2, 30))
