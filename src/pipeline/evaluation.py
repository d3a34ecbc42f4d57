"""Scores through the served OpenAI API: the same held-out questions to any served name."""

import asyncio
import base64
import json
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from pipeline.dataset import IMAGE_TAG, Example
from pipeline.errors import ServingError
from pipeline.progress import Report

CONCURRENCY = 16
MAX_TOKENS = 128
"""Of an answer; a longer one is cut, and so wrong."""


@dataclass(frozen=True)
class Answer:
    example: Example
    text: str
    model: str
    """The version that answered, as the server names it."""

    @property
    def correct(self) -> bool:
        """Exact match, but for white space around the answer."""
        return self.text.strip() == self.example.answer.strip()

    @property
    def score(self) -> float:
        """0 to 1: for an answer that should be a JSON object the share of fields that are right, for any other whether it matches exactly."""
        wanted = _json_object(self.example.answer)
        return _field_accuracy(wanted, _json_object(self.text)) if wanted else float(self.correct)


@dataclass(frozen=True)
class Evaluation:
    """All answers of one served name; every figure is a mean over answers, 0 to 1."""

    answers: tuple[Answer, ...]

    @property
    def exact_match(self) -> float:
        """The share of answers that match exactly; one wrong field makes a JSON answer wrong."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def score(self) -> float:
        return _mean_score(self.answers)

    def by(self, attribute: str) -> dict[str, float]:
        """The score per `kind` or per `slice`."""
        values = sorted({getattr(answer.example, attribute) for answer in self.answers} - {""})
        return {value: _mean_score([answer for answer in self.answers if getattr(answer.example, attribute) == value]) for value in values}

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that answered: one, unless the alias moved meanwhile."""
        return tuple(sorted({answer.model for answer in self.answers}))


def _mean_score(answers: Sequence[Answer]) -> float:
    return sum(answer.score for answer in answers) / len(answers)


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, empty if it is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _field_accuracy(wanted: dict[str, Any], given: dict[str, Any]) -> float:
    """The share of all fields of either object that both have with the same value, so that missing and invented fields count alike."""
    right = [key for key in wanted.keys() & given.keys() if json.dumps(wanted[key], sort_keys=True) == json.dumps(given[key], sort_keys=True)]
    return len(right) / len(wanted.keys() | given.keys())  # compared as JSON: in Python 1 equals true


def openai_messages(example: Example) -> list[dict[str, Any]]:
    """The example's prompt for the chat completions API: each image tag becomes an image part (a data URL), in place."""
    images = iter(example.images)
    messages = []
    for message in example.prompt:
        texts = message["content"].split(IMAGE_TAG)
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(texts):
            parts += [{"type": "image_url", "image_url": {"url": data_url(next(images))}}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": message["role"], "content": parts})
    return messages


def data_url(image: Path) -> str:
    """The image file as a data URL."""
    kind = mimetypes.guess_type(image.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def evaluate(url: str, model: str, examples: Sequence[Example], report: Report, api_key: str = "none", file: str = "the rows") -> Evaluation:
    """Asks `model` at `url` every example of `file`, greedily, CONCURRENCY at a time.

    Raises ServingError, naming the first example that could not be answered by its row; the client library retries what may be retried.
    """
    return Evaluation(asyncio.run(_ask_all(url, model, examples, report, api_key, file)))


async def _ask_all(url: str, model: str, examples: Sequence[Example], report: Report, api_key: str, file: str) -> tuple[Answer, ...]:
    gate = asyncio.Semaphore(CONCURRENCY)
    done = 0

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key) as client:

        async def ask(example: Example) -> Answer:
            nonlocal done
            async with gate:
                try:
                    answer = await client.chat.completions.create(model=model, messages=openai_messages(example), max_tokens=MAX_TOKENS, temperature=0)  # type: ignore[arg-type]
                except OpenAIError as error:
                    # the server's words may quote the row, which the journal must not: it writes the first line
                    raise ServingError(f"{model} at {url} did not answer row {example.row} of {file} ({type(error).__name__})\n{error}") from error
            done += 1
            report(f"{done}/{len(examples)} answers", done / len(examples))
            return Answer(example, answer.choices[0].message.content or "", answer.model)

        return tuple(await asyncio.gather(*(ask(example) for example in examples)))
