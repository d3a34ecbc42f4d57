"""Replicas that are stood in for at their HTTP boundary: they do what a small registry says, or fail as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from pipeline.fleet import Fleet
from pipeline.serving.hint import HintCheck

TOKEN = "secret"


def served(version: str, digest: str, **more: Any) -> dict[str, Any]:
    return {"version": version, "digest": digest, "engine_name": f"shop/{version}@{digest[:8]}", "loaded_at": "2026-01-01T00:00:00Z", **more}


def model(wanted: dict[str, Any] | None = None, live: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A model's part of a status, as docs of GET /adapters have it; what is live is verified."""
    verified = {"differs_by": 3.0, "noise": 0.0, "others_moved_by": 0.0, "modules": 16, "seconds": 0.2}
    versions = [{**live, "role": "champion", "in_flight": 0, "verified": verified, "fault": None}] if live else []
    said = {"wanted": wanted, "live": live, "candidate": None, "versions": versions, "refused": [], "disabled": {"model": None, "versions": {}}}
    return {**said, "error": None, "code": None, "something_new": 1, **more}


@dataclass
class FakeReplica:
    """`models` gives the models' parts of its status at each call; `away` makes it unreachable, `ready` and `token` are its own."""

    models: Callable[[], dict[str, Any]]
    ready: bool = True
    away: bool = False
    token: str = TOKEN
    extra: dict[str, Any] = field(default_factory=dict)
    hints: list[dict[str, Any]] = field(default_factory=list)
    on_hint: Callable[[], None] = lambda: None
    answers: int | None = None
    """A status code that it always answers with."""
    counted: Callable[[], bytes] = lambda: b""
    """Its /metrics, at each look."""

    def __post_init__(self) -> None:
        self.check = HintCheck(self.token)

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if method == "POST":
            if fault := self.check.fault(headers, body):
                return 401, {"detail": fault}
            self.hints.append(json.loads(body)["data"])
            self.on_hint()
        if self.answers:
            return self.answers, {"detail": "no"}
        if path == "/metrics":
            return 200, self.counted()
        if method == "GET" and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"detail": "no"}
        waits_for = {} if self.ready else {"shop": "no champion yet"}
        if path == "/adapters/ready":
            return (200 if self.ready else 503), {"ready": self.ready, "waits_for": waits_for}
        slots = {"max_loras": 4, "max_cpu_loras": 16, "resident": 1, "forgetting": 0, "misses": 0, "waits": 0}
        said = {"ready": self.ready, "waits_for": waits_for, "base_models": ["glm-4.5v"], "pid": 1, "last_sync_age_seconds": 0.4, "mlflow_error": None}
        return 200, {**said, "slots": slots, "cache": {"folders": 1, "bytes": 5, "limit_bytes": 9}, "models": self.models(), **self.extra}


def fleet_of(replicas: dict[str, FakeReplica], **options: Any) -> Fleet:
    """A fleet that asks these, by URL, without a network."""

    def handle(request: httpx.Request) -> httpx.Response:
        replica = replicas[str(request.url.copy_with(path="")).rstrip("/")]
        if replica.away:
            raise httpx.ConnectError("Connection refused", request=request)
        status, body = replica.answer(request.method, request.url.path, request.headers, request.content)
        return httpx.Response(status, content=body) if isinstance(body, bytes) else httpx.Response(status, json=body)

    return Fleet(list(replicas), TOKEN, client=httpx.Client(transport=httpx.MockTransport(handle)), **options)


@contextmanager
def http_server(answer: Callable[[str, str, Any, bytes], tuple[int, Any]]) -> Iterator[str]:
    """The base URL of a server on this machine that gives these answers, as JSON or, bytes, as they are."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, said = answer(self.command, self.path, self.headers, body)
            text = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            with suppress(BrokenPipeError):  # whoever asked has gone
                self.wfile.write(text)

        do_GET = do_POST = do

        def log_message(self, *_: object) -> None: ...

    with listening(Handler) as url:
        yield url


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The base URL of a server on this machine whose requests `handler` handles, each in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
