"""What we write for ms-swift against ms-swift's own loader: text stays text, weights are those of the rows, and ordinary rows train as they would from JSONL."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from pipeline.dataset import write_swift_rows
from pipeline.example import Example
from tests.conftest import write_image
from tests.test_template_contract import processor, swift_template, tiny_folder

pytestmark = pytest.mark.contract
__all__ = ["processor", "swift_template", "tiny_folder"]


def example(answer: str, *images: Path, question: str = "What is it?", **fields: Any) -> Example:
    messages = ({"role": "user", "content": "<image>" * len(images) + question}, {"role": "assistant", "content": answer})
    return Example(messages, images, **fields)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))


def loaded(path: Path) -> Any:
    """The rows as ms-swift's training gets them."""
    from swift.dataset import load_dataset

    return load_dataset([str(path)], strict=True, num_proc=1)[0]


def written(examples: list[Example], folder: Path) -> Any:
    write_swift_rows(examples, folder / "train.parquet")
    return loaded(folder / "train.parquet")


def from_jsonl(examples: list[Example], folder: Path) -> Any:
    rows = [{"messages": each.messages, "images": [str(image) for image in each.images]} for each in examples]
    rows = [row | ({"rejected_response": each.rejected} if each.rejected else {}) for row, each in zip(rows, examples, strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return loaded(folder / "train.jsonl")


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    one, two = ({key: value for key, value in each.items() if value is not None} for each in (one, two))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert numpy.array_equal(value, two[key]), key


@pytest.mark.parametrize("mode", ["train", "rlhf"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_ordinary_rows_train_as_they_would_from_jsonl(swift_template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: int, mode: str) -> None:
    monkeypatch.setattr(swift_template, "mode", mode)
    images = [write_image(tmp_path / f"{number}.png", (90 * number, 10, 10)) for number in range(pictures)]
    examples = [example("Noir", *images, rejected="Azul" if mode == "rlhf" else ""), example("1", rejected="2" if mode == "rlhf" else "")]
    turns = ({"role": "system", "content": "Be brief."}, *examples[0].messages, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"})
    examples.append(Example(turns, tuple(images), rejected="no" if mode == "rlhf" else ""))
    for ours, plain in zip(written(examples, tmp_path), from_jsonl(examples, tmp_path), strict=True):
        assert_equal(swift_template.encode(ours), swift_template.encode(plain))


def test_pictures_after_many_rows_without_any(swift_template: Any, tmp_path: Path) -> None:
    """`datasets` guesses the types of JSONL anew every 16 MB."""
    image = write_image(tmp_path / "a.png")
    examples = [*(example("x", question="long " * 13_000) for _ in range(300)), example("Noir", image)]
    last = written(examples, tmp_path)[300]
    assert_equal(swift_template.encode(last), swift_template.encode(from_jsonl(examples[300:], tmp_path)[0]))
    assert swift_template.encode(last)["pixel_values"] is not None


def test_weights_are_the_rows_own_whatever_rows_come_first(swift_template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_template, "is_binary_loss_scale", False)
    examples = [*(example("x", question="long " * 13_000) for _ in range(300)), example("Noir"), example("Noir", weight=2.5), example("Noir", weight=0.001)]
    rows = written(examples, tmp_path)
    for place, weight in ((300, 1.0), (301, 2.5), (302, 0.001)):
        encoded = swift_template.encode(rows[place])
        taught = [scale for scale, label in zip(encoded["loss_scale"], encoded["labels"], strict=True) if label != -100]
        assert taught[:-1] == [weight] * (len(taught) - 1) and len(taught) > 1
        assert taught[-1] == 1.0, "the end token's loss has no weight"


def test_rejected_answers_that_look_like_dates_stay_text(swift_template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_template, "mode", "rlhf")
    dates = [f"2024-01-{day:02d}" for day in range(1, 20)]
    rows = written([example("2023-05-05T10:00:00", rejected=date) for date in dates], tmp_path)
    for row, date in zip(rows, dates, strict=True):
        encoded = swift_template.encode(row)
        answers = [[token for token in encoded[f"{side}_labels"] if token != -100][:-1] for side in ("rejected", "chosen")]
        assert [swift_template.tokenizer.decode(answer).removeprefix("<think></think>\n") for answer in answers] == [date, "2023-05-05T10:00:00"]
