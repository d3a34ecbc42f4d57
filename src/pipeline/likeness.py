"""Whether two pictures are one picture saved twice: as JPEG or WebP, or at another size. Figures of the bounds stand in tests/test_likeness.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[numpy.float32]
Indices = NDArray[numpy.int64]
GRID = 7
"""Cells a side. A 56x56 picture gets cells of 8x8 pixels, as JPEG's blocks are, so that coarse JPEG colour stays inside its cell."""
DETAIL = 28
"""Cells a side of the finer look."""
SHRUNK = 224
"""Pixels a side that larger pictures are brought to first."""
MAX_LUMINANCE = 4.5
"""Of 255, the most that any cell may differ. Saved again (quality 75 and more) cells of the catalog's pictures differ by up to 3.1, a shape moved by one pixel of 56
moves some cell by 5.9 or, where luminance hardly differs, colour by 11.8."""
MAX_COLOUR = 9.0
"""As MAX_LUMINANCE for Cb and Cr, of which most files keep a quarter: saved again they differ by up to 6.0."""
MAX_ASPECT_RATIO = 1.06
"""Rounding to whole pixels changes a small picture's aspect by a few percent."""
PLAIN = 3.0
"""Standard deviation of the detail below which a picture has none to compare."""
MIN_CORRELATION = 0.8
"""Of the details of two pictures that are one."""
MAX_MEAN = 2.5
"""As the bounds above for means over many cells, where what saving changed evens out: at most 1.4 for the same pictures."""
BIN = 16.0
"""Width of the bins in which candidates are looked for; wide against MAX_MEAN, so that few pictures have to be looked for in two bins."""
MAX_CANDIDATES = 512
"""Looked at in all cells for one picture: among thousands with the same means, one more likeness unseen is better than minutes."""


@dataclass(frozen=True)
class Likeness:
    """A picture at a glance: mean luminance and colour of GRID x GRID cells, and the luminance of DETAIL x DETAIL cells as bytes."""

    aspect: float
    cells: bytes
    """float32, GRID x GRID x (Y, Cb, Cr)."""
    detail: bytes
    """uint8, DETAIL x DETAIL."""


def likeness(image: Image.Image) -> Likeness:
    """The likeness of a decoded image, which is left as it is."""
    width, height = image.size
    small = image if image.mode == "RGB" else image.convert("RGB")  # converting copies even where there is nothing to convert
    if max(width, height) > SHRUNK:
        small = small.resize((min(width, SHRUNK), min(height, SHRUNK)), Image.Resampling.BOX)
    pixels = numpy.asarray(small.convert("YCbCr"), numpy.float32)
    cells = _cell_means(pixels, GRID).astype(numpy.float32)
    detail = _cell_means(pixels[:, :, :1], DETAIL).round().astype(numpy.uint8)
    return Likeness(width / height, cells.tobytes(), detail.tobytes())


def _cell_means(pixels: Floats, count: int) -> Floats:
    """The mean of each of count x count equal parts; pixels on a border count for both sides by their share. PIL's BOX does not divide pixels."""
    down, across = (_shares(count, size) for size in pixels.shape[:2])
    means: Floats = numpy.stack([down @ pixels[:, :, channel] @ across.T for channel in range(pixels.shape[2])], axis=-1)
    return means


@lru_cache(maxsize=256)
def _shares(count: int, size: int) -> Floats:
    edges, pixel = numpy.linspace(0, size, count + 1), numpy.arange(size)
    overlap = numpy.minimum(edges[1:, None], pixel + 1) - numpy.maximum(edges[:-1, None], pixel)
    shares: Floats = (overlap.clip(0) * (count / size)).astype(numpy.float32)
    return shares


def alike(pictures: Sequence[Likeness], others: Sequence[Likeness]) -> Iterator[tuple[int, int]]:
    """For each of `others` that shows one of `pictures`: the two indices (picture, other), the likest only."""
    if not pictures or not others:
        return
    cells, other_cells = _cells(pictures), _cells(others)
    aspects, details = numpy.array([picture.aspect for picture in pictures]), _Details(pictures)
    means = _means(cells)
    bins = _binned(means)
    for index, wanted in enumerate(_means(other_cells)):
        low, high = (((wanted + slack) // BIN).astype(int).tolist() for slack in (-MAX_MEAN, MAX_MEAN))
        found = [bins[key] for key in product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))) if key in bins]
        near = numpy.concatenate([numpy.zeros(0, int), *found])
        near = near[(numpy.abs(means[near] - wanted) <= MAX_MEAN).all(axis=1)][:MAX_CANDIDATES]
        differences = numpy.abs(cells[near] - other_cells[index]).max(axis=1)
        scores = numpy.maximum(differences[:, 0] / MAX_LUMINANCE, differences[:, 1:].max(axis=1) / MAX_COLOUR)
        likest = near[numpy.argsort(scores)][: int((scores <= 1).sum())]
        ratios = aspects[likest] / others[index].aspect
        likest = likest[(ratios > 1 / MAX_ASPECT_RATIO) & (ratios < MAX_ASPECT_RATIO)]
        same = likest[details.same(likest, others[index])]
        if len(same):
            yield int(same[0]), index


def _binned(means: Floats) -> dict[tuple[int, ...], Indices]:
    """The pictures in each bin, in their order."""
    keys, places, counts = numpy.unique((means // BIN).astype(int), axis=0, return_inverse=True, return_counts=True)
    members = numpy.split(places.ravel().argsort(kind="stable"), counts.cumsum()[:-1])
    return dict(zip(map(tuple, keys.tolist()), members, strict=True))


def _cells(pictures: Sequence[Likeness]) -> Floats:
    return numpy.stack([numpy.frombuffer(picture.cells, numpy.float32).reshape(GRID * GRID, 3) for picture in pictures])


def _means(cells: Floats) -> Floats:
    """Of each picture the luminance of its four quarters and the colour of the whole."""
    grid = cells.reshape(-1, GRID, GRID, 3)
    half = GRID // 2
    quarters = [grid[:, rows, columns, 0].mean((1, 2)) for rows in (slice(half), slice(half, None)) for columns in (slice(half), slice(half, None))]
    means: Floats = numpy.stack([*quarters, cells[:, :, 1].mean(1), cells[:, :, 2].mean(1)], axis=1)
    return means


class _Details:
    """What the finer cells of many pictures show beyond the coarse ones; held as bytes, since a picture's details as numbers are four times as large."""

    def __init__(self, pictures: Sequence[Likeness]) -> None:
        self._fine = _fine(pictures)
        blocks = (_beyond_coarse(self._fine[start : start + MAX_CANDIDATES]) for start in range(0, len(pictures), MAX_CANDIDATES))
        self._spread = numpy.concatenate([block.std(axis=1) for block in blocks])

    def same(self, indices: Indices, other: Likeness) -> NDArray[numpy.bool_]:
        """Whether each of these pictures has the details of `other`, or neither has any."""
        (wanted,) = _beyond_coarse(_fine([other]))
        spread, wanted_spread = self._spread[indices], wanted.std()
        # What is coarse adds nothing, since `wanted` is 0 over each coarse cell; exactly nothing only in float64.
        products = self._fine[indices].astype(numpy.float64) @ wanted.astype(numpy.float64) / wanted.size
        same: NDArray[numpy.bool_] = (products / (spread * wanted_spread + 1e-6) >= MIN_CORRELATION) | (numpy.maximum(spread, wanted_spread) < PLAIN)
        return same


def _fine(pictures: Sequence[Likeness]) -> NDArray[numpy.uint8]:
    return numpy.stack([numpy.frombuffer(picture.detail, numpy.uint8) for picture in pictures])


def _beyond_coarse(fine: NDArray[numpy.uint8]) -> Floats:
    size = DETAIL // GRID
    cells = fine.astype(numpy.float32).reshape(-1, GRID, size, GRID, size)
    detail: Floats = (cells - cells.mean((2, 4), keepdims=True)).reshape(len(fine), -1)
    return detail
