"""A scheduled retraining whose parts are killed, on production's servers: each kind of victim in several stages, one cell after the other, seeded.

After each kill the victim is started again, as whatever keeps servers up would do, and the run, if it did not survive, is made again. Then all must be as if
nothing had happened: one new version, trained once and promoted once, verified on both replicas, nothing left running, no place held, and no failed request on
the replica that was not killed. Each cell is a line of .tuneserve/chaos/SEED.jsonl; those that are there and went well are not done again.
"""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pipeline.history import history
from pipeline.journal import FILE
from pipeline.project import Project
from pipeline.registry import Registry
from pipeline.version import TRIAL
from tests.acceptance.figures import percentile, show
from tests.acceptance.production_environment import MLFLOW, POSTGRESQL, PREFECT, WORKER, Production, production
from tests.acceptance.small_retraining import write_recipe, write_rows
from tests.e2e.environment import ROOT

pytestmark = pytest.mark.timeout(6 * 3600)
SEED = int(os.environ.get("CHAOS_SEED", "7"))
NAME, SURVIVOR, REPLICA = "catalog", "replica-1", "replica-2"
FLOW, SWIFT = "flow", "swift group"
STAGES = ("compare", "train", "reference", "register", "gate", "promote")
SWIFT_STAGES = ("load", "train", "reference")
"""Only then is there such a process."""
EACH = 3
"""Cells of a victim."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
STAGE_SECONDS, RUN_SECONDS, SETTLE_SECONDS = 600.0, 900.0, 120.0
RUNS = 3
"""How often a cell's run may be made."""


@dataclass(frozen=True)
class Cell:
    stage: str
    victim: str

    @property
    def key(self) -> str:
        return f"{self.victim} in {self.stage}"


def cells() -> list[Cell]:
    """EACH of every victim, and every stage as often as any other; in an order of the dice."""
    dice = random.Random(SEED)
    victims = [WORKER, FLOW, MLFLOW, PREFECT, POSTGRESQL, REPLICA]
    stages = list(STAGES)
    dice.shuffle(victims)
    dice.shuffle(stages)
    found = [Cell(stages[(number + offset) % len(stages)], victim) for number, victim in enumerate(victims) for offset in (0, 2, 4)]
    found += [Cell(stage, SWIFT) for stage in SWIFT_STAGES]
    dice.shuffle(found)
    return found


@dataclass
class Load:
    """Requests to one replica, one after the other."""

    site: Production
    asked: int = 0
    failed: list[str] = field(default_factory=list)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(0.5):
                body = {"model": NAME, "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 4, "temperature": 0}
                self.asked += 1
                try:
                    answer = self.site.ask_replica(SURVIVOR, "/v1/chat/completions", **body)
                    if answer.status_code != httpx.codes.OK:
                        self.failed.append(f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))

        client = threading.Thread(target=ask)
        client.start()
        try:
            yield
        finally:
            ended.set()
            client.join()


@dataclass
class Chaos:
    site: Production
    registry: Registry
    turn: int = 1
    """Which rows are there: no two cells have the same."""
    restarted: list[str] = field(default_factory=list)

    @property
    def project(self) -> Project:
        return Project(self.site.sandbox.root)

    # Prefect

    def prefect(self, method: str, path: str, **body: Any) -> Any:
        answer = httpx.request(method, f"{self.site.prefect}/{path}", json=body or None, timeout=30, trust_env=False)
        return answer.raise_for_status().json()

    def deployment(self) -> Any:
        return self.prefect("GET", "deployments/name/retrain/chaos")

    def slots(self) -> int:
        return int(self.prefect("GET", f"v2/concurrency_limits/{self.deployment()['global_concurrency_limit']['id']}")["active_slots"])

    def new_run(self) -> str:
        """Asks until the server, which may just have been started again, takes it."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return str(self.prefect("POST", f"deployments/{self.deployment()['id']}/create_flow_run", state={"type": "SCHEDULED"})["id"])
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(1)

    def state(self, run: str) -> str:
        """'' while the server cannot say."""
        try:
            return str(self.prefect("GET", f"flow_runs/{run}")["state_type"])
        except httpx.HTTPError:
            return ""

    def end_of(self, run: str) -> float:
        """Unix time when Prefect knew that it had ended."""
        return datetime.fromisoformat(self.prefect("GET", f"flow_runs/{run}")["end_time"]).timestamp()

    def wait_ended(self, run: str) -> str:
        deadline = time.monotonic() + RUN_SECONDS
        while (state := self.state(run)) not in ENDED:
            if time.monotonic() > deadline:
                return f"{state or 'unknown'} after {RUN_SECONDS:.0f} s"
            self.keep_up()
            time.sleep(0.5)
        return state

    # what is there

    def processes(self, *marks: str) -> list[psutil.Process]:
        found = []
        for each in self.site.sandbox.processes():
            try:
                if any(mark in " ".join(each.cmdline()) for mark in marks):
                    found.append(each)
            except psutil.Error:
                continue
        return found

    def trainings(self) -> set[Path]:
        return set(self.project.runs.glob("*/"))

    def aliases(self) -> dict[str, str]:
        try:
            answer = httpx.get(f"{self.site.mlflow}/api/2.0/mlflow/registered-models/get", params={"name": NAME}, timeout=10, trust_env=False)
            return {each["alias"]: each["version"] for each in answer.raise_for_status().json()["registered_model"].get("aliases", [])}
        except (httpx.HTTPError, KeyError):
            return {}

    def reached(self, stage: str, run: str, before: set[Path], champion: str | None) -> bool:
        """Whether the run is in that stage now."""
        new = self.trainings() - before
        if stage == "compare":
            return self.state(run) == "RUNNING"
        if stage == "load":
            return bool(self.processes("swift.cli.main"))
        if stage == "train":
            return any(path.stat().st_size for folder in new for path in folder.glob("swift/logging.jsonl"))
        if stage == "reference":
            return bool(self.processes("pipeline.swift_parity"))
        if stage == "register":
            return any((folder / "parity.json").exists() for folder in new)
        if stage == "gate":
            return TRIAL in self.aliases()
        return self.aliases().get("champion") not in (None, champion)

    def kill(self, victim: str) -> None:
        if victim == FLOW:
            for each in self.processes("prefect.engine"):
                each.kill()
        elif victim == SWIFT:
            for each in self.processes("pipeline.supervisor"):
                if str(self.project.runs) in " ".join(each.cmdline()):
                    os.killpg(each.pid, signal.SIGKILL)  # its supervisor too, so that nobody is left to end the rest
        else:
            self.site.kill(victim)

    def keep_up(self) -> None:
        """Starts every server that does not run, as whatever keeps them up would: one that was killed, and one that gave up when another was away."""
        for name, program in self.site.programs.items():
            if not program.alive():
                program.launch()
                self.restarted.append(name)

    def wait_up(self, name: str) -> None:
        """Until it is ready; one that ended at once is started again: PostgreSQL does as long as its killed server's children hold the memory they shared."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                self.site.programs[name].wait_ready()
                return
            except AssertionError:
                if self.site.programs[name].alive() or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)
            self.keep_up()

    def problems(self, before: set[Path], versions: int, journal: int) -> list[str]:
        """What is not as if nothing had happened; `before`, `versions` and `journal` say how it was."""
        return [*self.wrong_in_the_registry(versions), *self.wrong_trainings(before, journal), *self.wrong_in_prefect(), *self.wrong_processes()]

    def wrong_in_the_registry(self, versions: int) -> Iterator[str]:
        entries = history(self.registry, NAME)
        champion = self.registry.champion(NAME)
        newest = self.registry.newest(NAME)
        if (new := self.versions() - versions) != 1:
            yield f"{new} new versions"
        if champion is None or champion != newest:
            yield f"champion {champion}, newest {newest}"
            return
        moves = [each for each in entries if each.before != each.after and each.after == champion.version]
        if len(moves) != 1 or any(each.open for each in entries):
            yield f"{len(moves)} promotions, {sum(each.open for each in entries)} open entries"
        if TRIAL in self.aliases():
            yield "still on trial"
        for replica in self.site.replicas:
            model = self.site.ask_replica(replica, "/adapters").json()["models"].get(NAME, {})
            live = model.get("live") or {}
            if (live.get("version"), live.get("digest")) != (champion.version, champion.digest):
                yield f"{replica} serves {live}: {json.dumps(model)[:300]}"

    def wrong_trainings(self, before: set[Path], journal: int) -> Iterator[str]:
        if (new := len(self.trainings() - before)) != 1:
            yield f"{new} trainings"
        lines = (self.project.logs / FILE).read_bytes()[journal:].decode("utf-8").splitlines()
        if (ended := sum(json.loads(line)["event"] == "training ended" for line in lines)) > 1:
            yield f"trained {ended} times"

    def wrong_in_prefect(self) -> Iterator[str]:
        if slots := self.slots():
            yield f"{slots} places are held"
        running = self.prefect(
            "POST", "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING", "PENDING"]}}, "deployment_id": {"is_null_": False}}
        )
        if running:
            yield f"runs that do not end: {[each['id'] for each in running]}"

    def wrong_processes(self) -> Iterator[str]:
        if left := self.site.left_over():
            yield f"left running: {left}"
        if dead := [name for name in self.site.programs if not self.site.alive(name)]:
            yield f"not running: {dead}"

    def versions(self) -> int:
        return sum(each.label.startswith(f"{NAME}/") for each in self.registry.registered())

    def run(self, cell: Cell, dice: random.Random) -> dict[str, Any]:
        """Does a cell; what came of it."""
        self.turn, self.restarted = self.turn + 1, []
        write_rows(self.project.root, NAME, self.turn)
        before, champion = self.trainings(), self.aliases().get("champion")
        versions = self.versions()
        journal = (self.project.logs / FILE).stat().st_size
        load = Load(self.site)
        with load.going_on():
            run = self.new_run()
            deadline = time.monotonic() + STAGE_SECONDS
            while not self.reached(cell.stage, run, before, champion):
                if time.monotonic() > deadline or self.state(run) in ENDED:
                    return {"ok": False, "problems": [f"{cell.stage} was not seen; the run is {self.wait_ended(run)}"]}
                time.sleep(0.1)
            waited = dice.uniform(0, 0.2 if cell.stage in ("register", "promote") else 1.0)
            time.sleep(waited)
            self.kill(cell.victim)
            killed, at = time.monotonic(), time.time()
            self.keep_up()
            if cell.victim in self.site.programs:
                self.wait_up(cell.victim)
            ready = time.monotonic() - killed
            states = [self.wait_ended(run)]
            detected = self.end_of(run) - at if states[0] in ENDED and states[0] != "COMPLETED" else None
            while states[-1] != "COMPLETED" and len(states) < RUNS:
                states.append(self.wait_ended(self.new_run()))
            deadline = time.monotonic() + SETTLE_SECONDS
            while (problems := self.safely(before, versions, journal)) and time.monotonic() < deadline:
                self.keep_up()
                time.sleep(1)
            settled = time.monotonic() - killed
            time.sleep(2)
        problems += [f"{len(load.failed)} of {load.asked} requests failed: {load.failed[0]}"] if load.failed else []
        said: dict[str, Any] = {"ok": not problems, "problems": problems, "after_seconds": waited, "restarted": self.restarted, "restart_seconds": ready}
        return said | {"detected_seconds": detected, "settled_seconds": settled, "runs": states, "requests": load.asked, "failed_requests": len(load.failed)}

    def safely(self, *how_it_was: Any) -> list[str]:
        try:
            return self.problems(*how_it_was)
        except Exception as error:  # a server that is not yet itself again
            return [repr(error)[:300]]


def test_every_part_is_killed_in_several_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # of this process, which asks again itself
    results = ROOT / ".tuneserve/chaos" / f"{SEED}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    wanted = cells()
    assert len(wanted) == len(set(wanted)) >= 20 and set(Counter(cell.victim for cell in wanted).values()) == {EACH}
    done = {each["cell"]: each for line in (results.read_text("utf-8").splitlines() if results.exists() else []) if (each := json.loads(line))["ok"]}
    missing = [cell for cell in wanted if cell.key not in done]
    if missing:
        with production(tmp_path, replicas=2) as site:
            chaos = Chaos(site, Registry(site.mlflow))
            write_rows(site.sandbox.root, NAME, chaos.turn)
            site.json("schedule", write_recipe(site.sandbox.root, NAME), "--cron", "0 3 1 1 *", "--name", "chaos", *site.replica_options, "--json")
            assert chaos.wait_ended(chaos.new_run()) == "COMPLETED"
            assert chaos.aliases()["champion"] == "1"
            for cell in missing:
                began = time.time()
                said = {"cell": cell.key, "began": began} | chaos.run(cell, random.Random(f"{SEED} {cell.key}"))
                said["seconds"] = time.time() - began
                with results.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(said) + "\n")
                print(json.dumps(said), flush=True)
                done[cell.key] = said
    found = [done[cell.key] for cell in wanted]
    failed = {each["cell"]: each["problems"] for each in found if not each["ok"]}
    detected = {each["cell"]: each["detected_seconds"] for each in found if each.get("detected_seconds") is not None}
    settled = [each["settled_seconds"] for each in found if "settled_seconds" in each]
    show(
        cells=len(found),
        failed=failed,
        runs_that_ended=len(detected),
        detected_seconds={"median": percentile(list(detected.values()), 50), "most": max(detected.values())} if detected else {},
        settled_seconds={"median": percentile(settled, 50), "most": max(settled)} if settled else {},
        requests=sum(each.get("requests", 0) for each in found),
        failed_requests=sum(each.get("failed_requests", 0) for each in found),
    )
    assert not failed
