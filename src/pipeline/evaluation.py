"""Scores through the served OpenAI API: the same held-out questions to any served name."""

import asyncio
import base64
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
MAX_TOKENS = 64


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


@dataclass(frozen=True)
class Evaluation:
    """All answers of one served name; scores are exact match, 0 to 1."""

    answers: tuple[Answer, ...]

    @property
    def exact_match(self) -> float:
        return _share_correct(self.answers)

    def by(self, attribute: str) -> dict[str, float]:
        """Exact match per `kind` or per `slice`."""
        values = sorted({getattr(answer.example, attribute) for answer in self.answers} - {""})
        return {value: _share_correct([answer for answer in self.answers if getattr(answer.example, attribute) == value]) for value in values}

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that answered: one, unless the alias moved meanwhile."""
        return tuple(sorted({answer.model for answer in self.answers}))


def _share_correct(answers: Sequence[Answer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


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


def evaluate(url: str, model: str, examples: Sequence[Example], report: Report, api_key: str = "none") -> Evaluation:
    """Asks `model` at `url` every example, greedily, CONCURRENCY at a time.

    Raises ServingError, naming the first example that could not be answered; the client library retries what may be retried.
    """
    return Evaluation(asyncio.run(_ask_all(url, model, examples, report, api_key)))


async def _ask_all(url: str, model: str, examples: Sequence[Example], report: Report, api_key: str) -> tuple[Answer, ...]:
    gate = asyncio.Semaphore(CONCURRENCY)
    done = 0

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key) as client:

        async def ask(example: Example) -> Answer:
            nonlocal done
            async with gate:
                try:
                    answer = await client.chat.completions.create(model=model, messages=openai_messages(example), max_tokens=MAX_TOKENS, temperature=0)  # type: ignore[arg-type]
                except OpenAIError as error:
                    raise ServingError(f"{model} at {url} did not answer {example.prompt[-1]['content']!r}: {error}") from error
            done += 1
            report(f"{done}/{len(examples)} answers", done / len(examples))
            return Answer(example, answer.choices[0].message.content or "", answer.model)

        return tuple(await asyncio.gather(*(ask(example) for example in examples)))
