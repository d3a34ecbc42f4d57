"""Our three hooks into vLLM 0.32, all of them here; tests/serving/test_vllm_contract.py pins what they rely on.

- `BaseServing._maybe_get_adapters`, replaced in its class: sees the model that a request names and its `user`, and chooses the adapter.
- `engine_client.generate`, replaced on the instance: sees every generation, its adapter, first output and final metrics.
- an ASGI middleware: sees every HTTP request's arrival, one header, and its status; of those that are sampled (sampling.py) body and answer too. What the engine drops
  before a first token it asks for once more (Attempts).

What one knows of a request reaches the others through a ContextVar: vLLM's handlers run in the context of the request's own task.
"""

import functools
import random
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

from pipeline.serving.engine import ServedAdapter
from pipeline.serving.metrics import BASE_VERSION, UNKNOWN, Metrics
from pipeline.serving.routing import Route, SwitchedOff, choose
from pipeline.serving.sampling import Sampler
from pipeline.serving.traffic import Request, Traffic

REQUEST: ContextVar[Request | None] = ContextVar("tuneserve request", default=None)
MAX_KEY_CHARACTERS = 512
"""Of a caller's name, as far as it decides the caller's side."""


def lora_request(adapter: ServedAdapter) -> LoRARequest:
    return LoRARequest(lora_name=adapter.engine_name, lora_int_id=adapter.lora_id, lora_path=str(adapter.folder), is_3d_lora_weight=adapter.fused_experts)


class NameTable:
    """vLLM's table of names (`OpenAIServingModels.lora_requests`), filled from our routes. Each change takes effect for the next request."""

    def __init__(self, models: OpenAIServingModels) -> None:
        self._models = models
        self._routes: dict[str, Route] = {}
        self._requests: dict[str, LoRARequest] = {}
        """By name in the engine: made once, not per request."""

    def set(self, model: str, routes: Mapping[str, Route]) -> None:
        """`routes` are from now on all names of `model`."""
        table = self._models.lora_requests
        for name in [name for name, route in self._routes.items() if route.name == model and name not in routes]:
            del self._routes[name]
            table.pop(name, None)
        for name, route in routes.items():
            self._routes[name] = route
            table[name] = self.request(route.adapter)
        adapters = [each for route in self._routes.values() for each in (route.adapter, route.candidate, route.fallback) if isinstance(each, ServedAdapter)]
        self._requests = {adapter.engine_name: self.request(adapter) for adapter in adapters}

    def get(self, name: str | None) -> Route | None:
        return self._routes.get(name) if name else None

    def request(self, adapter: ServedAdapter) -> LoRARequest:
        return self._requests.get(adapter.engine_name) or lora_request(adapter)


class Attempts:
    """One HTTP request that can be asked twice: its body is kept, and its answer's start held back, until the answer's first part.

    vLLM's API process keeps a list of the pictures that its engine has, and sends such a picture's name only. The two lists can disagree: two callers send one new picture
    at a time and the second overtakes the first, or a caller goes away before the engine got the picture. The engine then drops the request, vLLM answers 500 and mends its
    list ("the client resends").
    """

    def __init__(self, request: Request, receive: Receive, send: Send) -> None:
        self._request, self._receive, self._send = request, receive, send
        self._kept: list[Message] = []
        self._again: list[Message] = []
        self._start: Message | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        await app(dict(scope), self._heard, self._said)
        if self._request.dropped:
            self._start, self._again, self._kept = None, self._kept, []
            self._request.ask_again()
            await app(dict(scope), self._heard, self._said)

    async def _heard(self) -> Message:
        if self._again:
            return self._again.pop(0)
        message = await self._receive()
        if message["type"] == "http.request" and self._request.may_ask_again:
            self._kept.append(message)
        return message

    async def _said(self, message: Message) -> None:
        if self._request.dropped:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start:
            start, self._start = self._start, None
            self._request.may_ask_again = False
            self._kept.clear()
            await self._send(start)
        await self._send(message)


class Tracing:
    """The middleware. POST requests only: nothing else generates."""

    def __init__(self, app: ASGIApp, traffic: Traffic, metrics: Metrics, sticky_header: str | None, sampler: Sampler | None = None) -> None:
        self._app, self._traffic, self._metrics, self._sampler = app, traffic, metrics, sampler
        self._header = sticky_header.lower().encode() if sticky_header else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        traffic = self._traffic
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith("/adapters"):
            await self._app(scope, receive, send)
            return
        key = next((value for name, value in scope["headers"] if name == self._header), None) if self._header else None
        request = Request(key=key.decode("latin-1")[:MAX_KEY_CHARACTERS] if key else None)
        REQUEST.set(request)
        traffic.open(request)
        status = 0
        recording = self._sampler.begin(scope["path"]) if self._sampler else None

        async def heard() -> Message:
            message = await receive()
            if recording:
                recording.heard(message)
            return message

        async def seen(message: Message) -> None:
            nonlocal status
            if recording:
                recording.said(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= HTTPStatus.BAD_REQUEST:
                    self._metrics.http_error(request, status)
            await send(message)

        try:
            await Attempts(request, heard if recording else receive, seen).run(self._app, scope)
        except Exception:
            if not status:
                self._metrics.http_error(request, HTTPStatus.INTERNAL_SERVER_ERROR)
            raise
        finally:
            traffic.close(request)
            if recording:
                recording.end(request, status)


def install(app: FastAPI, traffic: Traffic, metrics: Metrics, sticky_header: str | None, sampler: Sampler | None = None) -> None:
    """Adds the middleware; while the application is being built."""
    app.add_middleware(Tracing, traffic=traffic, metrics=metrics, sticky_header=sticky_header, sampler=sampler)


def choose_adapters(names: NameTable, models: OpenAIServingModels) -> None:
    """Has every request that vLLM serves choose its adapter by our routes."""
    original = getattr(BaseServing._maybe_get_adapters, "__wrapped__", BaseServing._maybe_get_adapters)

    @functools.wraps(original)
    def choose_adapter(serving: BaseServing, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        ours = REQUEST.get()
        route = names.get(request.model) if serving.models is models else None
        if route is None:
            if ours:
                ours.chosen, ours.served, ours.version = True, models.base_model_paths[0].name, BASE_VERSION
            found: LoRARequest | None = original(serving, request, *args, **kwargs)
            return found
        if ours:
            ours.served, ours.by_name = route.name, request.model == route.name
        try:
            adapter = choose(route, _caller(request, ours), _drawn(ours))
        except SwitchedOff as error:
            raise GracefulHTTPError(str(error), HTTPStatus.FORBIDDEN) from error
        if ours:
            ours.chosen = True
            ours.lora_id, ours.version = (adapter.lora_id, adapter.version) if adapter else (None, BASE_VERSION)
        return names.request(adapter) if adapter else None

    BaseServing._maybe_get_adapters = choose_adapter


def _caller(request: Any, ours: Request | None) -> str | None:
    user = getattr(request, "user", None)
    return str(user)[:MAX_KEY_CHARACTERS] if user else (ours.key if ours else None)


def _drawn(ours: Request | None) -> float:
    if ours is None:
        return random.random()
    if ours.drawn is None:
        ours.drawn = random.random()
    return ours.drawn


Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


def watch_generations(engine_client: EngineClient, traffic: Traffic, metrics: Metrics) -> Generate:
    """Has every generation counted and measured; returns the engine's own `generate`, for what is not to be."""
    original: Generate = engine_client.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        lora: LoRARequest | None = kwargs.get("lora_request")
        request = REQUEST.get() or Request(chosen=True)
        watched = _Generation(request, lora, traffic, metrics)
        outputs = watched.outputs(original(*args, **kwargs))
        # A generator that nobody begins to read runs none of its code, not even its `finally`.
        weakref.finalize(outputs, watched.end)
        return outputs

    engine_client.generate = generate
    return original


class _Generation:
    """One call of generate, from the call to its end, however it ends."""

    def __init__(self, request: Request, lora: LoRARequest | None, traffic: Traffic, metrics: Metrics) -> None:
        self._request, self._traffic, self._metrics = request, traffic, metrics
        self._lora_id = lora.lora_int_id if lora else None
        self._served, self._version = request.served, request.version
        self._ended = False
        self._failure: str | None = None
        self._last: RequestOutput | None = None
        self._output_tokens = 0
        if self._lora_id is not None:
            misses, waits = traffic.enter(self._lora_id)
            if misses:
                metrics.slot_misses.labels(self._served, self._version).inc()
            if waits:
                metrics.slot_waits.labels(self._served, self._version).inc()
            metrics.used(self._lora_id, self._served, self._version)

    async def outputs(self, original: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
        try:
            async for output in original:
                self._last = output
                self._output_tokens += sum(len(each.token_ids) for each in output.outputs)
                if self._request.may_ask_again and not self._output_tokens and any(each.finish_reason == "error" for each in output.outputs):
                    self._request.dropped = True
                yield output
        except GeneratorExit:
            await original.aclose()
            raise
        except Exception as error:
            self._failure = "error" if create_error_response(error).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid"
            raise
        finally:
            self.end()

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._lora_id is not None:
            self._traffic.leave(self._lora_id)
        last, request, labels = self._last, self._request, (self._served, self._version)
        if self._served == UNKNOWN:  # not an HTTP request of ours to tell of
            return
        finish = next((each.finish_reason for each in last.outputs if each.finish_reason), None) if last else None
        if request.dropped:
            return  # its second attempt counts
        prompt_tokens = len(last.prompt_token_ids or ()) if last else 0
        self._metrics.finished(*labels, self._failure or finish or "abort", prompt_tokens, self._output_tokens)
        stats = last.metrics if last else None
        if stats and stats.first_token_latency:
            self._metrics.engine_first_token.labels(*labels).observe(stats.first_token_latency)
            self._metrics.first_token.labels(*labels).observe(max(0.0, stats.arrival_time - request.arrived_wall) + stats.first_token_latency)
            if stats.num_generation_tokens > 1 and stats.last_token_ts > stats.first_token_ts:
                self._metrics.per_token.labels(*labels).observe((stats.last_token_ts - stats.first_token_ts) / (stats.num_generation_tokens - 1))
        if finish:
            self._metrics.request.labels(*labels).observe(time.monotonic() - request.arrived)
