"""A promoted version that starts failing, or slows down, under `--watch` is rolled back within 15 s, and no request fails that began afterwards."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from pipeline.registry import Version
from tests.acceptance.figures import show
from tests.acceptance.load import Answer, Plan, loading
from tests.acceptance.serving_environment import World, engine_name, wait_until

FAULTS = Path(__file__).parent / "faults"
"""On a replica's PYTHONPATH: its sitecustomize.py reads the fault at each request."""
CHAMPION_SECONDS = 20.0
"""Of load before the promotion: what the version is compared with."""
HEALTHY_SECONDS = 15.0
"""Of the version under watch before the fault."""
AFTERWARDS_SECONDS = 10.0
WITHIN_SECONDS = 15.0
WAITS = 1.15
"""Of the slow version: so many of its own mean durations are waited before each answer, which makes it twice as slow: a little of the wait is gained again, since fewer
requests are under way at a time."""
SLOWER = (1.9, 2.3)
"""So many times as slow it must really have been."""


@dataclass(frozen=True)
class Fault:
    engine_name: str = ""
    fails_every: int = 0
    wait_seconds: float = 0.0

    def write(self, path: Path) -> float:
        """Unix time from when requests find it."""
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)), "utf-8")
        draft.replace(path)
        return time.time()


def mean_seconds(answers: list[Answer]) -> float:
    return sum(answer.seconds for answer in answers) / len(answers)


@pytest.mark.parametrize("kind", ["fails", "slows"])
def test_a_version_that_breaks_under_watch_is_rolled_back(world: World, second: Version, tmp_path: Path, kind: str) -> None:
    first, file = world.trained, tmp_path / "fault.json"
    Fault().write(file)
    python_path = os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": python_path, "TUNESERVE_TEST_FAULT": str(file)}
    with world.serving(f"watched-{kind}", environment, follow=["catalog"]) as server:
        server.promote(first)
        with loading(Plan(server.url, max_tokens=8, ignore_eos=True), tmp_path) as load:
            time.sleep(CHAMPION_SECONDS)
            watch = world.sandbox.start(
                "promote", second.label, "--force", "--watch", "2m", "--replica", server.url, "--json", MLFLOW_TRACKING_URI=world.mlflow
            )
            try:
                wait_until(lambda: server.is_live(second) or watch.poll() is not None, 120, f"{second.label} live")
                promoted = time.time()
                time.sleep(HEALTHY_SECONDS)
                assert watch.poll() is None, watch.communicate()
                healthy = [answer for answer in load.answers() if answer.start > promoted and answer.model == engine_name(second)]
                fault = Fault(engine_name(second), 2) if kind == "fails" else Fault(engine_name(second), wait_seconds=WAITS * mean_seconds(healthy))
                injected = fault.write(file)
                wait_until(lambda: server.is_live(first), 60, lambda: f"{first.label} live again: {server.model('catalog')}")
                back = time.time()
                out, err = watch.communicate(timeout=60)
            finally:
                watch.kill()
            time.sleep(AFTERWARDS_SECONDS)
            answers = load.stop()
    newest = world.json("history", "catalog", "--json")["entries"][0]
    faulty = [answer for answer in answers if injected <= answer.start < back and (answer.model == engine_name(second) or not answer.ok)]
    later = [answer for answer in answers if answer.start > back]
    show(
        fault=kind,
        seconds_until_rolled_back=back - injected,
        seconds_until_rollback_began=newest["at"] - injected,
        requests={"healthy": len(healthy), "faulty": len(faulty), "afterwards": len(later)},
        failed={"before": sum(not answer.ok for answer in answers if answer.end < injected), "faulty": sum(not answer.ok for answer in faulty)},
        failed_afterwards=sum(not answer.ok for answer in later),
        mean_seconds={"healthy": mean_seconds(healthy), "faulty": mean_seconds(faulty), "afterwards": mean_seconds(later)},
        said=json.loads(out.splitlines()[-1])["errors"][0]["message"],
    )
    assert watch.returncode == 1 and f"It is rolled back to {first.label}" in out, err
    # From the promotion on: before, two clients may meet over a picture that is new to the server, which vLLM answers with a 500 that says "try again".
    assert all(answer.ok for answer in answers if promoted <= answer.start and answer.end < injected)
    assert back - injected <= WITHIN_SECONDS
    assert later and all(answer.ok and answer.model == engine_name(first) for answer in later)
    assert (newest["action"], newest["version"], newest["after"]) == ("rolled-back", first.version, first.version)
    assert newest["reasons"].startswith("rolled back by the watch: ") and ("failing" if kind == "fails" else "slow") in newest["reasons"]
    slower = mean_seconds(faulty) / mean_seconds(healthy)
    assert any(not answer.ok for answer in faulty) if kind == "fails" else SLOWER[0] <= slower <= SLOWER[1], slower
