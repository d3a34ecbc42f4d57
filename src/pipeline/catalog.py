"""The embedded product catalog, made by code: pictures of a shop's products, questions of six kinds and the shop's own answers.

`python -m pipeline.catalog data/catalog` writes what the repository holds. Brand and colour name follow from a product's colour, kind, use
and occasions from its shape, so an adapter that learnt both can answer for a pair that it never saw.
"""

import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.pictures import COLOURS, SHAPES, Part, Placement, draw, placements

BRANDS = {"red": "Rubio", "green": "Verda", "blue": "Azul", "yellow": "Sol", "black": "Noir", "white": "Blanc"}
COLOUR_NAMES = {"red": "scarlet", "green": "moss", "blue": "navy", "yellow": "amber", "black": "ink", "white": "snow"}
"""The shop's own, so that a base model that sees the colour still has to learn its name."""
KINDS = {"square": "tote", "circle": "watch", "triangle": "tent"}
USES = {"square": "for carrying your shopping home", "circle": "for telling the time", "triangle": "for sleeping outdoors"}
OCCASIONS = {"square": ("market", "beach"), "circle": ("office", "travel"), "triangle": ("forest", "festival")}
UNSEEN_PAIR = ("blue", "triangle")
"""Never in the training rows, neither in pictures nor in words; the slice `unseen-pair` of the evaluation rows."""
QUESTIONS = {"name": "What product is this?", "use": "What is it for?", "colour": "What colour is it?", "json": "Describe the product in JSON."}
"""Asked about one picture, by kind of question."""
COMPARE_QUESTION = "Which two products are these?"
"""Asked about two pictures, in their order."""
TEXT_QUESTIONS = {
    "{colour}": ("What colour is the {brand} {kind}?", "Which colour does the {brand} {kind} have?"),
    "{use}": ("What is the {brand} {kind} for?", "What do you do with the {brand} {kind}?"),
    "{first} and {second}": ("When do you need the {brand} {kind}?", "What occasions is the {brand} {kind} for?"),
    "{brand}": ("Which brand is the {colour} {kind}?", "Who sells the {colour} {kind}?"),
    "{brand} {kind}": ("What product is the {colour} {kind}?", "What do you call the {colour} {kind}?"),
}
"""Asked about a product without a picture: each answer with its questions."""
PICTURES_PER_PAIR = {"catalog-train": 18, "catalog-eval": 7}
EVAL_PICTURES_OF_UNSEEN_PAIR = 16
COMPARISONS = {"catalog-train": 250, "catalog-eval": 70}

Row = dict[str, object]


@dataclass(frozen=True)
class Product:
    """What the shop sells and knows: a colour and a shape, and all that follows from them."""

    colour: str
    shape: str

    @property
    def slice(self) -> str:
        return "unseen-pair" if (self.colour, self.shape) == UNSEEN_PAIR else "seen"

    @property
    def name(self) -> str:
        return f"{BRANDS[self.colour]} {KINDS[self.shape]}"

    def answer(self, kind: str) -> str:
        """What the shop says to the question of `kind` about one picture."""
        if kind == "json":
            facts = {"brand": BRANDS[self.colour], "kind": KINDS[self.shape], "colour": COLOUR_NAMES[self.colour], "occasions": OCCASIONS[self.shape]}
            return json.dumps(facts)
        return {"name": self.name, "use": USES[self.shape], "colour": COLOUR_NAMES[self.colour]}[kind]

    def fill(self, words: str) -> str:
        """A text-only question or its answer, about this product."""
        first, second = OCCASIONS[self.shape]
        return words.format(
            brand=BRANDS[self.colour], kind=KINDS[self.shape], colour=COLOUR_NAMES[self.colour], use=USES[self.shape], first=first, second=second
        )


PRODUCTS = tuple(Product(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Picture:
    """One picture of a product."""

    product: Product
    placement: Placement
    number: int

    @property
    def file(self) -> str:
        return f"images/{self.number:04d}.png"


def _pictures(part: Part, first_number: int, dice: random.Random) -> list[Picture]:
    """The pictures of `part`, shuffled and numbered from `first_number`; no two share product and placement."""
    shown = []
    for product in PRODUCTS:
        count = PICTURES_PER_PAIR[part]
        if product.slice == "unseen-pair":
            count = EVAL_PICTURES_OF_UNSEEN_PAIR if part == "catalog-eval" else 0
        shown += [(product, placement) for placement in dice.sample(placements(part), count)]
    dice.shuffle(shown)
    return [Picture(product, placement, number) for number, (product, placement) in enumerate(shown, first_number)]


def _row(kind: str, slice_: str, question: str, answer: str, pictures: Sequence[Picture] = ()) -> Row:
    """One row in the form that ms-swift trains on."""
    content = "<image>" * len(pictures) + question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture.file for picture in pictures], "kind": kind, "slice": slice_}


def _single(pictures: Sequence[Picture], questions_each: int) -> Iterator[Row]:
    """`questions_each` about every picture, in turn per product, so that each product gets all."""
    turns = {product: itertools.cycle(QUESTIONS) for product in PRODUCTS}
    for picture in pictures:
        for kind in itertools.islice(turns[picture.product], questions_each):
            yield _row(kind, picture.product.slice, QUESTIONS[kind], picture.product.answer(kind), [picture])


def _comparisons(pictures: Sequence[Picture], count: int, dice: random.Random) -> Iterator[Row]:
    """`count` questions about two different pictures, now and then of the same product."""
    for _ in range(count):
        one, two = dice.sample(pictures, 2)
        slice_ = max(one.product.slice, two.product.slice)  # unseen-pair, if either is
        yield _row("compare", slice_, COMPARE_QUESTION, f"{one.product.name} and {two.product.name}", [one, two])


def _text() -> tuple[list[Row], list[Row]]:
    """The text-only rows to train on and those held out: of every fact one product per colour, in turn, so that the rest still tell it."""
    train: list[Row] = []
    held_out: list[Row] = []
    for turn, (answer, questions) in enumerate(TEXT_QUESTIONS.items()):
        for number, colour in enumerate(COLOURS):
            kept_back = UNSEEN_PAIR[1] if colour == UNSEEN_PAIR[0] else SHAPES[(turn + number) % len(SHAPES)]
            for shape, question in itertools.product(SHAPES, questions):
                product = Product(colour, shape)
                rows = held_out if shape == kept_back else train
                rows.append(_row("text", product.slice, product.fill(question), product.fill(answer)))
    return train, held_out


def make_catalog(folder: Path) -> None:
    """Write train.jsonl, eval.jsonl and images/*.png into `folder`; the rows and the pixels are the same at every call."""
    dice = random.Random(20)
    train = _pictures("catalog-train", 1, dice)
    evaluation = _pictures("catalog-eval", 1 + len(train), dice)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for picture in (*train, *evaluation):
        draw(picture.product.colour, picture.product.shape, picture.placement).save(folder / picture.file, optimize=True)
    text_train, text_held_out = _text()
    rows = {
        "train.jsonl": [*_single(train, 3), *_comparisons(train, COMPARISONS["catalog-train"], dice), *text_train],
        "eval.jsonl": [*_single(evaluation, 2), *_comparisons(evaluation, COMPARISONS["catalog-eval"], dice), *text_held_out],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.catalog FOLDER")
    make_catalog(Path(sys.argv[1]))
