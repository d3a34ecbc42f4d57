"""One picture saved twice is found again; two pictures of the catalog, a pixel apart, are two."""

import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
from PIL import Image

from pipeline.likeness import DETAIL, GRID, MAX_ASPECT_RATIO, MAX_COLOUR, MAX_LUMINANCE, MIN_CORRELATION, PLAIN, Likeness, alike, likeness
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


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [rich(seed) for seed in range(8)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_picture_saved_again_is_found(catalog: dict[str, list[Image.Image]], photographs: list[Image.Image], change: Change) -> None:
    some = catalog["train"][::6]
    assert found(some, [change(image) for image in some]) == [(index, index) for index in range(len(some))]
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


def crowd(seed: int, count: int, spread: float = 3.0) -> list[Likeness]:
    """Pictures whose cells nearly agree, of six details and others near to them."""
    looks, dice = numpy.random.default_rng(7).integers(-128, 128, (6, DETAIL**2)), numpy.random.default_rng(seed)
    made = []
    for _ in range(count):
        look, strength = dice.integers(6), dice.choice([0.0, 0.02, 0.05, 0.3, 1.0])
        detail = 128 + strength * (looks[look] + dice.normal(0, dice.choice([5, 45, 55, 58, 70]), DETAIL**2))
        cells = (numpy.full((GRID**2, 3), 128) + dice.uniform(-spread, spread, (GRID**2, 3))).astype(numpy.float32)
        made.append(Likeness(float(dice.choice([1.0, 1.03, 1.05, 1.5])), cells.tobytes(), detail.clip(0, 255).round().astype(numpy.uint8).tobytes()))
    return made


def one_by_one(pictures: list[Likeness], others: list[Likeness]) -> Iterator[tuple[int, int]]:
    """What `alike` must say of fewer than MAX_CANDIDATES pictures, from the bounds alone."""

    def detail(picture: Likeness) -> Any:
        fine = numpy.frombuffer(picture.detail, numpy.uint8).reshape(DETAIL, DETAIL).astype(numpy.float32)
        return fine - fine.reshape(GRID, 4, GRID, 4).mean((1, 3)).repeat(4, 0).repeat(4, 1)

    def score(one: Likeness, two: Likeness) -> float:
        cells = [numpy.frombuffer(each.cells, numpy.float32).reshape(-1, 3) for each in (one, two)]
        return float((abs(cells[0] - cells[1]).max(0) / (MAX_LUMINANCE, MAX_COLOUR, MAX_COLOUR)).max())

    def same(one: Likeness, two: Likeness) -> bool:
        first, second = detail(one), detail(two)
        if not 1 / MAX_ASPECT_RATIO < one.aspect / two.aspect < MAX_ASPECT_RATIO:
            return False
        return max(first.std(), second.std()) < PLAIN or bool((first * second).mean() / (first.std() * second.std() + 1e-6) >= MIN_CORRELATION)

    for index, other in enumerate(others):
        scores = sorted((score(picture, other), place) for place, picture in enumerate(pictures) if same(picture, other))
        if scores and scores[0][0] <= 1:
            yield scores[0][1], index


@pytest.mark.parametrize("seed", range(6))
def test_many_pictures_at_once_are_judged_as_one_by_one(seed: int) -> None:
    pictures, others = crowd(seed, 120), crowd(100 + seed, 40)
    wanted = list(one_by_one(pictures, others))
    assert list(alike(pictures, others)) == wanted
    assert 0 < len(wanted) < 40, "both verdicts occur"


def test_a_plain_picture_is_not_a_rich_one_of_its_colours() -> None:
    """A plain one has no detail at all: rounding must not make any."""
    cells, dice = numpy.full((GRID**2, 3), 128, numpy.float32).tobytes(), numpy.random.default_rng(5)
    rich_ones = [Likeness(1.0, cells, dice.integers(0, 256, DETAIL**2, dtype=numpy.uint8).tobytes()) for _ in range(100)]
    assert list(alike([Likeness(1.0, cells, bytes([201]) * DETAIL**2)], rich_ones)) == []


def test_many_pictures_of_one_look_are_compared_in_little_time() -> None:
    dice = numpy.random.default_rng(1)
    shown = crowd(1, 2100, spread=1.0)
    shown = [Likeness(1.0, each.cells, dice.integers(0, 256, DETAIL**2, dtype=numpy.uint8).tobytes()) for each in shown]
    began = time.process_time()
    assert list(alike(shown[:2000], shown[2000:])) == []
    assert time.process_time() - began < 1, "0.1 s, and 3 s where details are compared one by one"


def test_nothing_is_like_nothing() -> None:
    assert found([], []) == [] and found([rich(1)], []) == [] and found([], [rich(1)]) == []
