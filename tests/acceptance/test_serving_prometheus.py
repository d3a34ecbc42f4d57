"""Debian's Prometheus scrapes two replicas; one query gives each version's p95 time to first token."""

import contextlib
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipeline.registry import Version
from pipeline.services import free_port
from tests.acceptance.figures import percentile, show
from tests.acceptance.load import Plan, loading
from tests.acceptance.serving_environment import Server, World, connection, engine_name, wait_until

QUERY = "histogram_quantile(0.95, sum by (le, version) (rate(tuneserve_time_to_first_token_seconds_bucket[1m])))"
SERIES = (
    "tuneserve_requests_total",
    "tuneserve_time_to_first_token_seconds_bucket",
    "tuneserve_engine_time_to_first_token_seconds_bucket",
    "tuneserve_time_per_output_token_seconds_bucket",
    "tuneserve_request_seconds_bucket",
)
SECONDS = 25.0
"""Of traffic to each version."""


@contextlib.contextmanager
def scraping(folder: Path, *servers: Server) -> Iterator[httpx.Client]:
    """A Prometheus of our own that scrapes the replicas every second."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.fail("no prometheus on the PATH; install Debian's: apt-get install --no-install-recommends prometheus")
    targets = [server.url.removeprefix("http://") for server in servers]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": "tuneserve", "static_configs": [{"targets": targets}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    address = f"127.0.0.1:{free_port(0)}"
    command = [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with connection(f"http://{address}") as http:
            wait_until(lambda: is_up(http, process), 60, f"Prometheus up; its log is {folder / 'prometheus.log'}")
            yield http
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_up(http: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus ended"
    try:
        return http.get("/-/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def query(http: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = http.get("/api/v1/query", params={"query": expression}).raise_for_status().json()
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def test_prometheus_tells_each_versions_time_to_first_token(world: World, second: Version, tmp_path: Path) -> None:
    versions = (world.trained, second)
    world.set_alias(world.trained)
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(world.serving(name, follow=["catalog"])) for name in ("scraped-a", "scraped-b"))
        http = stack.enter_context(scraping(tmp_path, one, two))
        loads = [stack.enter_context(loading(Plan(server.url, clients=2, streaming=1.0), tmp_path)) for server in (one, two)]
        for version in versions:
            world.set_alias(version)
            for server in (one, two):
                server.wait_live(version)
            time.sleep(SECONDS)
        p95 = {each["metric"]["version"]: float(each["value"][1]) for each in query(http, QUERY)}
        up = [float(each["value"][1]) for each in query(http, "up")]
        series = {name: len(query(http, f"count by (instance, served, version) ({name})")) for name in SERIES}
        counted = {each["metric"]["version"]: float(each["value"][1]) for each in query(http, 'sum by (version) (tuneserve_requests_total{served="catalog"})')}
        answers = [answer for load in loads for answer in load.stop()]
    by_client = {
        version.version: percentile([answer.first - answer.start for answer in answers if answer.first and answer.model == engine_name(version)], 95)
        for version in versions
    }
    show(p95_by_prometheus=p95, p95_by_client=by_client, up=up, series=series, requests_by_prometheus=counted, requests_by_client=len(answers))
    assert all(answer.ok for answer in answers)
    assert up == [1.0, 1.0]
    for version in versions:
        assert math.isfinite(p95[version.version]) and p95[version.version] > 0
        assert counted[version.version] > 0
    assert all(count >= 2 * len(versions) for count in series.values()), "each replica tells each version"
