"""POST /adapters/parity: what this server makes of a chat prompt, and how likely base and adapter find a given answer. See parity.py for what it is held against.

The prompt goes the way of a chat request: vLLM's own renderer with its template and image processor, then the engine with prompt and answer as one prompt.
Each image gets a name of its own, so that no cache of processed images or of prefixes answers for them.
"""

import asyncio
import contextlib
import math
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Request
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError
from vllm.renderers.online_renderer import OnlineRenderer

from pipeline.reference import Logprobs, Replayed, digest_of
from pipeline.serving.engine import ServedAdapter
from pipeline.serving.traffic import Request as OpenRequest
from pipeline.serving.traffic import Traffic

MAX_BODY_BYTES = 4 * 2**20
MAX_ANSWER_TOKENS = 256
NOT_TAKEN = (VLLMClientError, ValueError, TemplateError)
"""What vLLM's renderer and engine raise for a prompt that is too long, has too many images, or does not fit the template."""
Score = Callable[[ServedAdapter | None, Any, list[int]], Awaitable[list[float]]]
"""Log-probabilities of an answer's tokens after a rendered prompt; `VllmEngine.score`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Part):
    type: Literal["text"]
    text: str


class Url(_Part):
    url: Annotated[str, Field(pattern=r"^data:(image/[a-z0-9.+-]+|application/octet-stream);base64,[A-Za-z0-9+/]+={0,2}$")]
    """Bytes only: this route fetches nothing from anywhere."""


class Image(_Part):
    type: Literal["image_url"]
    image_url: Url


class Turn(_Part):
    role: Literal["system", "user", "assistant"]
    content: tuple[Annotated[Text | Image, Field(discriminator="type")], ...]


class Asked(_Part):
    """The body. `model`: a served name (its champion), a version, or the base."""

    model: str
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=64)]
    answer_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_ANSWER_TOKENS)]


async def read_asked(request: Request) -> Asked:
    """The body of `request`. Raises HTTPException: 413 if it is too long, 422 if it is not what is asked for."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a prompt has at most {MAX_BODY_BYTES} bytes")
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        where, what = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise HTTPException(422, f"{where}: {what}") from error


class Replayer:
    """Answers one prompt at a time. Holds the adapter that is asked, as a request of a client would."""

    def __init__(self, renderer: OnlineRenderer, score: Score, traffic: Traffic) -> None:
        self._renderer, self._score, self._traffic = renderer, score, traffic
        self._one = asyncio.Lock()

    async def answer(self, asked: Asked, adapter: ServedAdapter | None) -> Replayed:
        """`adapter` None asks the base in its place too."""
        config = self._renderer.model_config
        server = {"digest": adapter.digest if adapter else None, "precision": str(config.dtype).removeprefix("torch."), "quantization": config.quantization}
        with self._held(adapter):
            async with self._one:
                try:
                    prompt = await self._render(asked)
                    base = await self._score(None, prompt, list(asked.answer_tokens))
                    own = await self._score(adapter, await self._render(asked), list(asked.answer_tokens))
                except NOT_TAKEN as error:
                    return Replayed(**server, refused=str(error)[:500])
        tokens = tuple(prompt["prompt_token_ids"])
        images = prompt["mm_kwargs"]["image"] if prompt["type"] == "multimodal" else ()
        decode = self._renderer.renderer.get_tokenizer().decode
        return Replayed(
            **server,
            prompt_tokens=tokens,
            pixels_in=next((str(image["pixel_values"].data.dtype).removeprefix("torch.") for image in images), ""),
            pixels=tuple(digest_of(image["pixel_values"].data.float().cpu().numpy()) for image in images),
            grids=tuple(tuple(image["image_grid_thw"].data.flatten().tolist()) for image in images),
            base=_finite(base),
            adapter=_finite(own),
            texts={token: decode([token]) for token in sorted({*tokens, *asked.answer_tokens})},
        )

    @contextlib.contextmanager
    def _held(self, adapter: ServedAdapter | None) -> Iterator[None]:
        """Keeps the adapter from being forgotten; nothing may be awaited between its choice and this."""
        request = OpenRequest(chosen=True, lora_id=adapter.lora_id if adapter else None)
        self._traffic.open(request)
        try:
            yield
        finally:
            self._traffic.close(request)

    async def _render(self, asked: Asked) -> Any:
        """The engine's input for the chat prompt, its images processed anew. Raises what of NOT_TAKEN the renderer raises, or ValueError."""
        messages = [turn.model_dump() for turn in asked.messages]
        for message in messages:
            message["content"] = [part | ({"uuid": f"tuneserve-{uuid.uuid4()}"} if part["type"] == "image_url" else {}) for part in message["content"]]
        rendered = await self._renderer.render_chat(ChatCompletionRequest(model=asked.model, messages=messages))
        if isinstance(rendered, ErrorResponse):
            raise ValueError(rendered.error.message)
        return rendered[1][0]


def _finite(values: list[float]) -> Logprobs:
    """JSON has no NaN."""
    return tuple(value if math.isfinite(value) else None for value in values)
