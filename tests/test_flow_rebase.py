"""A batch onto a new base: MLflow's real store in a file and fake replicas of one base; training and the held-out questions are stood in for."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows import evaluate as evaluate_flow
from flows import rebase as flow
from flows.finetune import Finetuned
from flows.rebase import Rebased
from pipeline import basemodel, lineage, promotion
from pipeline.adapter import read_adapter
from pipeline.assessment import Assessment, Recorded, assess
from pipeline.dataset import load_dataset
from pipeline.errors import InvalidInput, RegistryError, ServingError
from pipeline.evaluation import Answer, Evaluation
from pipeline.fleet import Fleet
from pipeline.history import Entry, history
from pipeline.lock import model_lock
from pipeline.preflight import checked_rows
from pipeline.project import Project
from pipeline.rebasing import read_passed
from pipeline.recipe import FinetuneRecipe, dump_recipe, load_recipe
from pipeline.registry import Registry, Version, flat
from pipeline.version import REBASE_TAG
from tests.conftest import row, write_adapter, write_counting_base, write_rows
from tests.replicas import FakeReplica, fleet_of, model, served

RECIPE = """name: {name}
base_model: {base}
dataset: {{train: {name}-t.jsonl, eval: {name}-e.jsonl}}
training: {{device: cpu, precision: float32, epochs: 2}}
promotion: {{min_examples: 10}}
"""
REPLICA = "http://new:1"
ROWS = 20


@dataclass
class World:
    """What the flow stands in, and what it had done. `right`: how many of 20 rows a model's versions answer right; `fails`: what cannot be done, and how."""

    project: Project
    registry: Registry
    served_base: str = ""
    """The revision that the replicas have."""
    follows: list[str] = field(default_factory=lambda: ["shop", "jackets"])
    right: dict[str, int] = field(default_factory=lambda: {"shop": ROWS, "jackets": ROWS})
    fails: dict[str, BaseException] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)

    def base(self, name: str) -> str:
        """The revision of a base in the project, made if it is not there."""
        folder = self.project.root / name
        if not folder.is_dir():
            write_counting_base(folder)
            (folder / "config.json").write_text(json.dumps({"made": name}), "utf-8")
            (folder / "model.safetensors").write_bytes(b"")
        return basemodel.resolve_base_model(name, self.project).revision

    def write(self, name: str, base: str) -> Path:
        path = self.project.root / f"{name}.yaml"
        path.write_text(RECIPE.format(name=name, base=base), "utf-8")
        for split in "te":
            write_rows(self.project.root / f"{name}-{split}.jsonl", [row("yes", None, f"{name} {split} {number}?") for number in range(ROWS)])
        return path

    def establish(self, name: str) -> Version:
        """A champion on the old base, compared when it was promoted."""
        path = self.write(name, "old")
        version = self.finetune(str(path)).version
        self.examine(self.registry, version, None, self.project, recipe_path=str(path), evaluate_on=None, recorded=None)
        promotion.promote(self.registry, version, None, model_lock(self.project, "promote", name))
        self.done.clear()
        return version

    def change(self) -> None:
        """The recipes and the replicas get the new base."""
        for name in self.right:
            self.write(name, "new")
        self.served_base = self.base("new")

    def run(self, *names: str, **options: Any) -> Rebased:
        self.done.clear()
        found: Rebased = flow.rebase.fn([f"{name}.yaml" for name in names or ("shop", "jackets")], [REPLICA], **options)
        return found

    def champions(self) -> dict[str, str | None]:
        return {name: self.registry.champion_number(name) for name in self.right}

    def last(self, name: str) -> Entry:
        return history(self.registry, name)[0]

    def fail(self, what: str) -> None:
        self.done.append(what)
        if error := self.fails.pop(what, None):
            raise error

    # the boundaries

    def finetune(self, path: str) -> Finetuned:
        recipe = load_recipe(Path(path), FinetuneRecipe)
        base = basemodel.resolve_base_model(recipe.base_model, self.project)
        inputs = lineage.inputs_of(recipe, base, checked_rows(Path(path), recipe, self.project))
        if found := self.registry.trained(recipe.name, inputs.digest):
            return Finetuned(found, trained=False)
        self.fail(f"train {recipe.name}")
        made = read_adapter(write_adapter(self.project.root / inputs.digest[:8], float(int(inputs.digest[:6], 16))))
        with self.registry.run(recipe.name, flat(recipe.model_dump(mode="json")), lineage.lineage_of(recipe, inputs, self.project.root)) as run:
            files = {"recipe.yaml": dump_recipe(recipe)}
            version = self.registry.register(recipe.name, run.run_id, made, files, base.revision, basemodel.template_digest(), inputs.digest)
        return Finetuned(version, trained=True)

    def examine(
        self, registered: Registry, version: Version, fleet: Any, project: Project, *, recipe_path: str, evaluate_on: str | None, recorded: Recorded | None
    ) -> Assessment:
        self.fail(f"examine {version.label}")
        recipe = load_recipe(Path(recipe_path), FinetuneRecipe)
        rows = load_dataset(recipe.dataset, project)
        right = self.right[version.name]
        own = Evaluation(tuple(Answer(each, "yes" if number < right else "no", version.label, 0.1) for number, each in enumerate(rows.eval)))
        found = assess(version.label, own, None, {}, recipe.promotion, dataset_digest=rows.digest, eval_digest=rows.eval_digest, recorded=recorded)
        written: Assessment = evaluate_flow.record.fn(registered, version, found)
        return written

    def move_alias(self, registered: Registry, version: Version, *args: Any, **options: Any) -> Any:
        self.fail(f"move {version.label}")
        done = promotion.promote(registered, version, *args, **options)
        self.fail(f"moved {version.label}")
        return done

    def models(self) -> dict[str, Any]:
        """A replica refuses the champion of another base."""
        said = {}
        for name in self.follows:
            champion = self.registry.champion(name)
            wanted = served(champion.version, champion.digest) if champion else None
            said[name] = model(wanted, wanted if champion and champion.base_revision == self.served_base else None)
        return said


@pytest.fixture
def world(project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    shutil.copy(empty_store, project.root)
    monkeypatch.chdir(project.root)  # where artifacts go, and recipes lie
    monkeypatch.setenv("TUNESERVE_PROJECT", str(project.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.root}/mlflow.db")
    made = World(project, Registry(f"sqlite:///{project.root}/mlflow.db"))

    def open_fleet(project: Project, addresses: Any, **options: Any) -> Fleet:
        return fleet_of({REPLICA: FakeReplica(made.models)})

    for name in ("finetune", "examine", "move_alias"):
        monkeypatch.setattr(flow, name, getattr(made, name))
    monkeypatch.setattr(flow, "open_fleet", open_fleet)
    monkeypatch.setattr(flow, "record", flow.record.fn)
    for module in (flow, evaluate_flow):
        monkeypatch.setattr(module, "create_markdown_artifact", lambda text, **_: made.artifacts.append(text))
    made.served_base = made.base("old")
    for name in made.right:
        made.establish(name)
    yield made


def test_aliases_move_once_all_are_through_and_then_there_is_nothing_to_do(world: World) -> None:
    world.change()
    done = world.run()
    through = ["train shop", "examine shop/2", "train jackets", "examine jackets/2"]
    assert world.done == [*through, "move shop/2", "moved shop/2", "move jackets/2", "moved jackets/2"]
    assert world.champions() == {"shop": "2", "jackets": "2"} and not done.kept_back
    said = json.loads(json.dumps(done.as_dict()))
    assert said["moved"] == ["shop/2", "jackets/2"] and said["now"]["base_revision"] == world.served_base
    (shop, _) = said["batch"]
    assert (shop["champion"], shop["version"], shop["need"], shop["trained"], shop["through"], shop["moved"]) == (1, 2, "re-train", True, True, True)
    newest = world.last("shop")
    assert (newest.action, newest.before, newest.after) == ("promoted", "1", "2") and newest.grounds.evaluation_run == shop["evaluation_run"]
    assert newest.grounds.reasons.startswith("rebase: promote:") and "as-good" in newest.grounds.reasons and json.loads(newest.grounds.scores)
    assert "it is champion" in world.artifacts[-1]
    again = world.run()
    assert world.done == [] and [each.member.need.step for each in again.results] == ["nothing", "nothing"] and again.as_dict()["moved"] == []
    assert promotion.rollback_target(world.registry, "shop", None).version == "1"


def test_if_one_is_not_through_none_moves_and_what_passed_is_not_asked_again(world: World) -> None:
    world.change()
    world.right["jackets"] = ROWS - 2  # 90 %, against 100 % on record
    done = world.run()
    assert world.champions() == {"shop": "1", "jackets": "1"} and not any(step.startswith("move") for step in world.done)
    assert done.kept_back.startswith("1 of 2 are not through, so no alias is moved: jackets/1: jackets/2: refuse: ")
    assert "was better on record, by more than 2.0% (worse)" in done.kept_back and done.kept_back.endswith("passed, and kept for the next run: shop/2")
    assert (world.last("jackets").action, world.last("jackets").version, world.last("shop").action) == ("refused", "2", "promoted")
    assert [each["through"] for each in done.as_dict()["batch"]] == [True, False]
    world.right["jackets"] = ROWS
    world.run()
    assert world.done == ["examine jackets/2", "move shop/2", "moved shop/2", "move jackets/2", "moved jackets/2"]
    assert world.champions() == {"shop": "2", "jackets": "2"}


@pytest.mark.parametrize("stage", ["train jackets", "examine jackets/2", "move shop/2", "moved shop/2", "move jackets/2"])
def test_an_interrupted_rebase_moves_nothing_and_is_seen_through_by_the_next(world: World, stage: str) -> None:
    world.change()
    world.fails[stage] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run()
    moved_already = stage == "moved shop/2"  # it was live, but its command did not hear of it
    assert world.champions() == {"shop": "2" if moved_already else "1", "jackets": "1"}
    world.run()
    assert world.champions() == {"shop": "2", "jackets": "2"}
    assert ("train jackets" in world.done) == (stage == "train jackets") and "examine shop/2" not in world.done
    assert not any(entry.open for name in world.right for entry in history(world.registry, name))


def test_a_rebase_that_was_killed_between_aliases_is_seen_through(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanishes(self: Registry, entry: str, tags: dict[str, str]) -> None:
        raise RegistryError("killed")

    world.change()
    world.fails["move jackets/2"] = KeyboardInterrupt()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "close_entry", vanishes)
        patch.setattr(flow, "move_back", lambda *_: "")
        world.run()
    assert world.champions() == {"shop": "2", "jackets": "1"} and world.last("shop").open
    done = world.run()
    assert world.done == ["move shop/2", "moved shop/2", "move jackets/2", "moved jackets/2"]
    assert "its promotion is seen through" in done.lines()[1] and not any(entry.open for entry in history(world.registry, "shop"))


def test_if_an_alias_does_not_move_those_that_did_go_back(world: World) -> None:
    world.change()
    world.fails["move jackets/2"] = ServingError("replica http://new:1 does not serve jackets/2.")
    with pytest.raises(ServingError, match=r"jackets/2 could not be made champion: replica .* champion again: shop/1"):
        world.run()
    newest = world.last("shop")
    assert world.champions() == {"shop": "1", "jackets": "1"}
    assert (newest.action, newest.before, newest.after) == ("rolled-back", "2", "1") and "rebase taken back: replica" in newest.grounds.reasons
    world.run()
    assert world.champions() == {"shop": "2", "jackets": "2"} and "train shop" not in world.done


def test_other_libraries_are_a_reason_to_look_again_and_no_alias_moves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = lineage.versions()
    monkeypatch.setattr(lineage, "versions", lambda: {**versions, "version.vllm": "99.0"})
    world.right["jackets"] = ROWS - 2
    done = world.run()
    assert world.done == ["examine shop/1", "examine jackets/1"] and "jackets/1: refuse" in done.kept_back
    assert (world.last("jackets").action, world.last("shop").action, world.last("shop").after) == ("refused", "kept", "1")
    passed = read_passed(world.registry.tags(world.registry.version("shop", "1"))[REBASE_TAG])
    assert passed and passed.libraries["vllm"] == "99.0"
    world.run()
    assert world.done == ["examine jackets/1"]  # held against its record of then, not against the look before
    world.right["jackets"] = ROWS
    done = world.run()
    assert not done.kept_back and done.as_dict()["moved"] == [] and "re-checked, libraries changed" in "\n".join(done.lines())
    world.run()
    assert world.done == [] and world.champions() == {"shop": "1", "jackets": "1"}


def test_what_cannot_be_begun_is_said_before_anything_is_trained(world: World) -> None:
    world.change()
    world.served_base = world.base("old")
    with pytest.raises(ServingError, match=r"http://new:1 serves shop/1, so it is a replica of the old base; name those of the new one"):
        world.run()
    world.served_base = world.base("new")
    with pytest.raises(ServingError, match=r"http://new:1 follows jackets too, whose champion jackets/1 needs a re-train; give its recipe as well"):
        world.run("shop")
    world.follows = ["shop"]
    with pytest.raises(ServingError, match="no ready replica follows jackets"):
        world.run()
    write_rows(world.project.root / "shop-e.jsonl", [row("yes", None, f"other {number}?") for number in range(ROWS)])
    with pytest.raises(
        ServingError, match=r"shop/1: its score on all rows of shop-e.jsonl is not on record.*tuneserve evaluate shop/1 --recipe shop.yaml --replica URL"
    ):
        world.run("shop")
    world.registry.move_champion("shop", None)
    with pytest.raises(ServingError, match="shop has no champion"):
        world.run("shop")
    world.write("jackets", "old")
    with pytest.raises(InvalidInput, match=r"jackets.yaml: base_model: is another base than that of shop.yaml"):
        world.run()
    with pytest.raises(InvalidInput, match="shop is named by two recipes"):
        world.run("shop", "shop")
    assert all(version == world.registry.version(version.name, "1") for version in map(world.registry.newest, world.right) if version)


def test_a_batch_may_leave_out_what_its_replicas_do_not_follow(world: World) -> None:
    world.change()
    world.follows = ["shop"]
    world.run("shop")
    assert world.champions() == {"shop": "2", "jackets": "1"}
