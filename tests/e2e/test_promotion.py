"""Versions come and go under the same served name: promoted, refused, called by number, left without an alias. Runs after the main job's tests."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
from openai import OpenAI, PermissionDeniedError
from safetensors.numpy import load_file, save_file

from pipeline.adapter import read_adapter
from pipeline.evaluation import openai_messages
from pipeline.registry import Registry, Version
from pipeline.serving.hint import new_hint
from pipeline.version import CHAMPION, DIGEST_TAG
from tests.e2e.conftest import Quickstart


def answering(quickstart: Quickstart, model: str) -> str:
    """The version that answers a request for `model`."""
    example = quickstart.sandbox.held_out[0]
    client = OpenAI(base_url=quickstart.openai, api_key="none")
    return client.chat.completions.create(model=model, messages=openai_messages(example), max_tokens=16, temperature=0).model


def register_variant(quickstart: Quickstart, folder: Path, scale: float) -> Version:
    """The first version with its update scaled, registered as the next one."""
    registry: Registry = quickstart.registry
    first = registry.version("catalog", "1")
    shutil.copytree(quickstart.sandbox.root / ".tuneserve/runs" / first.run_id / "adapter", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    scaled = {key: value * scale if "lora_B" in key else value for key, value in weights.items()}
    save_file(scaled, folder / "adapter_model.safetensors")
    with registry.run("variant", {}, {}) as run:
        return registry.register("catalog", run.run_id, read_adapter(folder), {}, first.base_revision, first.template_digest, "variant")


def served(quickstart: Quickstart) -> dict[str, object]:
    answer = httpx.get(f"{quickstart.replica}/adapters", headers={"Authorization": f"Bearer {quickstart.token}"})
    found: dict[str, object] = answer.json()["models"]["catalog"]
    return found


@pytest.fixture(scope="module")
def second(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Version:
    version = register_variant(quickstart, tmp_path_factory.mktemp("second") / "adapter", 0.5)
    answer = quickstart.sandbox.json("promote", "catalog", "--force", "--json")
    assert (answer["version"], answer["previous"]) == (int(version.version), "catalog/1")
    assert answer["replicas"] == [quickstart.replica]
    return version


def test_a_promoted_version_answers_and_the_one_before_stays_callable(quickstart: Quickstart, second: Version) -> None:
    assert answering(quickstart, "catalog") == f"{second.label}@{second.digest[:8]}"
    assert answering(quickstart, "catalog/1").startswith("catalog/1@")
    assert answering(quickstart, "glm-4.5v") == "glm-4.5v"
    ids = [model["id"] for model in httpx.get(f"{quickstart.openai}/models").json()["data"]]
    assert sorted(ids) == ["catalog", "catalog/1", second.label, "glm-4.5v"]


def test_a_version_that_is_not_what_its_tag_says_is_refused_and_the_alias_goes_back(quickstart: Quickstart, second: Version, tmp_path: Path) -> None:
    bad = register_variant(quickstart, tmp_path / "adapter", 0.25)
    quickstart.registry.client.set_model_version_tag("catalog", bad.version, DIGEST_TAG, "0" * 64)
    done = quickstart.sandbox.run("promote", bad.label, "--force", "--json", seconds=120)
    assert done.returncode == 1
    assert "changed after registration" in done.stderr and "alias is back" in done.stderr
    assert not json.loads(done.stdout.splitlines()[-1])["ok"]
    assert quickstart.registry.champion("catalog") == second
    assert answering(quickstart, "catalog").startswith(f"{second.label}@")


def test_an_alias_that_vanishes_leaves_its_version_serving(quickstart: Quickstart, second: Version) -> None:
    quickstart.registry.move_champion("catalog", None)
    body, headers = new_hint(quickstart.token, "catalog", CHAMPION, "1")
    assert httpx.post(f"{quickstart.replica}/adapters/sync", content=body, headers=headers, timeout=30).status_code == 200
    assert answering(quickstart, "catalog").startswith(f"{second.label}@")
    assert CHAMPION in str(served(quickstart)["error"])


def test_going_back_is_moving_the_alias(quickstart: Quickstart, second: Version) -> None:
    assert quickstart.sandbox.json("promote", "catalog/1", "--force", "--json")["version"] == 1
    assert answering(quickstart, "catalog").startswith("catalog/1@")


def test_rollback_is_the_champion_before(quickstart: Quickstart, second: Version) -> None:
    assert quickstart.sandbox.json("promote", second.label, "--force", "--json")["previous"] == "catalog/1"
    done = quickstart.sandbox.json("rollback", "catalog", "--json")
    assert (done["version"], done["previous"], done["replicas"]) == (1, second.label, [quickstart.replica])
    assert answering(quickstart, "catalog").startswith("catalog/1@")
    assert answering(quickstart, second.label) == f"{second.label}@{second.digest[:8]}"  # still loaded


def test_a_canary_gets_its_share_and_status_shows_it(quickstart: Quickstart, second: Version) -> None:
    started = quickstart.sandbox.json("promote", second.label, "--canary", "50%", "--json")
    assert (started["canary_percent"], started["replicas"]) == (50.0, [quickstart.replica])
    client = OpenAI(base_url=quickstart.openai, api_key="none")
    hello = [{"role": "user", "content": "hello"}]

    def side(user: str) -> str:
        return client.chat.completions.create(model="catalog", messages=hello, max_tokens=1, user=user).model

    sides = {user: side(user) for user in map(str, range(40))}
    assert {model.partition("@")[0] for model in sides.values()} == {"catalog/1", second.label}
    assert all(side(user) == model for user, model in sides.items())
    status = quickstart.sandbox.json("status", "--json")
    assert status["ok"] and status["registry"]["catalog"]["candidate"]["percent"] == 50.0
    assert status["replicas"][0]["models"]["catalog"]["candidate"]["live"]["version"] == second.version
    quickstart.sandbox.json("canary", "catalog", "0%", "--json")
    assert {side(user) for user in sides} == {f"catalog/1@{quickstart.registry.version('catalog', '1').digest[:8]}"}
    assert quickstart.sandbox.json("canary", "catalog", "end", "--json")["ended_canary"] == second.label


def test_the_kill_switch(quickstart: Quickstart) -> None:
    quickstart.sandbox.json("disable", "catalog", "--reason", "wrong prices", "--json")
    with pytest.raises(PermissionDeniedError, match="switched off .*wrong prices"):
        answering(quickstart, "catalog")
    assert answering(quickstart, "glm-4.5v") == "glm-4.5v"
    assert quickstart.sandbox.run("promote", "catalog/1", "--json").returncode == 1
    quickstart.sandbox.json("enable", "catalog", "--json")
    assert answering(quickstart, "catalog").startswith("catalog/1@")


def test_metrics_tell_versions_apart(quickstart: Quickstart, second: Version) -> None:
    metrics = httpx.get(f"{quickstart.replica}/metrics").text
    for version in ("1", second.version):
        assert f'tuneserve_time_to_first_token_seconds_count{{served="catalog",version="{version}"}}' in metrics
    assert 'tuneserve_live_version{served="catalog"} 1.0' in metrics and 'tuneserve_refusals_total{code="digest-mismatch",served="catalog"}' in metrics


def test_status_is_wrong_while_a_replica_cannot_follow(quickstart: Quickstart, second: Version) -> None:
    """The alias moved by hand to a version of another base: refused with its reason, the champion answers on, status says so."""
    registry = quickstart.registry
    with registry.run("foreign", {}, {}) as run:
        folder = quickstart.sandbox.root / ".tuneserve/runs" / registry.version("catalog", "1").run_id / "adapter"
        foreign = registry.register("catalog", run.run_id, read_adapter(folder), {}, "b" * 64, second.template_digest, "foreign")
    registry.move_champion("catalog", foreign.version)
    try:
        body, headers = new_hint(quickstart.token, "catalog", CHAMPION, foreign.version)
        httpx.post(f"{quickstart.replica}/adapters/sync", content=body, headers=headers, timeout=30)
        assert answering(quickstart, "catalog").startswith("catalog/1@")
        done = quickstart.sandbox.run("status", "--json", seconds=60)
        said = json.loads(done.stdout.splitlines()[-1])["replicas"][0]["models"]["catalog"]
        assert done.returncode == 1 and said["lagging"] and said["code"] == "wrong-base"
    finally:
        registry.move_champion("catalog", "1")
    assert quickstart.sandbox.json("status", "--json", seconds=60)["ok"]
