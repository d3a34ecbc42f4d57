"""rebase from the command line: what is refused before anything starts, the list from MLflow's real store in a file, and what is handed to the flow."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import lineage
from pipeline.adapter import read_adapter
from pipeline.basemodel import read_base_model, template_digest
from pipeline.project import Project
from pipeline.rebasing import Binding
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.registry import Registry, flat
from pipeline.version import CHAMPION
from tests.command import tuneserve
from tests.conftest import write_adapter
from tests.test_cli import data_project


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none.yaml"], "cannot be read"),
        (["recipes/r.yaml", "--list"], "--list: only lists; leave it out to rebase"),
        (["recipes/r.yaml", "--to", "base"], "--to: only lists"),
        (["--replica", "http://a:1"], "RECIPE: is missing, so nothing would be asked of replicas"),
        (["--list", "--evaluate-on", "http://a:1"], "RECIPE: is missing"),
        (["recipes/r.yaml", "--replica", "localhost:1"], "is no replica's address"),
        (["recipes/r.yaml", "--serving", "none.yaml"], "cannot be read"),
        (["--to", "nowhere"], "no such folder"),
        (["--to", "tiny"], "the tiny base of now is not made yet"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(project: Project, args: list[str], said: str) -> None:
    data_project(project.root)
    done = tuneserve(project.root, "rebase", *args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (project.root / "mlruns").exists()


@pytest.fixture
def live(project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A project whose recipe trained r/1, the champion, and another model whose champion is a stranger's."""
    recipe = load_recipe(data_project(project.root), FinetuneRecipe)
    (project.root / "recipes/broken.yaml").write_text("name: [", "utf-8")
    shutil.copy(empty_store, project.root)
    registry = Registry(f"sqlite:///{project.root}/mlflow.db")
    with contextlib.chdir(project.root):  # where artifacts go
        base = read_base_model(project.root / "base").revision
        with registry.run("r", flat(recipe.model_dump(mode="json")), {"base_model": "base", **lineage.versions()}) as run:
            made = read_adapter(write_adapter(project.root / "adapter"))
            registry.register("r", run.run_id, made, {}, base, template_digest(), "i")
        registry.move_champion("r", "1")
        registry.client.create_registered_model("foreign")
        registry.client.create_model_version("foreign", "s3://elsewhere")
        registry.client.set_registered_model_alias("foreign", CHAMPION, "1")
        registry.client.create_registered_model("waiting")
        yield registry


def test_every_champion_is_listed_with_what_it_is_bound_to(project: Project, live: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*args: str) -> dict[str, Any]:
        done = tuneserve(project.root, "rebase", *args, "--json", MLFLOW_TRACKING_URI=live.uri)
        assert done.returncode == 0, done.stderr
        return {each["name"]: each for each in json.loads(done.stdout.splitlines()[-1])["champions"]}

    found = listed()
    assert list(found) == ["foreign", "r"]
    assert (found["r"]["need"], found["r"]["version"], found["r"]["recipes"]) == ("nothing", 1, ["recipes/r.yaml"])
    assert found["r"]["bound_to"] == found["r"]["now"] and found["r"]["now"]["template_digest"] == template_digest()
    assert (found["foreign"]["need"], found["foreign"]["bound_to"], found["foreign"]["recipes"]) == ("unknown", None, [])
    assert found["foreign"]["reasons"][0]["code"] == "not-ours"

    other = project.root / "other"
    shutil.copytree(project.root / "base", other)
    (other / "config.json").write_text('{"other": 1}', "utf-8")
    moved = listed("--list", "--to", "other")["r"]
    assert (moved["need"], moved["now"]["base_revision"]) == ("re-train", read_base_model(other).revision)
    done = tuneserve(project.root, "rebase", "--to", "other", MLFLOW_TRACKING_URI=live.uri)
    assert "r/1: re-train, the base model's revision is another" in done.stdout and "    recipe: recipes/r.yaml\n" in done.stdout
    assert done.stdout.endswith("2 of 2 need something; once servers of the new base are up: tuneserve rebase RECIPE... --replica URL\n")

    versions = lineage.versions()
    monkeypatch.setattr(lineage, "versions", lambda: {**versions, "version.torch": "99.0"})
    assert listed()["r"]["need"] == "re-check"
    shutil.rmtree(project.root / "base")
    assert listed()["r"]["reasons"][0]["code"] == "base-not-at-hand"


def test_nothing_live_is_said(project: Project, live: Registry) -> None:
    for name in ("r", "foreign"):
        live.move_champion(name, None)
    done = tuneserve(project.root, "rebase", "--list", MLFLOW_TRACKING_URI=live.uri)
    assert (done.returncode, done.stdout) == (0, "no model has a champion, so nothing is live\n")


def test_a_batch_is_handed_to_the_flow_and_one_that_is_not_through_fails(project: Project, live: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import rebase as flow
    from pipeline import cli_rebase

    asked: list[Any] = []
    kept_back = ""

    class Done:
        def __init__(self) -> None:
            self.kept_back = kept_back

        def lines(self) -> list[str]:
            return ["r/1: trained r/2"]

        def as_dict(self) -> dict[str, Any]:
            return {"now": Binding("b", "t", {}).as_dict(), "batch": [], "moved": ["r/2"], "seconds": 1.0}

    def rebase(paths: list[str], addresses: list[str] | None, **options: Any) -> Done:
        asked.append((paths, addresses, options))
        return Done()

    monkeypatch.setattr(flow, "rebase", rebase)
    monkeypatch.setattr(cli_rebase, "flow_servers", lambda project: contextlib.nullcontext())
    serving = project.root / "recipes/s.yaml"
    serving.write_text(
        "name: s\nbase_model: base\nfollow: [r]\nreplicas: ['http://c:1']\nevaluation_replica: 'http://own:1'\nunreachable_replicas: fail\n", "utf-8"
    )
    done = tuneserve(project.root, "rebase", "recipes/r.yaml", "--replica", "http://a:1/", "--replica", "http://b:1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["moved"] == ["r/2"], done.stderr
    assert asked.pop() == (["recipes/r.yaml"], ["http://a:1", "http://b:1"], {"evaluate_on": None, "unreachable_fails": False})
    kept_back = "1 of 1 are not through, so no alias is moved: r/1: refused"
    done = tuneserve(project.root, "rebase", "recipes/r.yaml", "--serving", "recipes/s.yaml")
    assert done.returncode == 1 and done.stdout == "r/1: trained r/2\n" and "no alias is moved" in done.stderr
    assert asked.pop() == (["recipes/r.yaml"], ["http://c:1"], {"evaluate_on": "http://own:1", "unreachable_fails": True})
