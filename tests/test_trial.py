"""A version on trial is served everywhere, verified, and its alias goes when the trial ends, however it ends."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import convergence, trial
from pipeline.errors import ServingError
from pipeline.fleet import Fleet
from pipeline.lock import Lock
from pipeline.project import Project
from pipeline.registry import Version
from pipeline.trial import evaluation_fleet, on_trial
from tests.replicas import FakeReplica, fleet_of, model, served

A, B = "http://a:1", "http://b:1"
VERSION = Version("shop", "2", "bb" * 32, "base", "template", "run")


@dataclass
class FakeRegistry:
    """tests/test_registry.py holds the method against MLflow's real store."""

    trial: list[str | None] = field(default_factory=list)

    def put_on_trial(self, name: str, version: str | None) -> None:
        self.trial.append(version)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "POLL_SECONDS", 0.01)


def replica(registry: FakeRegistry, **more: Any) -> FakeReplica:
    """Serves version 1, and version 2 from the moment that it is on trial, unless `more` says otherwise."""

    def models() -> dict[str, Any]:
        live = served("1", "aa" * 32)
        said = model(live, live, **more)
        if registry.trial[-1:] == ["2"] and not more:
            said["versions"] += [{**served("2", "bb" * 32), "role": "pinned", "in_flight": 0, "verified": said["versions"][0]["verified"], "fault": None}]
        return {"shop": said}

    return FakeReplica(models)


def test_it_is_served_during_the_trial_and_forgotten_afterwards(tmp_path: Path) -> None:
    registry = FakeRegistry()
    said = replica(registry)
    with fleet_of({A: said}) as fleet, on_trial(registry, VERSION, fleet, Lock("trial/shop", tmp_path / "lock"), 5) as reach:  # type: ignore[arg-type]
        assert reach.replicas == (A,) and registry.trial == ["2"]
    assert registry.trial == ["2", None]
    assert {hint["alias"] for hint in said.hints} == {"on-trial"}


def test_a_refusal_ends_the_trial_with_its_reason(tmp_path: Path) -> None:
    registry = FakeRegistry()
    refused = [{**served("2", "bb" * 32), "code": "dora", "message": "it is a DoRA adapter", "attempts": attempt} for attempt in (3,)]
    with fleet_of({A: replica(registry, refused=refused)}) as fleet, pytest.raises(ServingError, match="does not serve shop/2: it is a DoRA adapter"):  # noqa: SIM117
        with on_trial(registry, VERSION, fleet, Lock("trial/shop", tmp_path / "lock"), 0.1):  # type: ignore[arg-type]
            pytest.fail("nothing was served")
    assert registry.trial == ["2", None]


def test_an_error_during_the_trial_ends_it(tmp_path: Path) -> None:
    registry = FakeRegistry()
    with (
        fleet_of({A: replica(registry)}) as fleet,
        pytest.raises(KeyboardInterrupt),
        on_trial(registry, VERSION, fleet, Lock("trial/shop", tmp_path / "lock"), 5),
    ):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert registry.trial == ["2", None]


def reachable(monkeypatch: pytest.MonkeyPatch, replicas: dict[str, FakeReplica]) -> None:
    """These replicas are found by their addresses."""

    def opened(project: Project, addresses: list[str]) -> Fleet:
        return fleet_of({address: replicas[address] for address in addresses})

    monkeypatch.setattr(trial, "open_fleet", opened)


def test_the_evaluation_replica_alone_is_waited_for(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = FakeRegistry()
    live = served("1", "aa" * 32)
    users, own = FakeReplica(lambda: {"shop": model(live, live)}), replica(registry)  # the users' replica never shows version 2
    reachable(monkeypatch, {B: own})
    with fleet_of({A: users}) as fleet:
        with evaluation_fleet(project, fleet, B, "shop") as asked, on_trial(registry, VERSION, asked, Lock("trial/shop", tmp_path / "lock"), 5) as reach:  # type: ignore[arg-type]
            assert reach.replicas == (B,) and [each.url for each in asked.replicas] == [B]
        assert own.hints and not users.hints
        with evaluation_fleet(project, fleet, None, "shop") as asked:
            assert asked is fleet


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (FakeReplica(dict, away=True), "http://b:1 cannot be reached.*--evaluate-on URL"),
        (FakeReplica(dict, token="another"), "http://b:1 refuses our token"),
        (FakeReplica(dict), "the evaluation replica http://b:1 does not follow shop; add it to `follow:`"),
    ],
)
def test_an_evaluation_replica_that_cannot_be_asked_is_refused_at_once(own: FakeReplica, why: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    reachable(monkeypatch, {B: own})
    with fleet_of({A: FakeReplica(dict)}) as fleet, pytest.raises(ServingError, match=why), evaluation_fleet(project, fleet, B, "shop"):
        pytest.fail("it was asked")
