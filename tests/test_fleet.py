"""Where replicas are, and that they are asked side by side."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import fleet, services
from pipeline.errors import ServingError
from pipeline.fleet import addresses_of, open_fleet, resolve
from pipeline.project import Project
from pipeline.recipe import ServingRecipe
from pipeline.services import Service
from pipeline.serving.launch import adapters_token
from tests.replicas import TOKEN, FakeReplica, fleet_of


def recipe(**more: Any) -> ServingRecipe:
    return ServingRecipe.model_validate({"name": "r", "base_model": "base", "follow": ("shop",), **more})


def resolving(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    def getaddrinfo(host: str, port: int, type: int) -> list[Any]:
        if not hosts:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, type, 6, "", (address, port)) for address in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_name_stands_for_every_address_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "10.0.0.1", "10.0.0.2", "10.0.0.1", "fd00::1")
    assert resolve("dns://replicas:8000") == [("http://10.0.0.1:8000", None), ("http://10.0.0.2:8000", None), ("http://[fd00::1]:8000", None)]
    assert resolve("dns+https://replicas")[0] == ("https://10.0.0.1:443", "replicas:443")
    assert resolve("https://replicas:1/") == [("https://replicas:1", None)]


def test_a_name_without_an_address_is_an_unreachable_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch)
    with fleet.Fleet(["dns://replicas:8000"], TOKEN) as found:
        (seen,) = found.looks()
    assert (seen.url, seen.state, found.replicas) == ("dns://replicas:8000", "unreachable", ())
    assert "the name has no address (Name or service not known)" in seen.why


def test_replicas_are_asked_side_by_side_and_each_is_what_it_says() -> None:
    together = threading.Barrier(4, timeout=5)

    def models() -> dict[str, Any]:
        together.wait()
        return {}

    replicas = {
        "http://a:1": FakeReplica(models),
        "http://b:1": FakeReplica(models, ready=False),
        "http://c:1": FakeReplica(models),
        "http://d:1": FakeReplica(models),
        "http://e:1": FakeReplica(dict, away=True),
        "http://f:1": FakeReplica(dict, token="other"),
    }
    with fleet_of(replicas) as found:
        looks = found.looks()
    assert [seen.state for seen in looks] == ["ready", "not-ready", "ready", "ready", "unreachable", "refuses-us"]
    assert looks[0].why == "" and "no champion yet" in looks[1].why and looks[4].status is None


def test_a_replica_that_is_named_twice_is_one() -> None:
    with fleet.Fleet(["http://a:1", "http://a:1/"], TOKEN) as found:
        assert [replica.url for replica in found.replicas] == ["http://a:1"]


def test_replicas_are_those_given_then_the_recipes_then_those_that_run_here(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [Service(f"vllm-{name}", f"http://{name}:1", 1, "", "", "", "") for name in ("r", "other")]
    monkeypatch.setattr(services, "find_services", lambda project, prefix: [found for found in running if found.name.startswith(prefix)])
    monkeypatch.setattr(services, "find_service", lambda project, name: next((found for found in running if found.name == name), None))
    listed = recipe(replicas=("http://x:1", "http://y:1"))
    assert addresses_of(project, listed, ["http://z:1"]) == ["http://z:1"]
    assert addresses_of(project, listed, []) == ["http://x:1", "http://y:1"]
    assert addresses_of(project, recipe(), []) == ["http://r:1"]
    assert addresses_of(project, recipe(name="stopped"), []) == []
    assert addresses_of(project, None, []) is None
    with open_fleet(project, None) as found:
        assert ([replica.url for replica in found.replicas], found.listed) == (["http://r:1", "http://other:1"], False)
    with open_fleet(project, ["http://z:1"], unreachable_fails=True) as found:
        assert found.listed and found.unreachable_fails and found.replicas[0].token
    assert not (project.state / "token").exists()


def test_the_projects_token_is_used(project: Project) -> None:
    Path(project.state / "token").write_text("hidden\n")
    with open_fleet(project, ["http://z:1"]) as found:
        assert found.replicas[0].token == "hidden"


def test_a_token_that_hosts_share_is_used_and_must_be_there(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared-token"
    monkeypatch.setenv("TUNESERVE_TOKEN_FILE", str(shared))
    with pytest.raises(ServingError, match="TUNESERVE_TOKEN_FILE: .* is not there; put the token of all replicas into it"):
        open_fleet(project, ["http://z:1"])
    shared.write_text("of all\n")
    with open_fleet(project, ["http://z:1"]) as found:
        assert found.replicas[0].token == "of all"
    assert adapters_token(project) == shared and not (project.state / "token").exists()
