"""How many tokens a row is, counted as ms-swift will train on it: our chat template, the base model's tokenizer and image processor, no transformers.

tests/test_template_contract.py holds the counts equal to ms-swift's own. Imported by worker processes: keep it light.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pipeline.basemodel import TEMPLATE_FILE
from pipeline.errors import Fault, InvalidInput
from pipeline.example import GLM_TOKENS, IMAGE_TAG, reserved_token
from pipeline.image_file import ImageTokens

IMAGE_TOKEN = "<|image|>"
IMAGE_TEXT = f"<|begin_of_image|>{IMAGE_TOKEN}<|end_of_image|>"
END = "<|user|>"
"""Ends the answer in training."""

Sizes = tuple[tuple[int, int], ...]
"""Width and height of each image in pixels."""


class Tokens(NamedTuple):
    """Lengths of one row in tokens."""

    row: int
    """The whole row as trained on, its images and the token that ends it included; the longer one of answer and rejected answer counts."""
    images: int
    answer: int
    """The answer with the token that ends it."""


class Task(NamedTuple):
    """What a worker needs of a row."""

    messages: tuple[dict[str, str], ...]
    sizes: Sizes
    rejected: str
    """Empty where nothing is trained on it."""


@dataclass(frozen=True)
class PromptCounter:
    """Counts tokens with one base model's tokenizer, image processor and our template."""

    tokenizer: Any
    images: ImageTokens
    template: Any
    own_tokens: re.Pattern[str] | None
    """The base's special tokens that are not GLM's."""

    def count(self, task: Task) -> Tokens | str:
        """The lengths, or why the row is not fit to be trained on with this base model."""
        texts = [*(message["content"] for message in task.messages), task.rejected]
        if self.own_tokens and (hidden := reserved_token(texts, self.own_tokens)):
            return f"holds {hidden!r}, a special token of the base model; remove it or write it another way"
        images = sum(self.images.count(*size) for size in task.sizes)
        try:
            row = self._text_tokens(task.messages)
            if task.rejected:
                row = max(row, self._text_tokens((*task.messages[:-1], {"role": "assistant", "content": task.rejected})))
        except TemplateError as error:
            return f"does not fit the chat template ({error})"
        return Tokens(row - len(task.sizes) + images, images, self._length(task.messages[-1]["content"]) + 1)

    def _text_tokens(self, messages: Sequence[dict[str, str]]) -> int:
        """The row with one token for each image."""
        turns = [{**message, "content": message["content"].replace(IMAGE_TAG, IMAGE_TEXT)} for message in messages]
        return self._length(self.template.render(messages=turns, add_generation_prompt=False) + END)

    def _length(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def read_counter(base: Path) -> PromptCounter:
    """Reads the base model's tokenizer and image processor. Raises InvalidInput if its folder lacks them."""
    try:
        described = (base / "tokenizer.json").read_text("utf-8")
        tokenizer = Tokenizer.from_str(described)
        special = [token["content"] for token in json.loads(described).get("added_tokens", []) if token.get("special")]
        images = _image_tokens(base)
    except Exception as error:  # `tokenizers` raises a bare Exception
        message = f"its tokenizer.json or image processor cannot be read ({error!r}); download the model again"
        raise InvalidInput([Fault(str(base), "", message)]) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders chat templates
    environment.globals["raise_exception"] = _refuse
    own = sorted(set(special) - set(GLM_TOKENS), key=len, reverse=True)
    template = environment.from_string(TEMPLATE_FILE.read_text("utf-8"))
    return PromptCounter(tokenizer, images, template, re.compile("|".join(map(re.escape, own))) if own else None)


def _image_tokens(base: Path) -> ImageTokens:
    """From processor_config.json if it describes the image processor, as transformers reads it, else preprocessor_config.json."""
    described: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (base / name).is_file():
            content = json.loads((base / name).read_text("utf-8"))
            described = content if name == "preprocessor_config.json" else content.get("image_processor", described)
    size = described["size"]
    return ImageTokens(
        described.get("patch_size", 14), described.get("merge_size", 2), described.get("temporal_patch_size", 2), size["shortest_edge"], size["longest_edge"]
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


_counter = functools.cache(read_counter)


def count_all(base: Path, tasks: Sequence[Task]) -> list[Tokens | str]:
    """A chunk of work for a worker process, which reads the base model's files once."""
    counter = _counter(base)
    return [counter.count(task) for task in tasks]
