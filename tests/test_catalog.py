"""The committed catalog is what the code makes, and judges by pictures and a pair that training never saw."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.catalog import BRANDS, COLOUR_NAMES, COMPARE_QUESTION, KINDS, PRODUCTS, QUESTIONS, TEXT_QUESTIONS, UNSEEN_PAIR, Product, make_catalog
from pipeline.pictures import PARTS, draw, placements

COMMITTED = Path(__file__).parents[1] / "data" / "catalog"


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def _pixels(path: Path) -> str:
    with Image.open(path) as image:
        assert (image.mode, image.size, image.info) == ("RGB", (56, 56), {}), f"{path.name}: 56x56 RGB without metadata"
        return hashlib.sha256(image.tobytes()).hexdigest()


def _asked(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def _told(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


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
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) < 600_000


def test_counts_kinds_and_slices(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    assert 1200 <= len(train) <= 1400 and 350 <= len(evaluation) <= 450
    assert {row["slice"] for row in train} == {"seen"}
    kinds = {*QUESTIONS, "compare", "text"}
    assert kinds == {"name", "use", "colour", "json", "compare", "text"}
    for rows, least in ((train, 100), (evaluation, 50)):
        counts = Counter(row["kind"] for row in rows)
        assert set(counts) == kinds and min(counts.values()) >= least
        assert all(set(row) == {"messages", "images", "kind", "slice"} for row in rows)
        assert all(len(row["images"]) == {"compare": 2, "text": 0}.get(row["kind"], 1) == _asked(row).count("<image>") for row in rows)
        assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
        assert len({json.dumps(row) for row in rows}) == len(rows), "no row stands twice"
    unseen = Counter(row["kind"] for row in evaluation if row["slice"] == "unseen-pair")
    assert set(unseen) == kinds and min(unseen.values()) >= 8


def test_every_product_is_asked_about_in_every_way(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    for rows, products in ((train, len(PRODUCTS) - 1), (evaluation, len(PRODUCTS))):
        for kind in ("name", "json"):
            assert len({_told(row) for row in rows if row["kind"] == kind}) == products
        for kind, answers in (("use", 3), ("colour", 6)):
            assert len({_told(row) for row in rows if row["kind"] == kind}) == answers
        named = {name for row in rows if row["kind"] == "compare" for name in _told(row).split(" and ")}
        assert named <= {product.name for product in PRODUCTS} and len(named) >= products - 2
        assert {_asked(row) for row in rows if row["kind"] == "compare"} == {f"<image><image>{COMPARE_QUESTION}"}


def test_json_answers_are_objects_of_the_shops_facts(evaluation: list[dict[str, Any]]) -> None:
    answers = [json.loads(_told(row)) for row in evaluation if row["kind"] == "json"]
    assert {"brand": "Rubio", "kind": "watch", "colour": "scarlet", "occasions": ["office", "travel"]} in answers
    assert all(list(answer) == ["brand", "kind", "colour", "occasions"] for answer in answers)


def test_no_text_only_fact_is_in_both(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    """However a fact about a product is asked for, it is either taught or judged, and what it follows from is taught with other products."""
    taught, judged = ({_asked(row): _told(row) for row in rows if row["kind"] == "text"} for rows in (train, evaluation))
    assert not taught.keys() & judged.keys()
    for answer, questions in TEXT_QUESTIONS.items():
        for product in PRODUCTS:
            wordings = {product.fill(question) for question in questions}
            assert wordings <= taught.keys() or wordings <= judged.keys()
            assert all((taught | judged)[wording] == product.fill(answer) for wording in wordings)
            alike = [other for other in PRODUCTS if other != product and (other.colour == product.colour or other.shape == product.shape)]
            others = [other for other in alike if other.fill(questions[0]) in taught]
            assert product.colour in {other.colour for other in others} and product.shape in {other.shape for other in others}


def test_no_picture_is_in_both(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    taught, judged = _images(train), _images(evaluation)
    digests = {name: _pixels(COMMITTED / name) for name in taught | judged}
    assert len(set(digests.values())) == len(digests), "every picture is another one"
    assert not {digests[name] for name in taught} & {digests[name] for name in judged}
    assert {f"images/{path.name}" for path in (COMMITTED / "images").iterdir()} == taught | judged


def test_the_unseen_pair_is_only_judged(train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> None:
    colour, shape = UNSEEN_PAIR
    product = Product(colour, shape)
    for row in train:
        text = _asked(row) + _told(row)
        assert product.name not in text and f"{COLOUR_NAMES[colour]} {KINDS[shape]}" not in text
        if row["kind"] != "compare":  # which may name the brand and the kind, of two products
            assert not {BRANDS[colour], COLOUR_NAMES[colour]} & set(re.findall(r"\w+", text)) or KINDS[shape] not in text
    named = [row for row in evaluation if row["kind"] in ("name", "compare")]
    assert all((product.name in _told(row)) == (row["slice"] == "unseen-pair") for row in named)
    assert all((row["slice"] == "unseen-pair") == (_told(row) == product.answer("json")) for row in evaluation if row["kind"] == "json")


def test_no_placement_belongs_to_two_parts() -> None:
    parts = sorted(set(PARTS.values()))
    together = [placement for part in parts for placement in placements(part)]
    assert len(together) == len(set(together)) == 14 * 14 * 11


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="square, circle, triangle"):
        draw("red", "star", (2, 2, 30))
