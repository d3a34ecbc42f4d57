"""Two replicas: both follow every move; one is killed while moves go on and comes back converged; SIGTERM of one breaks no stream; `tuneserve status` is right throughout."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.registry import Version
from pipeline.version import DIGEST_TAG
from tests.acceptance.figures import percentile, show
from tests.acceptance.load import Plan, loading
from tests.acceptance.serving_environment import Server, World, engine_name, wait_until

MOVES = 20
CONVERGED_SECONDS = 2.0
"""After a replica is up again."""
STREAMS, STREAMED_TOKENS = 8, 500
RECIPE: dict[str, Any] = {"follow": ["catalog"], "drain_seconds": 60}


class Mover:
    """Moves the alias to and fro in a thread of its own."""

    def __init__(self, world: World, versions: tuple[Version, Version], pause_seconds: float) -> None:
        self.world, self.versions, self.pause_seconds = world, versions, pause_seconds
        self.moves = 0
        self.wanted = versions[0]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._done.wait(self.pause_seconds):
            self.moves += 1
            self.wanted = self.versions[self.moves % 2]
            self.world.set_alias(self.wanted)

    @contextmanager
    def moving(self) -> Iterator["Mover"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._done.set()
            self._thread.join(timeout=60)


def states(world: World, *servers: Server) -> tuple[int, list[str]]:
    """Exit code of `tuneserve status`, and what it says of each replica: `ok` if that is ready and serves, verified, what the registry wants."""
    code, answer = world.status(*servers)
    assert answer["ok"] == (code == 0)
    by_url = {replica["url"]: replica for replica in answer["replicas"]}
    return code, [state(by_url[server.url]) for server in servers]


def state(replica: dict[str, Any]) -> str:
    if replica["state"] != "ready":
        return str(replica["state"])
    model = replica["models"]["catalog"]
    return f"lagging: {model['code']}" if model["lagging"] else "ok" if model["verified"] else "not verified"


def follow_all(world: World, servers: tuple[Server, Server], versions: tuple[Version, Version]) -> list[float]:
    """Seconds from each of MOVES moves until both replicas had followed."""
    took = []
    for number in range(MOVES):
        version = versions[number % 2]
        _, set_at = world.set_alias(version)
        for server in servers:
            server.wait_live(version)
            assert server.answering("catalog") == engine_name(version)
        took.append(time.time() - set_at)
        time.sleep(0.37)  # so that moves meet the polls in every phase
    return took


def kill_and_return(world: World, server: Server, other: Server, versions: tuple[Version, Version]) -> tuple[Server, dict[str, float]]:
    """kill -9 of vLLM while moves go on; the replica that takes its place, and how long that took."""
    with Mover(world, versions, pause_seconds=5.0).moving() as mover:
        server.processes()[0].kill()
        server.process.communicate(timeout=60)
        assert server.process.returncode == 1  # the command says that vLLM ended, and ends
        assert states(world, server, other)[1][0] == "unreachable"
        back = world.start(server.recipe)
        start_seconds = back.wait_ready()
        up = time.monotonic()
        wait_until(lambda: back.is_live(mover.wanted), 30, lambda: f"{mover.wanted.label} live: {back.adapters()}", every=0.02)
        converged_seconds = time.monotonic() - up
        moves = mover.moves
    assert moves >= 3
    for each in (back, other):
        each.wait_live(mover.wanted)
    return back, {"start_seconds": start_seconds, "converged_seconds_after_start": converged_seconds, "moves_meanwhile": moves}


def broken_streams(server: Server, folder: Path) -> tuple[int, int, float]:
    """SIGTERM while STREAMS long answers run: how many ran, how many of them broke, and the seconds until the replica had ended."""
    with loading(Plan(server.url, clients=STREAMS, max_tokens=STREAMED_TOKENS, streaming=1.0, ignore_eos=True, rounds=1), folder) as load:
        in_flight = lambda: sum(version["in_flight"] for version in server.model("catalog")["versions"])  # noqa: E731
        wait_until(lambda: in_flight() == STREAMS, 30, lambda: f"{STREAMS} requests in flight: {in_flight()}")
        time.sleep(0.5)  # into the streams
        began = time.time()
        ended_seconds = server.end()
        answers = load.ended()
    running = [answer for answer in answers if answer.end > began]
    return len(running), sum(not answer.ok or answer.finish != "length" for answer in running), ended_seconds


def test_two_replicas(world: World, second: Version, tmp_path: Path) -> None:
    versions = (world.trained, second)
    world.set_alias(world.trained)
    seen: dict[str, Any] = {}
    with world.serving("two-a", **RECIPE) as one, world.serving("two-b", **RECIPE) as two:
        seen["both up"] = states(world, one, two)
        with loading(Plan(one.url, clients=2), tmp_path) as on_one, loading(Plan(two.url, clients=2), tmp_path) as on_two:
            took = follow_all(world, (one, two), versions)
            seen["after the moves"] = states(world, one, two)
            answers = on_two.stop()
            two_again, back = kill_and_return(world, two, one, versions)
            try:
                seen["one back"] = states(world, one, two_again)
                seen["a version that both refuse"] = refused(world, tmp_path, one, two_again)
                world.set_alias(second)
                for server in (one, two_again):
                    server.wait_live(second)
                streams, broken, ended_seconds = broken_streams(two_again, tmp_path)
                seen["one ended"] = states(world, one, two_again)
            finally:
                two_again.end()
            answers += on_one.stop()
    failed = [answer for answer in answers if not answer.ok]
    show(
        moves=MOVES,
        both_followed={"p50": percentile(took, 50), "max": max(took)},
        killed=back,
        streams=streams,
        broken=broken,
        ended_seconds=ended_seconds,
        requests=len(answers),
        failed=len(failed),
        status=seen,
    )
    assert failed == []
    assert back["converged_seconds_after_start"] <= CONVERGED_SECONDS
    assert (streams, broken) == (STREAMS, 0)
    assert seen["both up"] == seen["after the moves"] == seen["one back"] == (0, ["ok", "ok"])
    assert seen["a version that both refuse"] == (1, ["lagging: digest-mismatch"] * 2)
    assert seen["one ended"] == (0, ["ok", "unreachable"])


def refused(world: World, folder: Path, *servers: Server) -> tuple[int, list[str]]:
    """What status says while the alias points to a version that no replica takes; each goes on answering with the version before."""
    bad = world.variant("catalog", 0.35, folder / "bad")
    world.tag_version(bad, DIGEST_TAG, "0" * 64)
    before = [server.answering("catalog") for server in servers]
    world.set_alias(bad)
    for server in servers:
        wait_until(lambda server=server: server.model("catalog")["error"], 20, lambda server=server: f"refusal: {json.dumps(server.model('catalog'))}")
    found = states(world, *servers)
    assert [server.answering("catalog") for server in servers] == before
    return found
