"""Scores through the served OpenAI API: the same held-out questions to any served name."""

import asyncio
import base64
import collections
import json
import math
import mimetypes
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletion

from pipeline.dataset import IMAGE_TAG, Example
from pipeline.errors import ServingError
from pipeline.progress import Report

Asked = TypeVar("Asked")
Given = TypeVar("Given")

CONCURRENCY = 16
MAX_TOKENS = 128
"""Of an answer; a longer one is cut, and so wrong."""
ANSWER_SECONDS = 300.0
"""For one answer, waiting in the server's queue included."""
RETRIES = 5
"""Of one question, by the client library, waiting longer each time: connection errors, timeouts, 408, 409, 429 and 5xx."""
REFUSAL = re.compile(
    r"\s*(i['\u2019]m sorry|i am sorry|sorry,|i (can|could)(not\b|['\u2019]t\b| not\b)|i(['\u2019]m| am) (unable|not able) to|as an ai\b|unfortunately, i\b|对不起|抱歉|我无法|我不能)",
    re.IGNORECASE,
)
"""How a model begins that does not answer; GLM-4.5V speaks English and Chinese."""


@dataclass(frozen=True)
class Answer:
    """`model` is the version that answered, as the server names it; `seconds` from the request to the whole answer."""

    example: Example
    text: str
    model: str
    seconds: float = 0.0
    grade: float | None = None
    """A judge's, 0 to 1; None where none was asked (judge.py)."""

    @property
    def correct(self) -> bool:
        """Exact match, but for white space around the answer."""
        return self.text.strip() == self.example.answer.strip()

    @property
    def score(self) -> float:
        """0 to 1: for an answer that should be a JSON object the share of fields that are right, for any other whether it matches exactly."""
        wanted = _json_object(self.example.answer)
        return _field_accuracy(wanted, _json_object(self.text)) if wanted else float(self.correct)

    @property
    def token_f1(self) -> float:
        """0 to 1: overlap of the words of both (SQuAD, arXiv 1606.05250), in lower case and without punctuation; a Chinese character counts as a word."""
        given, wanted = (collections.Counter(_words(text)) for text in (self.text, self.example.answer))
        if not given or not wanted:
            return float(self.correct)
        same = (given & wanted).total()
        return 2 * same / (given.total() + wanted.total())

    @property
    def empty(self) -> bool:
        return not self.text.strip()

    @property
    def refusal(self) -> bool:
        """It begins as one who does not answer, and that was not what was wanted."""
        return bool(REFUSAL.match(self.text)) and not REFUSAL.match(self.example.answer)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the held-out rows are split into, and this is part of: the row's kind, its slice, and its number of images."""
        example = self.example
        return (*dict.fromkeys(filter(None, (example.kind, example.slice))), f"images={len(example.images)}")


METRICS: Mapping[str, Callable[[Answer], float]] = {
    "score": lambda answer: answer.score,
    "exact_match": lambda answer: float(answer.correct),
    "token_f1": lambda answer: answer.token_f1,
    "judge": lambda answer: math.nan if answer.grade is None else answer.grade,
}


@dataclass(frozen=True)
class Evaluation:
    """All answers of one served name, in the order of the examples; every figure but seconds is a mean over answers, 0 to 1."""

    answers: tuple[Answer, ...]

    @property
    def exact_match(self) -> float:
        """The share of answers that match exactly; one wrong field makes a JSON answer wrong."""
        return self.mean("exact_match")

    @property
    def score(self) -> float:
        return self.mean("score")

    def mean(self, metric: str) -> float:
        return _mean(self.answers, metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of METRICS that are known: all but the judge's, unless each answer has a grade."""
        graded = all(answer.grade is not None for answer in self.answers)
        return tuple(metric for metric in METRICS if graded or metric != "judge")

    def by(self, attribute: str, metric: str = "score") -> dict[str, float]:
        """The mean per `kind` or per `slice`."""
        values = sorted({getattr(answer.example, attribute) for answer in self.answers} - {""})
        return {value: _mean([answer for answer in self.answers if getattr(answer.example, attribute) == value], metric) for value in values}

    def indices(self, part: str) -> list[int]:
        """Where the answers stand that are of that part (`Answer.parts`)."""
        return [index for index, answer in enumerate(self.answers) if part in answer.parts]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(sorted({part for answer in self.answers for part in answer.parts}))

    @property
    def refusal_rate(self) -> float:
        return sum(answer.refusal for answer in self.answers) / len(self.answers)

    @property
    def empty_rate(self) -> float:
        return sum(answer.empty for answer in self.answers) / len(self.answers)

    def seconds(self, percentile: float) -> float:
        """Of one answer, at the concurrency that they were asked with; nearest rank."""
        ordered = sorted(answer.seconds for answer in self.answers)
        return ordered[max(0, math.ceil(percentile / 100 * len(ordered)) - 1)]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that answered: one, unless the alias moved meanwhile."""
        return tuple(sorted({answer.model for answer in self.answers}))


def _mean(answers: Sequence[Answer], metric: str) -> float:
    value = METRICS[metric]
    return sum(map(value, answers)) / len(answers)


def _words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())


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


def chat_body(model: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
    """A greedy request of the chat completions API."""
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}


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
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=RETRIES, timeout=ANSWER_SECONDS) as client:

        async def ask(example: Example) -> Answer:
            began = time.monotonic()
            try:
                answer = await complete(client, chat_body(model, openai_messages(example), MAX_TOKENS))
            except OpenAIError as error:
                # the server's words may quote the row, which the journal must not: it writes the first line
                raise ServingError(f"{model} at {url} did not answer row {example.row} of {file} ({type(error).__name__})\n{error}") from error
            return Answer(example, answer.choices[0].message.content or "", answer.model, time.monotonic() - began)

        return tuple(await in_order(ask, examples, CONCURRENCY, report, "answers"))


async def complete(client: AsyncOpenAI, body: Mapping[str, Any]) -> ChatCompletion:
    """The answer to a chat request, with a choice. Raises OpenAIError once the client's retries are used up, or if it is no such answer.

    By the client's `post`: its `chat.completions.create` walks every part of the messages by type, 1.4 ms a request, on a core that the server may need.
    """
    answer = await client.post("/chat/completions", body=body, cast_to=ChatCompletion)
    if not (isinstance(answer, ChatCompletion) and "choices" in answer.model_fields_set and answer.choices):  # what is no JSON comes as text
        raise OpenAIError("it answers, but not as the chat completions API does")
    return answer


async def in_order(ask: Callable[[Asked], Awaitable[Given]], items: Sequence[Asked], concurrency: int, report: Report, noun: str) -> list[Given]:
    """What `ask` gives for each item, in their order, asked `concurrency` at a time; the first error ends it. The tasks are `concurrency`, however many items."""
    found: dict[int, Given] = {}
    waiting = iter(enumerate(items))

    async def work() -> None:
        for index, item in waiting:
            found[index] = await ask(item)
            report(f"{len(found)}/{len(items)} {noun}", len(found) / len(items))

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(items)))))
    return [found[index] for index in range(len(items))]
