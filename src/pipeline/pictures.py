"""The pictures that the embedded default looks at: one shape in one colour on grey, 56x56 pixels.

Every picture is a colour, a shape and a placement; the placements are dealt into disjoint parts, so that what one part
of the product learns from is never what another is judged by.
"""

from functools import cache
from typing import Literal

from PIL import Image, ImageDraw

SIDE = 56
"""Pixels; 56x56 is 2x2 image tokens for GLM-4.5V (patch 14, merge 2)."""
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("square", "circle", "triangle")
BACKGROUND = (128, 128, 128)

Placement = tuple[int, int, int]
"""Left, top and width of the shape in pixels."""
Part = Literal["base-train", "base-eval", "catalog-train", "catalog-eval"]
PARTS: dict[int, Part] = {0: "catalog-eval", 1: "catalog-train", 2: "base-eval", 3: "base-train", 4: "base-train"}


@cache
def placements(part: Part) -> tuple[Placement, ...]:
    """Every placement of `part`, in a fixed order; no placement belongs to two parts."""
    return tuple(
        (left, top, width) for left in range(2, 16) for top in range(2, 16) for width in range(28, 39) if PARTS[(left + 2 * top + 3 * width) % 5] == part
    )


def draw(colour: str, shape: str, placement: Placement) -> Image.Image:
    """The RGB picture of `shape` in `colour` at `placement`; equal arguments give equal pixels."""
    left, top, width = placement
    right, bottom = left + width, top + width
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        pen.polygon(((left, bottom), (right, bottom), (left + width / 2, top)), fill=fill)
    else:
        raise ValueError(f"shape '{shape}' is not one of {', '.join(SHAPES)}")
    return image
