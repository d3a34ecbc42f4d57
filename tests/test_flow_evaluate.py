"""The evaluation's stages in order: which replica is asked, who answers, who is graded and what comes of it. Servers and Prefect are stood in for."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flows import evaluate as flow
from pipeline.assessment import BASE, CHAMPION, FEW_SHOT, Assessment, Recorded
from pipeline.errors import InvalidInput
from pipeline.evaluation import Answer, Evaluation
from pipeline.example import Example
from pipeline.fleet import Fleet
from pipeline.parity import Parity
from pipeline.project import Project
from pipeline.registry import Version
from tests.conftest import row, write_rows
from tests.replicas import FakeReplica, fleet_of, model, served

USERS, OWN = "http://users:1", "http://own:1"
FIRST, SECOND = (Version("shop", number, number * 64, "base", "template", f"run{number}") for number in "12")
RECIPE = "name: shop\nbase_model: tiny\ndataset: {train: t.jsonl, eval: e.jsonl}\n"


@dataclass
class FakeRegistry:
    champion_version: Version | None = FIRST

    def champion(self, name: str) -> Version | None:
        return self.champion_version


@dataclass
class Stages:
    """What the flow asked, and whom it had graded."""

    asked: list[tuple[str, str]]
    graded: list[list[str]]


@pytest.fixture
def stages(project: Project, monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages([], [])

    @contextlib.contextmanager
    def on_trial(registered: Any, version: Version, fleet: Fleet, lock: Path) -> Iterator[None]:
        found.asked.append((",".join(each.url for each in fleet.replicas), f"trial of {version.label}"))
        yield
        found.asked.append(("", "trial ended"))

    def answers_of(url: str, name: str, questions: Sequence[Example], file: str) -> Evaluation:
        found.asked.append((url, name))
        return Evaluation(tuple(Answer(question, name, name, 0.1) for question in questions))

    def graded(sides: dict[str, Evaluation], judge: Any, file: str) -> dict[str, Evaluation]:
        found.graded.append(list(sides))
        assert found.asked[-1] == ("", "trial ended") and file == "e.jsonl"
        return {side: Evaluation(tuple(replace(answer, grade=float(side == "shop/2")) for answer in given.answers)) for side, given in sides.items()}

    monkeypatch.setattr(flow.trial, "on_trial", on_trial)
    monkeypatch.setattr(flow.trial, "open_fleet", lambda project, addresses: fleet_of({address: follower() for address in addresses}))
    monkeypatch.setattr(flow, "answers_of", answers_of)
    monkeypatch.setattr(flow, "graded", graded)
    monkeypatch.setattr(flow, "replayed", lambda *_: Parity("faithful"))
    monkeypatch.setattr(flow, "record", lambda registered, version, assessment: assessment)
    for name, rows in (("t", 8), ("e", 30)):
        write_rows(project.root / f"{name}.jsonl", [row(f"{name}{number}", None, f"{name}{number}?") for number in range(rows)])
    return found


def follower() -> FakeReplica:
    live = served("1", "1" * 64)
    return FakeReplica(lambda: {"shop": model(live, live)})


def examine(project: Project, recipe: str, registry: FakeRegistry | None = None, **options: Any) -> Assessment:
    (project.root / "r.yaml").write_text(recipe, "utf-8")
    with fleet_of({USERS: follower()}) as fleet:
        return flow.examine(registry or FakeRegistry(), SECOND, fleet, project, recipe_path=str(project.root / "r.yaml"), **options)  # type: ignore[arg-type]


def test_the_version_the_champion_and_the_base_are_asked_on_the_first_replica(project: Project, stages: Stages) -> None:
    found = examine(project, RECIPE, limit=25)
    assert stages.asked == [(USERS, "trial of shop/2"), (USERS, "shop/2"), (USERS, "shop/1"), (USERS, "glm-4.5v"), ("", "trial ended")]
    assert (len(found.own.answers), list(found.others), found.champion, stages.graded) == (25, [CHAMPION, BASE], "shop/1", [])
    assert found.dataset_digest and found.parity == Parity("faithful")


def test_the_evaluation_replica_is_asked_if_there_is_one(project: Project, stages: Stages) -> None:
    examine(project, RECIPE, evaluate_on=OWN)
    assert {url for url, _ in stages.asked if url} == {OWN}


def test_everyone_is_graded_once_the_trial_has_ended(project: Project, stages: Stages) -> None:
    recipe = RECIPE + "promotion: {metric: judge, judge: {url: 'http://j/v1', model: j}}\n"
    found = examine(project, recipe, baselines=True)
    assert stages.graded == [["shop/2", CHAMPION, BASE, FEW_SHOT]]
    assert found.decision.verdict == "promote" and found.judge == "j" and found.others[FEW_SHOT].answers[0].example.row == 1


def test_the_champions_own_weights_are_not_asked_twice(project: Project, stages: Stages) -> None:
    found = examine(project, RECIPE, FakeRegistry(replace(SECOND, version="1")))
    assert [name for _, name in stages.asked[1:-1]] == ["shop/2", "glm-4.5v"] and found.decision.reasons[0].code == "same-adapter"


def test_a_champion_on_record_is_not_asked(project: Project, stages: Stages) -> None:
    found = examine(project, RECIPE, recorded=Recorded("shop/1", {"score": 0.0, "score.images-0": 0.0}, "r1"))
    assert [name for _, name in stages.asked[1:-1]] == ["shop/2", "glm-4.5v"]
    assert (found.champion, found.decision.verdict, found.decision.reasons[0].code) == ("shop/1", "promote", "as-good")


def test_only_all_rows_make_a_record(project: Project, stages: Stages) -> None:
    assert examine(project, RECIPE).eval_digest and not examine(project, RECIPE, limit=25).eval_digest


def test_a_missing_key_is_said_before_anything_is_asked(project: Project, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(InvalidInput, match="NO_SUCH_KEY is not set"):
        examine(project, RECIPE + "promotion: {judge: {url: 'http://j/v1', model: j, api_key_env: NO_SUCH_KEY}}\n")
    assert not stages.asked
