"""The embedded product catalog, made by code: pictures of a shop's products with a question and the shop's own answer.

`python -m pipeline.catalog data/catalog` writes what the repository holds. A product's brand follows from its colour and its kind
from its shape, so an adapter that learnt the two can name a pair that it never saw.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.pictures import COLOURS, SHAPES, Part, Placement, draw, placements

BRANDS = {"red": "Rubio", "green": "Verda", "blue": "Azul", "yellow": "Sol", "black": "Noir", "white": "Blanc"}
KINDS = {"square": "tote", "circle": "watch", "triangle": "tent"}
USES = {"square": "for carrying your shopping home", "circle": "for telling the time", "triangle": "for sleeping outdoors"}
QUESTIONS = {"name": "What product is this?", "use": "What is it for?"}
UNSEEN_PAIR = ("blue", "triangle")
"""Never in the training rows; the slice `unseen-pair` of the evaluation rows."""
TRAIN_PICTURES_PER_PAIR = 18
EVAL_PICTURES_PER_PAIR = 7
EVAL_PICTURES_OF_UNSEEN_PAIR = 16


@dataclass(frozen=True)
class Picture:
    """One picture of a product."""

    colour: str
    shape: str
    placement: Placement

    @property
    def slice(self) -> str:
        return "unseen-pair" if (self.colour, self.shape) == UNSEEN_PAIR else "seen"

    def answer(self, kind: str) -> str:
        """What the shop says to the question of `kind`."""
        return f"{BRANDS[self.colour]} {KINDS[self.shape]}" if kind == "name" else USES[self.shape]


def _pictures(part: Part, dice: random.Random) -> list[Picture]:
    """The pictures of `part`, shuffled; no two share pair and placement."""
    pictures = []
    for colour in COLOURS:
        for shape in SHAPES:
            unseen = (colour, shape) == UNSEEN_PAIR
            if part == "catalog-train":
                count = 0 if unseen else TRAIN_PICTURES_PER_PAIR
            else:
                count = EVAL_PICTURES_OF_UNSEEN_PAIR if unseen else EVAL_PICTURES_PER_PAIR
            pictures += [Picture(colour, shape, placement) for placement in dice.sample(placements(part), count)]
    dice.shuffle(pictures)
    return pictures


def _rows(pictures: Sequence[Picture], first_number: int) -> list[dict[str, object]]:
    """One row per picture and question, in the form that ms-swift trains on; the pictures are numbered from `first_number`."""
    return [
        {
            "messages": [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": picture.answer(kind)}],
            "images": [f"images/{number:04d}.png"],
            "kind": kind,
            "slice": picture.slice,
        }
        for number, picture in enumerate(pictures, first_number)
        for kind, question in QUESTIONS.items()
    ]


def make_catalog(folder: Path) -> None:
    """Write train.jsonl, eval.jsonl and images/*.png into `folder`; the rows and the pixels are the same at every call."""
    dice = random.Random(20)
    train, evaluation = _pictures("catalog-train", dice), _pictures("catalog-eval", dice)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate([*train, *evaluation], 1):
        draw(picture.colour, picture.shape, picture.placement).save(folder / "images" / f"{number:04d}.png", optimize=True)
    for name, rows in (("train.jsonl", _rows(train, 1)), ("eval.jsonl", _rows(evaluation, 1 + len(train)))):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.catalog FOLDER")
    make_catalog(Path(sys.argv[1]))
