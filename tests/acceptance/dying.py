"""`tuneserve` in a process that is killed, as by kill -9, right after its STEPth change of what others see: `python -m tests.acceptance.dying STEP OUT ARGS...`.

A step is a request that changes MLflow, or a hint to a replica. OUT gets a line per step. STEP 0 kills before the first one.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests

from pipeline.cli import main

READS = re.compile(r"/(get|search|list|get-[a-z-]+|alias|download-uri)$")
"""How the paths of MLflow's requests end that read; `alias` is also written, by other methods than GET."""


def is_step(method: str, url: str) -> bool:
    path = urlsplit(url).path
    if path.endswith("/adapters/sync"):
        return True
    return "/mlflow" in path and method != "GET" and not (method == "POST" and READS.search(path) and not path.endswith("/alias"))


def die_after(last: int, out: Path) -> None:
    """Has every step counted, and the process killed after the `last` one."""
    done = 0

    def watched(original: Callable[..., Any], describe: Callable[..., tuple[str, str]]) -> Callable[..., Any]:
        def send(client: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal done
            step = is_step(*describe(request))
            if step and done >= last:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = original(client, request, *args, **kwargs)
            if step:
                done += 1
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(" ".join(describe(request)) + "\n")
                if done >= last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return send

    requests.Session.send = watched(requests.Session.send, lambda request: (request.method, request.url))  # type: ignore[method-assign]
    httpx.Client.send = watched(httpx.Client.send, lambda request: (request.method, str(request.url)))  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv[1]), Path(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    main()
