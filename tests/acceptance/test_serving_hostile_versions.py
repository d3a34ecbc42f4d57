"""Damaged and hostile versions, promoted by hand in MLflow: each is refused with a reason of its own, the champion keeps answering, the server lives."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from pipeline.registry import Version
from pipeline.services import DATABASE
from tests.acceptance import zoo
from tests.acceptance.figures import show
from tests.acceptance.load import Plan, loading
from tests.acceptance.serving_environment import BASE, Server, World, engine_name, wait_until

MODEL = "zoo"
TAG_KEY, TAG_VALUE = "zoo.follow", "yes"
BAD_NAMES = (BASE, "image", "..", "a" * 300, "../../etc", "catalog/1")
"""Of registered models. MLflow's API takes only some of them; the others are written into its database."""
REFUSED_SECONDS = 20.0


def refusal(server: Server, version: Version) -> dict[str, Any] | None:
    """What the replica says of a version that it refuses."""
    found = [each for each in server.model(version.name)["refused"] if (each["version"], each["digest"]) == (version.version, version.digest)]
    return found[0] if found else None


def show_animal(world: World, server: Server, champion: Version, version: Version) -> dict[str, Any]:
    """Promotes a bad version; its refusal, once status says so too and everything else is as it was."""
    world.set_alias(version)
    refused = wait_until(lambda: refusal(server, version), REFUSED_SECONDS, lambda: f"{version.label} refused: {json.dumps(server.model(MODEL))}")
    assert server.is_live(champion) and server.answering(MODEL) == engine_name(champion)
    assert server.alive()
    code, status = world.status(server)
    said = json.dumps(status)
    assert code == 1 and refused["code"] in said, said
    return refused


def follow_bad_names(world: World, folder: Path) -> None:
    """A good adapter as champion of a registered model under each of BAD_NAMES, with the tag that the replica follows."""
    for number, name in enumerate(BAD_NAMES):
        allowed = f"zoo-name-{number}"
        version = world.variant(allowed, 0.5 + 0.01 * number, folder / allowed)
        world.set_alias(version)
        with contextlib.closing(sqlite3.connect(world.project.mlruns / DATABASE, timeout=30)) as database, database:
            for table in ("registered_model_aliases", "registered_model_tags", "model_version_tags", "model_versions"):
                database.execute(f"UPDATE {table} SET name = ? WHERE name = ?", (name, allowed))  # noqa: S608
            database.execute("UPDATE registered_models SET name = ? WHERE name = ?", (name, allowed))
            database.execute("INSERT INTO registered_model_tags (key, value, name) VALUES (?, ?, ?)", (TAG_KEY, TAG_VALUE, name))


def untag(world: World) -> None:
    """Takes the tag from all models again, so that no other script meets them."""
    with contextlib.closing(sqlite3.connect(world.project.mlruns / DATABASE, timeout=30)) as database, database:
        database.execute("DELETE FROM registered_model_tags WHERE key = ?", (TAG_KEY,))


def test_hostile_versions_are_refused_each_with_its_reason(world: World, tmp_path: Path) -> None:
    champion = world.variant(MODEL, 0.9, tmp_path / "champion")
    world.set_alias(champion)
    animals = [(animal, zoo.register(world, MODEL, animal, number, tmp_path / str(number))) for number, animal in enumerate(zoo.ZOO)]
    refusals: dict[str, dict[str, Any]] = {}
    try:
        with world.serving("zoo", follow=[MODEL], follow_tag=f"{TAG_KEY}={TAG_VALUE}", forget_after_seconds=2) as server:
            server.wait_live(champion)
            with loading(Plan(server.url, models=(MODEL, BASE), clients=2, pause_seconds=0.1), tmp_path) as load:
                for animal, version in animals:
                    refusals[animal.kind] = show_animal(world, server, champion, version)
                world.set_alias(champion)
                follow_bad_names(world, tmp_path)
                names = wait_until(lambda: bad_names(server), REFUSED_SECONDS, lambda: f"bad names refused: {json.dumps(server.adapters()['models'])}")
                listed = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
                _, status = world.status(server)
                assert {name: status["replicas"][0]["models"][name]["code"] for name in BAD_NAMES} == names
                assert server.alive() and server.answering(MODEL) == engine_name(champion)
                answers = load.stop()
            wait_until(lambda: server.adapters()["slots"]["resident"] <= 1, 60, lambda: f"nothing but the champion loaded: {server.adapters()['slots']}")
    finally:
        untag(world)
    failed = [answer for answer in answers if not answer.ok]
    strayed = {answer.model for answer in answers if answer.model not in (BASE, engine_name(champion))}
    codes = {kind: refused["code"] for kind, refused in refusals.items()}
    show(refused=codes, bad_names={name[:12]: code for name, code in names.items()}, requests=len(answers), failed=len(failed))
    assert failed == [] and strayed == set()
    assert {animal.kind: codes[animal.kind] in animal.codes for animal in zoo.ZOO} == {animal.kind: True for animal in zoo.ZOO}
    assert all(len(refused["message"]) > 20 for refused in refusals.values())
    assert set(listed) == {BASE, MODEL, champion.label}


def bad_names(server: Server) -> dict[str, str]:
    """The reason given for each of BAD_NAMES; empty until all have one."""
    models = server.adapters()["models"]
    found = {name: models[name]["code"] for name in BAD_NAMES if name in models}
    return found if found == dict.fromkeys(BAD_NAMES, "bad-name") else {}
