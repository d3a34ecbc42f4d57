"""One picture saved twice is found again; two pictures of the catalog, a pixel apart, are two."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from PIL import Image

from pipeline.likeness import Likeness, alike, likeness
from tests.conftest import ROOT

CATALOG = ROOT / "data" / "catalog"
Change = Callable[[Image.Image], Image.Image]


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def rich(seed: int) -> Image.Image:
    """A picture with detail at every scale, as a photograph has."""
    dice, total = numpy.random.default_rng(seed), numpy.zeros((240, 320, 3))
    for side in (4, 16, 64, 160):
        noise = dice.integers(0, 256, (side * 3 // 4, side, 3), dtype=numpy.uint8)
        total += numpy.asarray(Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(total.astype(numpy.uint8))


@pytest.fixture(scope="module")
def catalog() -> dict[str, list[Image.Image]]:
    names = {
        split: sorted({name for line in (CATALOG / f"{split}.jsonl").read_text("utf-8").splitlines() for name in json.loads(line)["images"]})
        for split in ("train", "eval")
    }
    return {split: [Image.open(CATALOG / name).convert("RGB") for name in each] for split, each in names.items()}


def found(pictures: list[Image.Image], others: list[Image.Image]) -> list[tuple[int, int]]:
    return list(alike([likeness(image) for image in pictures], [likeness(image) for image in others]))


CHANGES: dict[str, Change] = {
    "jpeg 75": lambda image: saved(image, "JPEG", quality=75),
    "jpeg 90": lambda image: saved(image, "JPEG", quality=90),
    "webp": lambda image: saved(image, "WEBP"),
    "webp 75": lambda image: saved(image, "WEBP", quality=75),
    "twice as large": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "larger, jpeg 75": lambda image: saved(image.resize((image.width * 9 // 5, image.height * 9 // 5), Image.Resampling.LANCZOS), "JPEG", quality=75),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_picture_saved_again_is_found(catalog: dict[str, list[Image.Image]], change: Change) -> None:
    some = catalog["train"][::3]
    assert found(some, [change(image) for image in some]) == [(index, index) for index in range(len(some))]
    photographs = [rich(seed) for seed in range(8)]
    assert found(photographs, [change(image) for image in photographs]) == [(index, index) for index in range(8)]


def test_the_catalogs_held_out_pictures_are_new(catalog: dict[str, list[Image.Image]]) -> None:
    assert (len(catalog["train"]), len(catalog["eval"])) == (306, 135), "all of them are compared"
    assert found(catalog["train"], catalog["eval"]) == []


def test_different_pictures_are_not_alike() -> None:
    plain = [Image.new("RGB", (64, 64), (level, 128, 128)) for level in (0, 60, 120, 180, 240)]
    assert found(plain[:2], plain[2:]) == []
    assert found([rich(seed) for seed in range(8)], [rich(seed) for seed in range(8, 16)]) == []
    assert found([rich(1)], [rich(1).resize((320, 200))]) == [], "another aspect"


def test_fine_detail_tells_pictures_of_equal_colours_apart() -> None:
    dice = numpy.random.default_rng(3)
    one, two = (Image.fromarray((dice.integers(0, 2, (112, 112)) * 200).astype(numpy.uint8)).resize((448, 448), Image.Resampling.NEAREST) for _ in range(2))
    coarse_only = Likeness(1.0, likeness(one).cells, likeness(two).detail)
    assert list(alike([likeness(one)], [coarse_only])) == []
    assert len(list(alike([likeness(one)], [likeness(one)]))) == 1


def test_nothing_is_like_nothing() -> None:
    assert found([], []) == [] and found([rich(1)], []) == [] and found([], [rich(1)]) == []
