"""300 promotions of distinct versions under traffic: memory of both processes, file descriptors, threads and /metrics stay flat, the cache within its limit."""

import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.figures import show
from tests.acceptance.load import Plan, loading
from tests.acceptance.serving_environment import Server, World, wait_until

PROMOTIONS = 300
FIRST = 30
"""Promotions after which everything has the size that it keeps."""
SAMPLES = 10
"""Promotions over which each figure's median is taken, after the first and before the last."""
MAX_GROWTH = 1.05
FLAT = 1.02
CACHED = 20
"""Adapters that the cache holds."""
RECIPE: dict[str, Any] = {"follow": ["stream"], "poll_seconds": 0.25, "forget_after_seconds": 2}


@dataclass(frozen=True)
class Sample:
    api_bytes: int
    engine_bytes: int
    descriptors: int
    threads: int
    metrics_bytes: int
    cache_bytes: int
    disk_bytes: int
    resident: int


def sample(server: Server) -> Sample:
    api, engine = server.processes()
    status = server.adapters()
    return Sample(
        api.memory_info().rss,
        engine.memory_info().rss,
        api.num_fds() + engine.num_fds(),
        api.num_threads() + engine.num_threads(),
        len(server.http.get("/metrics", follow_redirects=True).raise_for_status().content),
        status["cache"]["bytes"],
        bytes_below(server.folder("")),
        status["slots"]["resident"],
    )


def bytes_below(folder: Path) -> int:
    """Of all files, less those that go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def median(samples: list[Sample], figure: str) -> float:
    return statistics.median(getattr(each, figure) for each in samples)


def test_memory_stays_flat_over_300_promotions(world: World, tmp_path: Path) -> None:
    versions = world.variants("stream", [0.3 + 0.002 * number for number in range(PROMOTIONS)], tmp_path)
    size = sum(file.stat().st_size for file in world.adapter.glob("adapter_*"))
    world.set_alias(versions[0])
    samples: list[Sample] = []
    began = time.monotonic()
    with world.serving("memory", adapter_cache_gib=CACHED * size / 2**30, **RECIPE) as server:
        with loading(Plan(server.url, models=("stream",), clients=2), tmp_path) as load:
            for version in versions:
                server.promote(version, seconds=60)
                samples.append(sample(server))
            answers = load.stop()
        seconds = time.monotonic() - began
        limit = server.adapters()["cache"]["limit_bytes"]
        wait_until(lambda: server.adapters()["slots"]["resident"] <= 2, 60, lambda: f"champion and previous loaded alone: {server.adapters()['slots']}")
    failed = [answer for answer in answers if not answer.ok]
    first, last = samples[FIRST : FIRST + SAMPLES], samples[-SAMPLES:]
    growth = {figure: median(last, figure) / median(first, figure) for figure in ("api_bytes", "engine_bytes", "metrics_bytes")}
    more = {figure: median(last, figure) - median(first, figure) for figure in ("descriptors", "threads")}
    show(
        promotions=len(samples),
        seconds=seconds,
        requests=len(answers),
        failed=len(failed),
        growth=growth,
        more=more,
        api_mib=[median(part, "api_bytes") / 2**20 for part in (first, last)],
        engine_mib=[median(part, "engine_bytes") / 2**20 for part in (first, last)],
        metrics_bytes=[median(part, "metrics_bytes") for part in (first, last)],
        cache={"limit": limit, "most": max(each.cache_bytes for each in samples), "most_on_disk": max(each.disk_bytes for each in samples)},
        most_resident=max(each.resident for each in samples),
    )
    assert failed == []
    assert growth["api_bytes"] <= MAX_GROWTH and growth["engine_bytes"] <= MAX_GROWTH
    assert growth["metrics_bytes"] <= FLAT
    assert max(more.values()) <= 2  # a connection that happens to be open, a worker thread
    assert max(each.cache_bytes for each in samples) <= limit
    assert max(each.disk_bytes for each in samples) <= limit + 2 * size  # one more while it is fetched, before room is made
