"""The retraining's stages in order, and again after a kill: MLflow's real store in a file and fake replicas; training and the held-out questions are stood in for."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from flows import approve as approve_flow
from flows import promote as promote_flow
from flows import retrain as flow
from flows.finetune import Finetuned
from flows.retrain import Retrained
from pipeline import approval, basemodel, lineage, promotion
from pipeline.adapter import read_adapter
from pipeline.assessment import Assessment, assess
from pipeline.dataset import load_dataset
from pipeline.decision import Decision, Reason
from pipeline.errors import InvalidInput, ProcessFailed, RegistryError, ServingError
from pipeline.evaluation import Answer, Evaluation
from pipeline.fleet import Fleet
from pipeline.history import history
from pipeline.preflight import checked_rows
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, dump_recipe, load_recipe
from pipeline.registry import Registry, Version, flat
from pipeline.trial import evaluation_fleet
from pipeline.version import APPROVAL_TAG, DECIDED_TAG, RETRAINED_TAG
from pipeline.watch import Watched
from tests.conftest import row, write_adapter, write_counting_base, write_rows
from tests.replicas import FakeReplica, fleet_of, model, served

RECIPE = """name: shop
base_model: base
dataset: {train: t.jsonl, eval: e.jsonl}
training: {device: cpu, precision: float32, epochs: 2}
promotion: {floor: 0.5}
"""
REPLICA = "http://a:1"


@dataclass
class World:
    """What the flow stands in, and what it had done. `verdict` is what comparing comes to; `dies_in` a stage that is killed, once."""

    project: Project
    registry: Registry
    trained: int = 0
    examined: list[str] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    verdict: str = "promote"
    dies_in: str = ""
    watched: Watched | None = None

    @property
    def path(self) -> Path:
        return self.project.root / "r.yaml"

    def write(self, recipe: str = RECIPE, train: int = 6, evaluate: int = 3, mark: str = "") -> None:
        self.path.write_text(recipe, "utf-8")
        for name, rows in (("t", train), ("e", evaluate)):
            write_rows(self.project.root / f"{name}.jsonl", [row(f"{name}{number}{mark}", None, f"{name}{number}?") for number in range(rows)])

    def die(self, stage: str) -> None:
        if self.dies_in == stage:
            self.dies_in = ""
            raise ServingError(f"killed in {stage}")

    def run(self, **options: Any) -> Retrained:
        found: Retrained = flow.retrain.fn("r.yaml", **options)
        return found

    def actions(self) -> list[tuple[str, str | None]]:
        return [(entry.action, entry.version) for entry in history(self.registry, "shop")][::-1]

    # the boundaries

    def with_options(self, timeout_seconds: float | None) -> Callable[[str, bool], Finetuned]:
        self.timeouts.append(timeout_seconds)
        return self.finetune

    def finetune(self, path: str, force: bool) -> Finetuned:
        recipe = load_recipe(Path(path), FinetuneRecipe)
        base = basemodel.resolve_base_model(recipe.base_model, self.project, lambda *_: None)
        inputs = lineage.inputs_of(recipe, base, checked_rows(Path(path), recipe, self.project))
        if not force and (found := self.registry.trained(recipe.name, inputs.digest)):
            return Finetuned(found, trained=False)
        self.trained += 1
        self.die("training")
        adapter = read_adapter(write_adapter(self.project.root / f"adapter-{self.trained}", float(self.trained)))
        tags = lineage.lineage_of(recipe, inputs, self.project.root)
        with self.registry.run(recipe.name, flat(recipe.model_dump(mode="json")), tags) as run:
            files = {"recipe.yaml": dump_recipe(recipe)}
            made = self.registry.register(recipe.name, run.run_id, adapter, files, base.revision, basemodel.template_digest(), inputs.digest)
        self.die("registered")
        return Finetuned(made, trained=True)

    def examine(self, registered: Registry, version: Version, fleet: Fleet, project: Project, *, recipe_path: str, evaluate_on: str | None) -> Assessment:
        self.examined.append(version.label)
        self.die("comparing")
        recipe = load_recipe(Path(recipe_path), FinetuneRecipe)
        rows = load_dataset(recipe.dataset, project)
        own = Evaluation(tuple(Answer(question, question.answer, version.label, 0.1) for question in rows.eval))
        found = assess(version.label, own, None, {}, recipe.promotion, dataset_digest=rows.digest)
        return replace(found, run_id="r1", decision=Decision(self.verdict, (Reason("said", "by the test"),)))  # type: ignore[arg-type]

    def move_alias(self, *args: Any, **options: Any) -> Any:
        self.die("promoting")
        done = promotion.promote(*args, **options)
        self.die("promoted")
        return done

    def watch_champion(self, *_: Any) -> Watched | None:
        return self.watched

    def models(self) -> dict[str, Any]:
        champion = self.registry.champion("shop") if self.registry.newest("shop") else None
        live = served(champion.version, champion.digest) if champion else None
        return {"shop": model(live, live)}


@pytest.fixture
def world(project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shutil.copy(empty_store, project.root)
    monkeypatch.chdir(project.root)  # where artifacts go
    monkeypatch.setenv("TUNESERVE_PROJECT", str(project.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.root}/mlflow.db")
    made = World(project, Registry(f"sqlite:///{project.root}/mlflow.db"))
    base = write_counting_base(project.root / "base")
    (base / "config.json").write_text("{}", "utf-8")
    (base / "model.safetensors").write_bytes(b"")

    @contextlib.contextmanager
    def at_work() -> Iterator[Project]:
        yield project

    def open_fleet(project: Project, addresses: Any, **options: Any) -> Fleet:
        return fleet_of({REPLICA: FakeReplica(made.models)})

    monkeypatch.setattr(flow, "at_work", at_work)
    monkeypatch.setattr(flow, "finetune", made)
    monkeypatch.setattr(flow, "compare", flow.compare.fn)
    monkeypatch.setattr(flow, "look_for_drift", flow.look_for_drift.fn)
    monkeypatch.setattr(flow, "record", flow.record.fn)
    monkeypatch.setattr(flow, "promote", flow.promote.fn)
    monkeypatch.setattr(flow, "approve", flow.approve.fn)
    monkeypatch.setattr(flow, "create_markdown_artifact", lambda text, **_: made.artifacts.append(text))
    monkeypatch.setattr(promote_flow, "examine", made.examine)
    monkeypatch.setattr(promote_flow, "ask_for_approval", approval.ask)
    for module in (promote_flow, approve_flow):
        monkeypatch.setattr(module, "open_fleet", open_fleet)
        monkeypatch.setattr(module, "move_alias", made.move_alias)
        monkeypatch.setattr(module, "watch_champion", made.watch_champion)
    made.write()
    yield made


def test_new_rows_are_trained_and_promoted_and_nothing_is_done_twice(world: World) -> None:
    first = world.run(training_seconds=60.0)
    assert (first.trained, first.decided.code, [reason.code for reason in first.reasons]) == (True, "promoted", ["no-version"])
    assert world.registry.champion_number("shop") == "1" and world.timeouts == [60.0] and not first.did_nothing
    tags = world.registry.tags(first.version)
    assert tags[RETRAINED_TAG] == "no version is registered yet (no-version)" and "promote: by the test" in tags[DECIDED_TAG]
    again = world.run()
    assert again.did_nothing and again.decided.code == "is-champion" and (world.trained, world.examined) == (1, ["shop/1"])
    assert "nothing to do" in world.artifacts[-1] and "nothing to train: shop/1, rows, base, template and recipe are those" in world.artifacts[-1]
    world.write(train=9)
    more = world.run()
    assert [str(reason) for reason in more.reasons] == ["3 training rows more (6 -> 9) (rows-added)"]
    assert (more.version.label, world.registry.champion_number("shop"), more.as_dict()["previous"]) == ("shop/2", "2", "1")
    world.write()
    back = world.run()  # the rows of before: trained already, and to be compared with the champion of now
    assert (back.version.label, back.trained, world.trained, world.examined) == ("shop/1", False, 2, ["shop/1", "shop/2", "shop/1"])


@pytest.mark.parametrize("verdict", ["keep", "refuse"])
def test_what_is_kept_out_stays_out_until_something_that_counts_changes(world: World, verdict: str) -> None:
    world.verdict = verdict
    first = world.run()
    assert first.decided == Reason("kept-out", f"{verdict}: by the test (said)") and world.actions() == [("kept" if verdict == "keep" else "refused", "1")]
    assert "kept-out" in world.registry.tags(first.version)[DECIDED_TAG] and first.as_dict()["promoted"] is False
    assert world.run().did_nothing and world.examined == ["shop/1"]
    world.write(evaluate=5)
    world.verdict = "promote"
    later = world.run()
    assert (later.trained, later.decided.code, world.trained) == (False, "promoted", 1)


@pytest.mark.parametrize("stage", ["training", "registered", "comparing", "promoting", "promoted"])
def test_a_killed_run_is_seen_through_by_the_next(world: World, stage: str) -> None:
    world.dies_in = stage
    with pytest.raises(ServingError, match=stage):
        world.run()
    done = world.run()
    assert world.registry.champion_number("shop") == "1" and world.registry.newest("shop") == done.version
    assert world.trained == (2 if stage == "training" else 1)  # ms-swift itself goes on from its checkpoint
    assert len(world.examined) == (2 if stage in ("comparing", "promoting") else 1)
    assert [action for action, _ in world.actions()].count("promoted") == 1
    assert world.run().did_nothing


def test_a_promotion_that_was_killed_once_the_alias_had_moved_is_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanishes(self: Registry, entry: str, tags: dict[str, str]) -> None:
        raise RegistryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "close_entry", vanishes)
        world.run()
    assert history(world.registry, "shop")[0].open
    done = world.run()
    assert done.outcome and not any(entry.open for entry in history(world.registry, "shop")) and world.examined == ["shop/1"]
    assert world.run().did_nothing


def test_what_was_rolled_back_is_not_promoted_again(world: World) -> None:
    world.run()
    world.write(train=9)
    second = world.run().version
    registry = world.registry
    with fleet_of({REPLICA: FakeReplica(world.models)}) as fleet:
        lock = promote_flow.model_lock(world.project, "promote", "shop")
        promotion.promote(registry, promotion.rollback_target(registry, "shop", None), fleet, lock, rolls_back=True)
    done = world.run()
    assert done.did_nothing and done.version == second and done.decided.code == "promoted-before" and registry.champion_number("shop") == "1"
    world.write(train=9, evaluate=5)
    assert world.run().decided.code == "taken-out" and registry.champion_number("shop") == "1"


def test_force_trains_anew_and_a_library_alone_does_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    versions = lineage.versions()
    monkeypatch.setattr(lineage, "versions", lambda: {**versions, "version.torch": "9.9"})
    done = world.run()
    assert done.did_nothing and [reason.code for reason in done.reasons] == ["libraries-changed"] and "torch" in done.lines()[0]
    forced = world.run(force=True)
    assert forced.trained and forced.version.label == "shop/2" and [reason.code for reason in forced.reasons] == ["forced"]


def test_a_version_of_unknown_origin_is_no_base_to_compare_with(world: World) -> None:
    with world.registry.run("by hand", {}, {}) as run:
        world.registry.register("shop", run.run_id, read_adapter(write_adapter(world.project.root / "x", 7.0)), {}, "b", "t", "i")
    assert [reason.code for reason in world.run().reasons] == ["origin-unknown"] and world.trained == 1


def test_a_training_that_takes_too_long_says_how_it_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(path: str, force: bool) -> Finetuned:
        raise flow.FlowRunTimeoutError

    monkeypatch.setattr(world, "finetune", too_long)
    with pytest.raises(ProcessFailed, match=r"training shop was ended after 2 h; the next run goes on from its last checkpoint"):
        world.run(training_seconds=7200.0)


def test_a_breach_fails_the_run_after_it_was_recorded(world: World) -> None:
    world.watched = Watched("shop/1", None, "breach", 1.0, 10, 9, {}, Reason("errors", "9 of 10 failed"))
    with pytest.raises(ServingError, match="shop/1"):
        world.run(watch_seconds=1.0)
    assert "promoted" in world.artifacts[-1]


def test_wrong_input_changes_nothing(world: World) -> None:
    world.write(RECIPE.replace("epochs", "epoks"))
    with pytest.raises(InvalidInput, match="epoks"):
        world.run()
    world.write(train=0)
    with pytest.raises(InvalidInput):
        world.run()
    assert world.registry.newest("shop") is None


MANUAL = RECIPE.replace("floor: 0.5", "floor: 0.5, approval: manual, approval_days: 7")


def asking(world: World) -> Version:
    world.write(MANUAL)
    done = world.run()
    assert done.decided.code == "asks-for-approval" and "tuneserve approve shop/1" in done.decided.message and done.as_dict()["approval_expires"]
    assert world.registry.champion_number("shop") is None and world.actions() == [("requested", "1")]
    waits = world.run()
    assert waits.did_nothing and waits.decided.code == "waits-for-approval" and world.examined == ["shop/1"]
    return done.version


def test_an_approval_by_hand_is_acted_on_at_the_next_run(world: World) -> None:
    version = asking(world)
    world.registry.client.set_model_version_tag("shop", "1", APPROVAL_TAG, "Approved")
    done = world.run()
    assert world.registry.champion("shop") == version and world.examined == ["shop/1"]
    assert "shop/1 is promoted" in done.answered[0] and "approved by the tag in MLflow" in done.answered[0] and not done.did_nothing
    newest = history(world.registry, "shop")[0]
    assert newest.grounds.evaluation_run == "r1" and json.loads(newest.grounds.scores) and newest.grounds.gate
    assert world.run().did_nothing


def test_an_approved_promotion_that_fails_is_tried_again(world: World) -> None:
    version = asking(world)
    approval.approve(world.registry, version, "me@here")
    world.dies_in = "promoting"
    with pytest.raises(ServingError, match="promoting"):
        world.run()
    assert world.run().answered and world.registry.champion_number("shop") == "1"


def test_a_rejection_keeps_it_out_and_so_does_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asking(world)
    world.registry.client.set_model_version_tag("shop", "1", APPROVAL_TAG, "rejected")
    assert "shop/1 is rejected" in world.run().answered[0] and world.actions()[-1] == ("rejected", "1")
    assert world.run().decided.code == "rejected-before"
    world.write(MANUAL, train=9)
    assert world.run().decided.code == "asks-for-approval"
    monkeypatch.setattr(flow.time, "time", lambda: 4e9)
    assert "shop/2 is kept: nobody approved it until" in world.run().answered[0] and world.actions()[-1] == ("kept", "2")
    assert world.run().decided.code == "kept-before" and world.registry.champion_number("shop") is None


def test_an_answer_counts_also_once_a_newer_version_is_there(world: World) -> None:
    version = asking(world)
    world.write(MANUAL, train=9)
    world.registry.client.set_model_version_tag("shop", version.version, APPROVAL_TAG, "approved")
    done = world.run()
    assert done.answered[0].startswith("shop/1 is promoted") and done.version.label == "shop/2" and done.decided.code == "asks-for-approval"
    assert world.registry.champion_number("shop") == "1"


def test_a_request_against_a_champion_that_changed_is_asked_anew(world: World) -> None:
    world.run()
    world.write(MANUAL, train=9)
    second = world.run().version
    world.write(MANUAL, train=12)
    third = world.run().version
    approval.approve(world.registry, second, "me@here")
    done = world.run()
    assert [line.split(":")[0] for line in done.answered] == ["shop/2 is promoted", "shop/3 is kept"]
    assert done.version == third and done.decided.code == "asks-for-approval" and world.examined.count("shop/3") == 2


def test_a_recipe_that_asks_for_no_approval_any_more_promotes_what_waits(world: World) -> None:
    asking(world)
    world.write()
    assert "asks for no approval any more" in world.run().answered[0] and world.registry.champion_number("shop") == "1"


DRIFT = RECIPE + "drift: {rows: fresh.jsonl, minimum_rows: 10}\n"


def approved_rows(world: World, count: int, at: str = "2100-01-01T00:00:00+00:00") -> None:
    rows = [row(f"fresh{number}", None, f"fresh{number}?", provenance={"approved_at": at}) for number in range(count)]
    write_rows(world.project.root / "fresh.jsonl", rows)


@pytest.fixture
def asked(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which names were asked the fresh rows; every second answer is right."""
    names: list[str] = []

    def answers_of(url: str, name: str, questions: Any, file: str) -> Evaluation:
        assert (url, file) == (REPLICA, "fresh.jsonl")
        names.append(name)
        return Evaluation(tuple(Answer(each, each.answer if number % 2 else "?", name) for number, each in enumerate(questions)))

    monkeypatch.setattr(flow, "open_fleet", promote_flow.open_fleet)
    monkeypatch.setattr(flow, "replica_of", lambda fleet, name: (fleet.replicas[0], "base"))
    monkeypatch.setattr(flow, "answers_of", answers_of)
    return names


def test_a_champion_that_got_worse_on_what_people_approve_is_told_and_a_reason_to_train(
    world: World, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(DRIFT)
    first = world.run()
    assert first.drift is None and first.decided.code == "promoted" and not asked
    nothing_yet = world.run()
    assert nothing_yet.drift and nothing_yet.drift.code == "drift-unknown" and "0 rows of fresh.jsonl" in nothing_yet.drift.message
    approved_rows(world, 20)
    same = world.run()
    assert (
        same.drift and same.drift.code == "drifted" and "shop/1 on 20 rows approved since its promotion: 50.0%, at its promotion 100.0%" in same.drift.message
    )
    assert [each["code"] for each in same.as_dict()["changes"]] == ["drifted"] and same.as_dict()["drift"]["code"] == "drifted"
    assert same.did_nothing and world.trained == 1, "the same inputs would make the same adapter"
    assert same.lines()[0].startswith("drift: shop/1 on 20 rows") and "nothing to train: shop/1, rows, base" in same.lines()[1]
    world.write(DRIFT, train=9)
    more = world.run()
    assert (more.trained, [each.code for each in more.reasons], asked) == (True, ["rows-added", "drifted"], ["shop/1", "shop/1"])
    assert "(rows-added)" in world.registry.tags(more.version)[RETRAINED_TAG] and "(drifted)" in world.registry.tags(more.version)[RETRAINED_TAG]
    versions = lineage.versions()
    monkeypatch.setattr(lineage, "versions", lambda: {**versions, "version.torch": "9.9"})
    libraries = world.run()
    assert libraries.trained and [each.code for each in libraries.reasons] == ["libraries-changed", "drifted"], "other inputs than before, if only by a library"


def test_what_was_approved_before_the_promotion_tells_nothing(world: World, asked: list[str]) -> None:
    approved_rows(world, 20, at="2020-01-01T00:00:00+00:00")
    world.write(DRIFT)
    world.run()
    found = world.run()
    assert found.drift and found.drift.code == "drift-unknown" and not asked and found.did_nothing


def test_drift_that_cannot_be_told_fails_no_run(world: World, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(DRIFT)
    world.run()
    approved_rows(world, 20)

    def away(*_: Any, **__: Any) -> Fleet:
        raise ServingError("no ready replica follows shop\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(flow, "replica_of", away)
        found = world.run()
    assert found.drift == Reason("drift-unknown", "shop/1 could not be asked (no ready replica follows shop)") and found.reasons == ()
    registry = world.registry
    forced = registry.champion("shop")
    assert forced
    registry.move_champion("shop", None)
    with fleet_of({REPLICA: FakeReplica(world.models)}) as fleet:
        lock = promote_flow.model_lock(world.project, "promote", "shop")
        for entry, _, _ in registry.entries("shop"):
            registry.close_entry(entry, {"scores": ""})
        promotion.promote(registry, forced, fleet, lock)
    found = world.run()
    assert found.drift and "is not on record" in found.drift.message and not asked
    (world.project.root / "fresh.jsonl").write_text("{", "utf-8")
    assert world.run().drift == found.drift


def test_the_replica_for_evaluations_is_asked(world: World, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world.write(DRIFT)
    world.run()
    approved_rows(world, 20)
    monkeypatch.setattr("pipeline.trial.open_fleet", promote_flow.open_fleet)
    named = []

    @contextlib.contextmanager
    def noted(project: Project, fleet: Fleet, address: str | None, name: str) -> Iterator[Fleet]:
        named.append(address)
        with evaluation_fleet(project, fleet, address, name) as own:
            yield own

    monkeypatch.setattr(flow.trial, "evaluation_fleet", noted)
    assert world.run(evaluate_on="http://b:1").drift and named == ["http://b:1"] and asked == ["shop/1"]
