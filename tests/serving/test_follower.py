"""The sync logic against a fake engine and a fake registry; what vLLM and MLflow really do is in the contract tests."""

import asyncio
import itertools
import json
import logging

import pytest

from pipeline.serving import followed_model as module
from pipeline.serving.engine import ServedAdapter, lora_id


def model_status(follower, name="catalog"):
    return follower.status()["models"][name]


async def synced(follower):
    await follower.sync(20.0)
    return follower


def answering(world, name="catalog"):
    """The number of the version that a name answers with; None if it is not callable."""
    route = world.names.routes.get(name)
    return route.adapter.version if route else None


def test_champion_is_fetched_loaded_and_served_under_both_names(world, engine):
    world.promote("1")
    follower = world.replica(engine)
    asyncio.run(follower.sync(20.0))
    digest = world.digests["1"]
    assert set(world.names.routes) == {"catalog/1", "catalog"}
    assert {route.adapter.engine_name for route in world.names.routes.values()} == {f"catalog/1@{digest[:8]}"}
    status = model_status(follower)
    assert status["wanted"] == {"version": "1", "digest": digest}
    assert status["live"] | {"loaded_at": ""} == {"version": "1", "digest": digest, "engine_name": f"catalog/1@{digest[:8]}", "loaded_at": ""}
    assert status["error"] is None and follower.status()["mlflow_error"] is None
    assert follower.status()["last_sync_age_seconds"] < 5


def test_alias_moves_there_and_back_with_one_download_each(world, engine):
    async def scenario():
        follower = world.replica(engine)
        for number in ("1", "2", "1", "1"):
            world.promote(number)
            await follower.sync(20.0)
            assert answering(world) == number

    asyncio.run(scenario())
    assert world.registry.fetches == 2 and len(engine.loads) == 2
    assert set(world.names.routes) == {"catalog", "catalog/1", "catalog/2"}  # the one before stays callable


def test_recreated_version_number_is_another_adapter(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        first = world.names.routes["catalog/1"].adapter
        world.registry.folders["1"] = world.registry.folders["2"]
        world.promote("1", digest=world.digests["2"])
        await follower.sync(20.0)
        return first, world.names.routes["catalog/1"].adapter

    first, second = asyncio.run(scenario())
    assert first.engine_name != second.engine_name and first.lora_id != second.lora_id and first.folder != second.folder


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"digest": None}, "has no tag tuneserve.digest"),
        ({"base_revision": None, "template_digest": None}, "has no tag tuneserve.base_revision, tuneserve.template_digest"),
        ({"digest": "../../etc"}, "is not a SHA-256"),
        ({"base_revision": "base-2"}, "trained on base base-2, this server has base-1"),
        ({"template_digest": "template-2"}, "trained with chat template template-2"),
        ({"digest": "0" * 64}, "they were changed after registration"),
    ],
)
def test_refused_version_says_why_and_the_live_one_stays(world, engine, changed, reason):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        world.promote("2", **changed)
        return await synced(follower)

    status = model_status(asyncio.run(scenario()))
    assert reason in status["error"] and status["error"].startswith("catalog/2: ")
    assert status["live"]["version"] == "1" and answering(world) == "1" and "catalog/2" not in world.names.routes
    assert status["wanted"]["version"] == "2"


@pytest.mark.parametrize("name", ["glm-4.5v", "image", "%2e", "a b", "x" * 65])
def test_names_that_would_hijack_are_never_served(world, engine, name):
    world.promote("1", model=name)
    follower = world.replica(engine, models=(name,))
    asyncio.run(follower.sync(20.0))
    assert world.names.routes == {} and world.registry.fetches == 0
    assert "register the adapter under another name" in model_status(follower, name)["error"]


def test_refused_load_is_retried_later_and_later(world, engine, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    engine.refuses = {"1"}
    world.promote("1")

    async def scenario():
        follower = world.replica(engine)
        attempts = []
        for _ in range(400):
            before = len(engine.loads)
            await follower.sync(20.0)
            if len(engine.loads) > before:
                attempts.append(now[0])
            now[0] += 1
        return follower, attempts

    follower, attempts = asyncio.run(scenario())
    assert [later - earlier for earlier, later in itertools.pairwise(attempts)] == [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert "rank 64" in model_status(follower)["error"] and world.names.routes == {} and not engine.weights


def test_refusal_of_one_version_does_not_delay_the_next(world, engine):
    async def scenario():
        follower = world.replica(engine)
        engine.refuses = {"1"}
        world.promote("1")
        await follower.sync(20.0)
        world.promote("2")
        return await synced(follower)

    status = model_status(asyncio.run(scenario()))
    assert status["live"]["version"] == "2" and status["error"] is None


def test_faults_are_logged_once_per_change(world, engine, caplog):
    caplog.set_level(logging.INFO, "vllm.tuneserve")

    async def scenario():
        follower = world.replica(engine)
        world.promote("1", base_revision="base-2")
        for _ in range(5):
            await follower.sync(20.0)
        world.registry.away = True
        for _ in range(5):
            await follower.sync(20.0)
        world.registry.away = False
        await follower.sync(20.0)

    asyncio.run(scenario())
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "catalog/1: trained on base base-2, this server has base-1",
        "catalog: http://mlflow: MLflow cannot be reached",
        "catalog: MLflow answers again",
    ]
    assert vars(caplog.records[0]).items() >= {"event": "adapter refused", "model": "catalog", "version": "1"}.items()


def test_what_is_served_is_logged_with_name_version_and_digest(world, engine, caplog):
    caplog.set_level(logging.INFO, "vllm.tuneserve")

    async def scenario():
        follower = world.replica(engine)
        for version in ("1", "2", "2"):
            world.promote(version)
            await follower.sync(20.0)
        return model_status(follower)["live"]["digest"]

    digest = asyncio.run(scenario())
    assert [(record.event, record.version) for record in caplog.records] == [
        (event, version) for version in ("1", "2") for event in ("adapter loaded", "served name flipped")
    ]
    assert (caplog.records[-1].model, caplog.records[-1].digest, caplog.records[-1].previous) == ("catalog", digest, "1")


def test_missing_alias_keeps_serving_and_says_so(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        world.want(champion=None)
        return await synced(follower)

    status = model_status(asyncio.run(scenario()))
    assert status["wanted"] is None and status["live"]["version"] == "1" and answering(world) == "1"
    assert "catalog/1 is still served" in status["error"]


def test_mlflow_away_keeps_serving_and_says_so(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        world.registry.away = True
        return await synced(follower)

    follower = asyncio.run(scenario())
    assert "cannot be reached" in follower.status()["mlflow_error"]
    assert model_status(follower)["live"]["version"] == "1" and model_status(follower)["wanted"]["version"] == "1"


def test_restart_with_mlflow_away_serves_the_last_champion(world, engine, new_engine):
    world.promote("2")
    asyncio.run(world.replica(engine).start())
    world.registry.away = True
    before = dict(world.names.routes)
    follower = world.replica(new_engine())
    asyncio.run(follower.start())
    assert follower.ready and world.names.routes == before and set(before) == {"catalog", "catalog/2"}


def test_restart_on_another_base_does_not_serve_the_old_champion(world, engine, new_engine):
    world.promote("1")
    asyncio.run(world.replica(engine).start())
    world.registry.away = True
    follower = world.replica(new_engine(), base_revision="base-2")
    asyncio.run(follower.start())
    assert world.names.routes == {} and "not restored" in model_status(follower)["error"] and not follower.ready


def test_two_fleets_of_two_bases_follow_one_registry(world, new_engine, tmp_path):
    """What a rebase rests on: the new base's replicas are ready though they refuse every champion, load what is on trial, and take over what the old ones refuse."""
    other = type(world)(tmp_path / "other")
    other.registry = world.registry

    async def scenario():
        old, new = world.replica(new_engine()), other.replica(new_engine(), base_revision="base-2")

        async def both():
            await synced(old)
            await synced(new)
            assert old.ready and new.ready

        world.promote("1")
        await both()
        assert (answering(world), answering(other)) == ("1", None)
        rebased = world.version("2", base_revision="base-2")
        world.want(pinned=(rebased,))
        await both()
        assert set(other.names.routes) == {"catalog/2"} and set(world.names.routes) == {"catalog", "catalog/1"}
        world.want(champion=rebased, pinned=())
        await both()
        assert (answering(world), answering(other)) == ("1", "2")
        assert "trained on base base-2, this server has base-1" in model_status(old)["error"] and model_status(new)["error"] is None

    asyncio.run(scenario())


@pytest.mark.parametrize("content", ["", "[]", '{"catalog": {"version": "1"}}', '{"catalog": 3}'])
def test_damaged_live_json_costs_the_restore_only(world, engine, content):
    world.promote("1")
    follower = world.replica(engine)
    (world.tmp_path / "state" / "live.json").write_text(content)
    asyncio.run(follower.start())
    assert answering(world) == "1"
    assert json.loads((world.tmp_path / "state" / "live.json").read_text())["catalog"]["champion"]["version"] == "1"


def test_damaged_folder_is_fetched_again_after_a_restart(world, engine, new_engine):
    world.promote("1")
    asyncio.run(world.replica(engine).start())
    config = world.names.routes["catalog"].adapter.folder / "adapter_config.json"
    config.chmod(0o644)
    config.write_text("{}")
    asyncio.run(world.replica(new_engine()).start())
    assert world.registry.fetches == 2 and json.loads(config.read_text())["r"] == 2 and answering(world) == "1"


def test_alias_moved_back_during_a_download_is_not_overruled(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        world.promote("2")
        world.registry.on_fetch = lambda: world.promote("1")
        await follower.sync(20.0)

    asyncio.run(scenario())
    assert answering(world) == "1" and set(world.names.routes) == {"catalog", "catalog/1"}


def test_slow_first_sync_does_not_hold_the_server_but_its_readiness(world, engine):
    world.promote("1")
    release = asyncio.Event()
    load = engine.load

    async def slow_load(adapter: ServedAdapter) -> None:
        await release.wait()
        await load(adapter)

    engine.load = slow_load

    async def scenario():
        follower = world.replica(engine, first_sync_seconds=0.05)
        await follower.start()
        assert not follower.ready and world.names.routes == {} and "being fetched" in follower.waits_for()["catalog"]
        release.set()
        await asyncio.sleep(0.2)
        assert follower.ready

    asyncio.run(scenario())
    assert answering(world) == "1"


def test_sync_asked_for_during_a_sync_sees_what_changed_since(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        started, release = asyncio.Event(), asyncio.Event()
        load = engine.load

        async def slow_load(adapter):
            started.set()
            await release.wait()
            await load(adapter)

        engine.load = slow_load
        running = asyncio.create_task(follower.sync(20.0))
        await started.wait()
        world.promote("2")
        asked = [asyncio.create_task(follower.sync(20.0)) for _ in range(5)]
        await asyncio.sleep(0.01)
        release.set()
        await asyncio.gather(running, *asked)

    asyncio.run(scenario())
    assert answering(world) == "2"
    assert world.registry.reads <= 5  # before and after each arrival; five callers shared one sync


def test_polling_follows_and_survives_a_bug(world, engine):
    async def scenario():
        follower = world.replica(engine)
        set_names, world.names.set = world.names.set, None  # a bug
        world.promote("1")
        await follower.start()
        assert "a fault in tuneserve" in model_status(follower)["error"]
        world.names.set = set_names
        for _ in range(200):
            if "catalog" in world.names.routes:
                return
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert answering(world) == "1"


def test_state_that_cannot_be_written_is_reported_and_following_goes_on(world, engine):
    world.promote("1")
    follower = world.replica(engine)
    (world.tmp_path / "state" / "live.unfinished").mkdir()
    asyncio.run(follower.sync(20.0))
    assert answering(world) == "1" and "live.json" in follower.status()["state_error"]


@pytest.mark.parametrize("digest", ["0" * 64, "f" * 64, f"{2**31 - 2:016x}" + "0" * 48, f"{2**31 - 1:016x}" + "0" * 48])
def test_engine_number_is_positive_and_fits_int32(digest):
    assert 1 <= lora_id(digest) <= 2**31 - 1


def test_two_digests_with_one_engine_number_are_not_both_served(world, engine, monkeypatch):
    monkeypatch.setattr("pipeline.serving.residents.lora_id", lambda digest: 7)

    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        world.promote("2")
        return await synced(follower)

    status = model_status(asyncio.run(scenario()))
    assert status["live"]["version"] == "1" and "belongs to adapter" in status["error"]
