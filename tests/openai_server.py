"""An OpenAI-compatible server that is stood in for on this machine: it streams answers token by token, at the pace and with the faults that a test says."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.replicas import listening

BASE = "glm-4.5v"


def nobody_fails(number: int) -> str | None:
    return None


@dataclass
class FakeOpenAI:
    """`adapters` maps names to what they stand for. `fails` says for the request of a number, from 1, how: an HTTP status, or `cut` (the stream breaks off), `error` (it says one), `empty`, `no-usage`."""

    adapters: dict[str, str] = field(default_factory=lambda: {"shop": "shop/2@bb", "shop/1": "shop/1@aa", "shop/2": "shop/2@bb"})
    first_seconds: float = 0.002
    token_seconds: Callable[[str], float] = lambda model: 0.0005
    fails: Callable[[int], str | None] = nobody_fails
    max_tokens: int | None = 2048
    key: str | None = None
    knows_ignore_eos: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    on_request: Callable[[int], None] = lambda number: None

    def cards(self) -> list[dict[str, Any]]:
        base = {"id": BASE, "root": BASE, "parent": None, "max_model_len": self.max_tokens}
        return [base, *({"id": name, "root": root, "parent": BASE} for name, root in self.adapters.items())]

    def parts(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As vLLM streams: the role, then each token, then the usage."""
        model, count = body["model"], body["max_tokens"] if self.knows_ignore_eos else 3
        said = {"object": "chat.completion.chunk", "model": self.adapters.get(model, model)}
        time.sleep(self.first_seconds)
        yield {**said, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        for number in range(count):
            if number:
                time.sleep(self.token_seconds(model))
            yield {**said, "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "length" if number == count - 1 else None}]}
        yield {**said, "choices": [], "usage": {"prompt_tokens": 300, "completion_tokens": count}}


def lines(server: FakeOpenAI, body: dict[str, Any], fault: str | None) -> Iterator[str]:
    for number, part in enumerate(server.parts(body)):
        if fault == "cut" and number == 3:
            return
        if fault == "error" and number == 3:
            yield 'data: {"error": {"message": "the engine is gone"}}\n\n'
            return
        if (fault == "empty" and part["choices"]) or (fault == "no-usage" and "usage" in part):
            continue
        yield f"data: {json.dumps(part)}\n\n"
    yield "data: [DONE]\n\n"


@contextmanager
def openai_server(server: FakeOpenAI) -> Iterator[str]:
    """The base URL at which `server` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # as uvicorn; else parts wait 40 ms for the acknowledgement of the one before

        def do_GET(self) -> None:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.say(401, {"error": "Unauthorized"})
            elif self.path == "/version":
                self.say(200, {"version": "0.26.0"})
            else:
                self.say(200, {"object": "list", "data": server.cards()})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            number = len(server.bodies)
            server.on_request(number)
            fault = server.fails(number)
            if fault and fault.isdecimal():
                self.say(int(fault), {"error": {"message": "no"}})
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has gone
                for line in lines(server, body, fault):
                    self.wfile.write(f"{len(line):x}\r\n{line}\r\n".encode())
                self.wfile.write(b"0\r\n\r\n")

        def say(self, status: int, said: object) -> None:
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    with listening(Handler) as url:
        yield url


def asked_models(server: FakeOpenAI) -> Sequence[str]:
    return [body["model"] for body in server.bodies]
