"""Evaluating keeps the server busy: answers a second of `evaluate` against those of a bare closed loop with the same requests, in turns on the same replica.

Run as a program it is one round in a process of its own: `python -m tests.acceptance.test_gate_throughput evaluate|loop URL MODEL` prints what came of it as JSON.
"""

import asyncio
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time

import httpx

from pipeline.dataset import read_examples
from pipeline.evaluation import CONCURRENCY, MAX_TOKENS, chat_body, evaluate, openai_messages
from pipeline.example import Example
from pipeline.progress import progress
from pipeline.project import Project
from tests.acceptance.figures import show
from tests.acceptance.load import CHAT, ROOT, connections
from tests.acceptance.serving_environment import Server, World, engine_name

EXAMPLES = 500
ROUNDS = ("evaluate", "loop", "loop", "evaluate")
MIN_RATIO = 0.9
ROUND_SECONDS = 600.0


def examples() -> list[Example]:
    """The catalog's held-out rows, and the first of them again."""
    rows = read_examples(ROOT / "data/catalog/eval.jsonl", Project(ROOT))
    return list(itertools.islice(itertools.cycle(rows), EXAMPLES))


def evaluated(url: str, model: str, asked: list[Example]) -> list[str]:
    """The model of each answer, asked as the command does."""
    with progress(f"asking {model}") as report:
        return [answer.model for answer in evaluate(url, model, asked, report).answers]


async def looped(url: str, bodies: list[bytes]) -> list[str]:
    """The model of each answer, in the order that they came."""
    models: list[str] = []
    waiting = iter(bodies)

    async def client(http: httpx.AsyncClient) -> None:
        for body in waiting:
            answer = await http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            models.append(answer.raise_for_status().json()["model"])

    async with connections(url) as http:
        await asyncio.gather(*(client(http) for _ in range(CONCURRENCY)))
    return models


def play(how: str, url: str, model: str) -> dict[str, object]:
    """One round: the seconds of asking and the CPU seconds that it took here. Bodies are built before the loop begins, and while `evaluate` asks.

    Starting up is not asking: what `evaluate` imports on first use, 1.5 CPU seconds of it, is imported before the clock starts.
    """
    importlib.import_module("openai.types.chat")
    asked = examples()
    bodies = [json.dumps(chat_body(model, openai_messages(example), MAX_TOKENS)).encode() for example in asked] if how == "loop" else []
    began, busy = time.monotonic(), time.process_time()
    models = asyncio.run(looped(url, bodies)) if how == "loop" else evaluated(url, model, asked)
    seconds, busy = time.monotonic() - began, time.process_time() - busy
    return {"how": how, "answers": len(models), "models": sorted(set(models)), "seconds": seconds, "cpu_seconds": busy}


def round_of(how: str, server: Server, model: str) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.acceptance.test_gate_throughput", how, server.url, model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ROUND_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_evaluation_keeps_the_server_busy(world: World) -> None:
    with world.serving("throughput", follow=["catalog"]) as server:
        server.promote(world.trained)
        round_of("loop", server, world.trained.label)  # so that all rounds find the same in the server's caches
        played = [round_of(how, server, world.trained.label) for how in ROUNDS]
    for each in played:
        assert (each["answers"], each["models"]) == (EXAMPLES, [engine_name(world.trained)])
    rates = {how: [each["answers"] / each["seconds"] for each in played if each["how"] == how] for how in ("evaluate", "loop")}
    ratio = statistics.median(rates["evaluate"]) / statistics.median(rates["loop"])
    cpu = {how: [each["cpu_seconds"] for each in played if each["how"] == how] for how in rates}
    show(examples=EXAMPLES, concurrency=CONCURRENCY, answers_per_second=rates, client_cpu_seconds=cpu, ratio=ratio)
    assert ratio >= MIN_RATIO


if __name__ == "__main__":
    print(json.dumps(play(*sys.argv[1:])))
