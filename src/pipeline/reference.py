"""What training leaves with a version to hold served answers against (`parity.json`, made by swift_parity.py), and what a replica says of the same prompts.

A reference holds a few prompts with their pictures, the tokens and pixels that ms-swift made of them, and the log-probabilities (natural log) that transformers and PEFT
gave a fixed answer's tokens, for the base and for the adapter. parity.py compares the two.
"""

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pipeline.errors import AdapterInvalid
from pipeline.example import IMAGE_TAG

if TYPE_CHECKING:
    import numpy as np

REFERENCE_FILE = "parity.json"
MAX_REFERENCE_BYTES = 4 * 2**20
"""Ours stay below 2 MB."""
Precision = Literal["float32", "bfloat16"]
Logprobs = tuple[float | None, ...]
"""Of an answer's tokens, each after all before it; None where there is no finite number."""


def digest_of(values: "np.ndarray[Any, Any]") -> str:
    """SHA-256 in hex over shape and float32 values (little endian, C order) of processed pixels: equal where every number is equal. One definition for both sides."""
    whole = (values + 0).astype("<f4")  # + 0: the two zeros are one number
    return hashlib.sha256(repr(tuple(int(size) for size in whole.shape)).encode() + whole.tobytes("C")).hexdigest()


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(_Part):
    """A turn; each `<image>` in a user's stands for the prompt's next picture."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(_Part):
    """A prompt and the answer whose log-probabilities are looked at."""

    kind: str
    """`one image`, `text`, ...: its name in what is said of it."""
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    """Digests; the pictures stand beside the questions."""
    answer: str
    composed: bool = False
    """Put together from rows; no held-out row is of this kind, so that a server need not take it."""

    def openai_messages(self, pictures: Mapping[str, str]) -> list[dict[str, Any]]:
        """For the chat API, each picture as a data URL; `pictures` by digest, in base64."""
        images = iter(self.images)
        messages = []
        for message in self.messages:
            parts: list[dict[str, Any]] = []
            for index, text in enumerate(message.content.split(IMAGE_TAG) if message.role == "user" else [message.content]):
                url = f"data:application/octet-stream;base64,{pictures[next(images)]}" if index else ""
                parts += [{"type": "image_url", "image_url": {"url": url}}] if index else []
                parts += [{"type": "text", "text": text}] if text else []
            messages.append({"role": message.role, "content": parts})
        return messages


class Expected(Question):
    """What training made of a question."""

    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    """With the token that ends the answer, unless that was cut."""
    pixels: tuple[Mapping[str, str], ...]
    """Of each image, `digest_of` its pixels in each form in which a server may hand them to its model: as ms-swift does (float32), rounded (bfloat16), and as they
    are before they are normalized (uint8), which is how vLLM 0.32 does for GLM-4.5V: it normalizes in the model."""
    grids: tuple[tuple[int, int, int], ...]
    """Of each image: patches in time, height and width."""
    base: Logprobs
    adapter: Logprobs

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not (self.prompt_tokens and len(self.answer_tokens) == len(self.base) == len(self.adapter) > 0):
            raise ValueError(f"{self.kind}: not one log-probability for each token of an answer")
        if not len(self.images) == len(self.pixels) == len(self.grids):
            raise ValueError(f"{self.kind}: not one grid and one set of pixels for each image")
        return self


class Reference(_Part):
    """`parity.json`: what training saw, for one adapter on one base. Holds all that replaying needs, pictures included."""

    adapter_digest: str
    base_revision: str
    template_digest: str
    precision: Precision
    device: str
    versions: Mapping[str, str]
    """Of the libraries that made it."""
    prompts: tuple[Expected, ...]
    images: Mapping[str, str]
    """Picture files in base64, by SHA-256 of their bytes."""
    texts: Mapping[int, str]
    """What each token stands for, for whoever reads where they differ."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.prompts:
            raise ValueError("holds no prompt")
        for digest, picture in self.images.items():
            if hashlib.sha256(base64.b64decode(picture, validate=True)).hexdigest() != digest:
                raise ValueError(f"picture {digest[:12]} is not the one of that digest")
        if missing := {image for prompt in self.prompts for image in prompt.images} - self.images.keys():
            raise ValueError(f"picture {min(missing)[:12]} is missing")
        return self

    @property
    def effect(self) -> float:
        """How far the adapter moves the answers' log-probabilities at most; where that is less than the tolerance, a lost adapter would not be noticed."""
        return max((gap(*pair) for prompt in self.prompts for pair in zip(prompt.base, prompt.adapter, strict=True)), default=0.0)


class Replayed(_Part):
    """What a replica made of a question."""

    digest: str | None = None
    """Of the adapter that answered; None is the base."""
    precision: str = ""
    """Of activations, and of weights that are not quantized."""
    quantization: str | None = None
    """Of the served base's weights."""
    refused: str | None = None
    """Why it does not take the prompt; then all else is empty."""
    prompt_tokens: tuple[int, ...] = ()
    pixels_in: str = ""
    """The form of the pixels: uint8, float32 or bfloat16."""
    pixels: tuple[str, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    base: Logprobs = ()
    adapter: Logprobs = ()
    texts: Mapping[int, str] = {}


def read_reference(text: str, label: str) -> Reference:
    """The reference in `text`, a version's parity.json. Raises AdapterInvalid if it is none."""
    try:
        return Reference.model_validate_json(text)
    except ValidationError as error:
        where, what = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise AdapterInvalid(f"{label}: its {REFERENCE_FILE} is not a reference ({where}: {what}); train it again") from error


def gap(one: float | None, other: float | None) -> float:
    """Infinite where one is no finite number: what is not a number never passes."""
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other)
