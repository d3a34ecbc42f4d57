"""Product questions as an online shop's assistant gets them, made by code: each number gives a question that no cache of a server has seen."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SIDE = 448
"""Pixels of a picture; 448x448 is 256 image tokens for GLM-4.5V."""
Kind = Literal["image", "text", "two-images"]
Mix = Literal["image", "mixed", "text"]
MIXES: Mapping[Mix, tuple[Kind, ...]] = {
    "image": ("image",),
    "text": ("text",),
    "mixed": ("image", "text", "image", "two-images", "image", "text", "image", "text", "two-images", "image"),
}
"""The kinds of questions in their order, over and over: `mixed` is half one picture, three tenths text, two tenths two pictures."""
SYSTEM = "You answer questions about products."
ASKED: Mapping[Kind, tuple[str, ...]] = {
    "image": (
        "What colour and material is the product in this picture, and would it suit everyday use?",
        "The customer asks whether this item fits a size medium and how it should be washed. Answer from the picture.",
        "Write a short product description for the item shown, naming its main features and likely price range.",
        "Is there any visible damage on this product? Say yes or no first and then explain what you see.",
        "Which category of our shop does this product belong to, and which two accessories go with it?",
    ),
    "two-images": (
        "Are these two pictures of the same product? Name every difference that a customer would notice.",
        "The first picture is from our catalog, the second from a customer. Is what was delivered what was ordered?",
        "Which of these two products suits a beginner better, and why?",
    ),
    "text": (
        "It arrived a week late and one part is missing. Write a friendly answer to the customer that offers a way out.",
        "Write a short product description from this sheet, naming its main features and whom it suits.",
        "Give the fields category, material, care and audience of this product as one JSON object.",
    ),
}
SHEET: Mapping[str, tuple[str, ...]] = {
    "Colour": ("navy", "sand", "olive", "ivory", "charcoal", "brick red"),
    "Material": ("organic cotton", "recycled polyester", "full-grain leather", "merino wool", "stainless steel", "oak veneer"),
    "Care": ("wash at 30 degrees", "wipe with a damp cloth", "dry clean only", "do not tumble dry"),
    "Made in": ("Portugal", "Vietnam", "Turkey", "Poland", "India"),
    "Delivered in": ("two to three days", "one week", "two weeks, by freight"),
}
"""What stands on a product sheet, which a question without a picture brings along."""


@dataclass(frozen=True)
class Question:
    kind: Kind
    messages: tuple[Mapping[str, Any], ...]
    """As the chat completions API takes them, pictures as data URLs."""


def questions(mix: Mix, first: int, count: int, seed: int) -> list[Question]:
    """`count` questions of a mix, numbered from `first`."""
    return [question(mix, place, first + place, seed) for place in range(count)]


def question(mix: Mix, place: int, number: int, seed: int) -> Question:
    """Kind and words depend on the place in a list alone, so that arms are asked alike; pictures and article number on `number` and `seed`.

    Equal arguments give equal questions, other numbers other ones.
    """
    kind = MIXES[mix][place % len(MIXES[mix])]
    text = ASKED[kind][place % len(ASKED[kind])]
    if kind == "text":
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"{_sheet(number, seed)}\n{text}"}]
    else:
        urls = [_data_url(picture(number, which, seed)) for which in range(2 if kind == "two-images" else 1)]
        parts = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
    return Question(kind, ({"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}))


def _sheet(number: int, seed: int) -> str:
    """A product sheet; its article number comes first, so that no two sheets share a beginning that could be cached."""
    import numpy as np

    dice = np.random.default_rng((seed, number))
    fields = [f"{name}: {values[dice.integers(len(values))]}." for name, values in SHEET.items()]
    return f"Article {seed % 10**6}-{number}. Price: {dice.integers(5, 500)}.{dice.integers(100):02d} EUR. {' '.join(fields)}"


def picture(number: int, which: int, seed: int) -> bytes:
    """A JPEG of SIDE x SIDE pixels: soft colours, noise and a dozen rectangles, about 20 kB."""
    import numpy as np
    from PIL import Image, ImageDraw

    dice = np.random.default_rng((seed, number, which))
    soft = Image.fromarray(dice.integers(0, 232, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = Image.fromarray(np.minimum(np.asarray(soft), 231) + dice.integers(0, 24, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for left, right, top, bottom, *colour in dice.integers(0, SIDE, (12, 7)):
        pen.rectangle((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), fill=tuple(int(value) % 256 for value in colour))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
