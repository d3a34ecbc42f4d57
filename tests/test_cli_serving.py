"""The commands that change and show what is served: against a small MLflow and replicas on this machine, or none."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline import cli_serving, cli_status
from pipeline.adapter import read_adapter
from pipeline.errors import InvalidInput
from pipeline.registry import Registry, Version
from pipeline.switch import Disabled
from pipeline.version import BASE_REVISION_TAG, CANARY_TAG, DIGEST_TAG, DISABLED_TAG, TEMPLATE_DIGEST_TAG
from tests import command
from tests.conftest import write_adapter
from tests.replicas import TOKEN, FakeReplica, http_server, model, served


def tuneserve(cwd: Path, *args: str, mlflow: str | None = None) -> subprocess.CompletedProcess[str]:
    return command.tuneserve(cwd, *args, **({"MLFLOW_TRACKING_URI": mlflow} if mlflow else {}))


def as_process(cwd: Path, *args: str, mlflow: str) -> subprocess.CompletedProcess[str]:
    environment = command.command_environment(MLFLOW_TRACKING_URI=mlflow)
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *args], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project with a token and nothing that runs."""
    (tmp_path / "project/.tuneserve").mkdir(parents=True)
    (tmp_path / "project/.tuneserve/token").write_text(TOKEN)
    return tmp_path / "project"


class SmallMlflow:
    """As much of MLflow's REST as following needs: one model, `shop`; `tags` are its own."""

    def __init__(self, champion: str = "1", candidate: str | None = None) -> None:
        self.aliases = {"champion": champion} | ({"candidate": candidate} if candidate else {})
        self.tags: dict[str, str] = {}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        parts = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        tags = [{"key": key, "value": value} for key, value in self.tags.items()]
        aliases = [{"alias": alias, "version": version} for alias, version in self.aliases.items()]
        shop = {"name": "shop", "aliases": aliases, "tags": tags}
        if parts.path.endswith("registered-models/search"):
            return 200, {"registered_models": [shop]}
        if query.get("name") != "shop":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"}
        if parts.path.endswith("registered-models/get"):
            return 200, {"registered_model": shop}
        number = query.get("version") or self.aliases[query["alias"]]
        own = {DIGEST_TAG: number * 64, BASE_REVISION_TAG: "b", TEMPLATE_DIGEST_TAG: "t", CANARY_TAG: "10"}
        version = {"name": "shop", "version": number, "source": "", "tags": [{"key": key, "value": value} for key, value in own.items()]}
        return 200, {"model_version": version}


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(http_server(server.answer))


def shop(live: str, **more: Any) -> Callable[[], dict[str, Any]]:
    version = served(live, live * 64)
    return lambda: {"shop": model(version, version, **more)}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "logs" not in path.parts}


def test_status_shows_the_registry_against_each_replica_and_changes_nothing(home: Path, serve: Callable[..., str]) -> None:
    mlflow, one, two = serve(SmallMlflow()), serve(FakeReplica(shop("1"))), serve(FakeReplica(shop("1")))
    before = files_in(home)
    done = tuneserve(home, "status", "--replica", one, "--replica", two, "--replica", "http://127.0.0.1:9", "--json", mlflow=mlflow)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["ok"] and files_in(home) == before
    assert said["registry"]["shop"]["champion"] == {"version": "1", "digest": "1" * 64}
    assert {replica["url"]: replica["state"] for replica in said["replicas"]} == {one: "ready", two: "ready", "http://127.0.0.1:9": "unreachable"}
    assert ["cannot be reached" in problem for problem in said["problems"]] == [True]
    shown = as_process(home, "status", "--replica", one, mlflow=mlflow)
    assert shown.returncode == 0 and "every ready replica is as the registry says" in shown.stdout and one in shown.stdout


def test_status_fails_if_a_replica_lags_and_forgives_one_that_catches_up(home: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_status, "LAG_SECONDS", 0.05)
    mlflow = serve(SmallMlflow("2"))
    lagging = serve(FakeReplica(shop("1", error="rank 64 > 16", code="rank-too-large")))
    done = tuneserve(home, "status", "--replica", lagging, "--json", mlflow=mlflow)
    said = json.loads(done.stdout)
    assert done.returncode == 1 and not said["ok"] and "rank 64 > 16" in said["problems"][0]
    found = said["replicas"][0]["models"]["shop"]
    assert (found["lagging"], found["verified"], found["code"]) == (True, False, "rank-too-large")
    shown = tuneserve(home, "status", "--replica", lagging, mlflow=mlflow)
    assert shown.returncode == 1 and "1 LAGS" in shown.stdout and "problem: " in shown.stdout
    looks = iter("12222")

    def catching_up() -> dict[str, Any]:
        return shop(next(looks))()

    late = serve(FakeReplica(catching_up))
    assert tuneserve(home, "status", "--replica", late, "--json", mlflow=mlflow).returncode == 0


def test_status_works_while_mlflow_is_down(home: Path, serve: Callable[..., str]) -> None:
    replica = serve(FakeReplica(shop("1")))
    for mlflow, why in (
        ("http://127.0.0.1:9", "MLflow cannot be reached"),
        (None, "the embedded MLflow does not run"),
        ("sqlite:///x.db", "an MLflow server's"),
    ):
        done = tuneserve(home, "status", "--replica", replica, "--json", mlflow=mlflow)
        said = json.loads(done.stdout)
        assert done.returncode == 1 and why in said["registry"]["shop"]["error"] and why in said["problems"][0]
        assert said["replicas"][0]["models"]["shop"]["live"]["version"] == "1"
    assert not (home / "mlruns").exists() and not (home / ".tuneserve/services").exists()


def test_status_takes_names_and_replicas_from_a_serving_recipe(home: Path, serve: Callable[..., str]) -> None:
    mlflow, replica = serve(SmallMlflow()), serve(FakeReplica(shop("1")))
    recipe = home / "serving.yaml"
    text = f"name: r\nbase_model: base\nfollow: [shop, toys]\nfollow_tag: team=a\nreplicas: ['{replica}', 'http://127.0.0.1:9']\n"
    recipe.write_text(text)
    done = tuneserve(home, "status", "--serving", "serving.yaml", "--json", mlflow=mlflow)
    said = json.loads(done.stdout)
    assert done.returncode == 1 and sorted(said["registry"]) == ["shop", "toys"]
    assert any("does not follow toys" in problem for problem in said["problems"])
    recipe.write_text(text.replace(", toys", ""))
    assert tuneserve(home, "status", "--serving", "serving.yaml", "--json", mlflow=mlflow).returncode == 0
    recipe.write_text(text.replace(", toys", "") + "unreachable_replicas: fail\n")
    assert tuneserve(home, "status", "--serving", "serving.yaml", "--json", mlflow=mlflow).returncode == 1


def test_status_shows_a_canary_and_what_is_off(home: Path, serve: Callable[..., str]) -> None:
    registry = SmallMlflow("1", "2")
    off = Disabled("wrong prices", "me@here", "now")
    registry.tags = {DISABLED_TAG: off.as_json()}
    candidate = served("2", "2" * 64, percent=10.0)
    switched = {"model": json.loads(off.as_json()), "versions": {}}
    replica = serve(FakeReplica(shop("1", candidate={"wanted": candidate, "live": candidate}, disabled=switched)))
    mlflow = serve(registry)
    done = tuneserve(home, "status", "shop", "--replica", replica, "--json", mlflow=mlflow)
    entry = json.loads(done.stdout)["registry"]["shop"]
    assert done.returncode == 0 and entry["candidate"] == {"version": "2", "digest": "2" * 64, "percent": 10.0} and entry["disabled"] == switched
    shown = tuneserve(home, "status", "shop", "--replica", replica, mlflow=mlflow).stdout
    assert "2 at 10 %" in shown and "the name" in shown


def test_status_outside_a_project_makes_nothing(tmp_path: Path) -> None:
    done = tuneserve(tmp_path, "status", "--json")
    assert done.returncode == 1 and "tuneserve up" in json.loads(done.stdout)["problems"][0] and not list(tmp_path.iterdir())


def test_what_needs_no_flow_imports_no_prefect() -> None:
    code = "import sys, pipeline.promotion, pipeline.fleet_status, pipeline.cli_status\nprint([name for name in ('prefect', 'torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[tuple[Registry, Version]]:
    """MLflow's real store in a file, with shop/1, the champion, and shop/2. No canary runs before a test, nor after it."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, folder)
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    with contextlib.chdir(folder):  # where artifacts go
        for scale in (1.0, 2.0):
            adapter = read_adapter(write_adapter(folder / f"adapter-{scale}", scale))
            with registry.run("shop", {}, {}) as run:
                version = registry.register("shop", run.run_id, adapter, {}, "base", "template", "i")
        registry.move_champion("shop", "1")
        yield registry, version


def following(registry: Registry) -> FakeReplica:
    """A replica that reads MLflow's store at every question."""

    def models() -> dict[str, Any]:
        found = registry.deployment("shop")
        champion, candidate = (registry.version("shop", number) if number else None for number in (found.champion, found.candidate))
        live = served(champion.version, champion.digest) if champion else None
        share = served(candidate.version, candidate.digest, percent=float(candidate.canary_percent or 0)) if candidate else None
        off = {tag: json.loads(record.as_json()) for tag, record in found.switched_off.items()}
        versions = {tag.split(".")[2]: record for tag, record in off.items() if tag != DISABLED_TAG}
        return {"shop": model(live, live, candidate={"wanted": share, "live": share}, disabled={"model": off.get(DISABLED_TAG), "versions": versions})}

    return FakeReplica(models)


def test_canaries_and_switches_from_the_command_line(home: Path, registered: tuple[Registry, Version], serve: Callable[..., str]) -> None:
    registry, second = registered
    url = serve(following(registry))

    def run(*args: str) -> Any:
        done = tuneserve(home, *args, "--replica", url, "--json", mlflow=registry.uri)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    registry.move_candidate("shop", second.version)
    said = run("canary", "shop", "25%")
    assert (said["version"], said["canary_percent"], said["replicas"], said["unreachable"]) == (2, 25.0, [url], [])
    assert registry.version("shop", "2").canary_percent == "25"
    assert run("canary", "shop", "end")["ended_canary"] == "shop/2" and registry.deployment("shop").candidate is None
    off = run("disable", "shop/1", "--reason", "wrong prices")
    assert off["disabled"]["reason"] == "wrong prices" and off["changed"] and off["version"] == 1
    assert registry.deployment("shop").tags_of("1")
    shown = tuneserve(home, "enable", "shop/1", "--replica", url, mlflow=registry.uri)
    assert shown.returncode == 0 and f"shop/1 is switched on\nit is so on {url}" in shown.stdout


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1.5m", 90), (" 2m ", 120)])
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert cli_serving.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["10", "", "0s", "-1m", "1d", "m", "nan s", "1h30m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="90s, 10m or 1h"):
        cli_serving.seconds_of(text)


def test_canary_steps_grow() -> None:
    assert cli_serving._percents("10%") == [10.0] and cli_serving._percents("5%,25%, 50") == [5.0, 25.0, 50.0]
    for text in ("25%,5%", "5%,5%"):
        with pytest.raises(InvalidInput, match="shares that grow"):
            cli_serving._percents(text)
    with pytest.raises(InvalidInput, match="0% to 100%"):
        cli_serving._percents("5%,,50%")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--watch", "10"], "is no duration"),
        (["--watch", "10m", "--no-wait"], "what is watched must be live first"),
        (["--canary", "5%,25%"], "say for how long: --watch 10m"),
        (["--canary", "5%,25%", "--watch", "soon"], "is no duration"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_starts(home: Path, options: list[str], said: str) -> None:
    before = files_in(home)
    done = tuneserve(home, "promote", "shop/2", *options, "--json")
    assert done.returncode == 2 and said in json.loads(done.stdout)["errors"][0]["message"] and files_in(home) == before


def test_a_change_that_cannot_be_made_says_the_remedy(home: Path, registered: tuple[Registry, Version]) -> None:
    done = tuneserve(home, "canary", "shop", "10%", "--json", mlflow=registered[0].uri)
    assert done.returncode == 1
    assert "no canary runs; start one: tuneserve promote shop/VERSION --canary 10%" in json.loads(done.stdout.splitlines()[-1])["errors"][0]["message"]
