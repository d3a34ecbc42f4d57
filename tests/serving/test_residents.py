"""Canary, kill switch, forgetting, room, damage and restart, against a fake engine that notices when a name leads to weights it does not hold."""

import asyncio
import json
import time

import pytest

from pipeline.errors import ServingError
from pipeline.serving.residents import LOOKS_AT_A_TIME
from pipeline.serving.traffic import Request
from pipeline.switch import Disabled
from pipeline.version import DISABLED_TAG, disabled_tag

OFF = Disabled("wrong prices", "ann", "2026-11-25")
SHOWN = {"reason": "wrong prices", "by": "ann", "at": "2026-11-25"}


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 20))


def status(follower):
    return follower.status()["models"]["catalog"]


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        await asyncio.sleep(0.01)


def test_candidate_is_callable_and_routed_by_its_share_until_promoted(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        world.want(candidate=world.version("2"), percent=10.0)
        await follower.sync(20.0)
        assert set(world.names.routes) == {"catalog", "catalog/1", "catalog/2"}
        route = world.names.routes["catalog"]
        assert (route.adapter.version, route.candidate.version, route.share) == ("1", "2", 0.1)
        assert status(follower)["candidate"]["live"]["percent"] == 10.0
        world.want(percent=25.0)
        await follower.sync(20.0)
        assert world.names.routes["catalog"].share == 0.25
        world.want(champion=world.version("2"))  # its alias `candidate` is still there for a moment
        await follower.sync(20.0)
        route = world.names.routes["catalog"]
        assert (route.adapter.version, route.candidate) == ("2", None) and status(follower)["candidate"]["live"] is None
        assert len(engine.loads) == 2

    run(scenario())


def test_candidate_that_is_refused_leaves_the_champion_alone(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        engine.without_effect = {"2"}
        world.want(candidate=world.version("2"), percent=50.0)
        await follower.sync(20.0)
        assert world.names.routes["catalog"].candidate is None and "catalog/2" not in world.names.routes
        assert status(follower)["code"] == "no-effect" and status(follower)["refused"][0]["version"] == "2"
        assert world.lora_id("2") not in engine.weights

    run(scenario())


def test_pinned_versions_are_callable_by_number_only(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        world.want(pinned=(world.version("2"), world.version("3")))
        await follower.sync(20.0)
        assert set(world.names.routes) == {"catalog", "catalog/1", "catalog/2", "catalog/3"}
        assert world.names.routes["catalog"].candidate is None
        world.want(pinned=())
        await follower.sync(20.0)
        assert set(world.names.routes) == {"catalog", "catalog/1"} and follower.status()["slots"]["forgetting"] == 2

    run(scenario())


@pytest.mark.parametrize(
    ("mode", "fallback"),
    [("error", "error"), ("base", "base"), ("previous", "1")],
)
@pytest.mark.parametrize("what", ["model", "version"])
def test_switching_off_and_on(world, engine, mode, fallback, what):
    async def scenario():
        follower = world.replica(engine, disabled_answers=mode)
        for number in ("1", "2"):
            world.promote(number)
            await follower.sync(20.0)
        world.want(off={DISABLED_TAG if what == "model" else disabled_tag("2", world.digests["2"]): OFF})
        await follower.sync(20.0)
        route = world.names.routes["catalog"]
        assert "switched off (since 2026-11-25; by ann; wrong prices)" in route.off
        assert (route.fallback if isinstance(route.fallback, str) else route.fallback.version) == fallback
        assert world.names.routes["catalog/2"].off and world.names.routes["catalog/2"].fallback == "error"
        assert bool(world.names.routes["catalog/1"].off) == (what == "model")
        shown = status(follower)["disabled"]
        assert shown == ({"model": SHOWN, "versions": {}} if what == "model" else {"model": None, "versions": {"2": SHOWN}})
        world.want(off={})
        await follower.sync(20.0)
        assert not any(route.off for route in world.names.routes.values())

    run(scenario())


def test_previous_that_is_off_too_is_no_fallback(world, engine):
    async def scenario():
        follower = world.replica(engine, disabled_answers="previous")
        for number in ("1", "2"):
            world.promote(number)
            await follower.sync(20.0)
        world.want(off={disabled_tag(number, world.digests[number]): OFF for number in ("1", "2")})
        await follower.sync(20.0)
        assert world.names.routes["catalog"].fallback == "error"

    run(scenario())


def test_candidate_that_is_off_gets_nobody(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        world.want(candidate=world.version("2"), percent=50.0, off={disabled_tag("2", world.digests["2"]): OFF})
        await follower.sync(20.0)
        assert world.names.routes["catalog"].candidate is None and not world.names.routes["catalog"].off

    run(scenario())


def test_what_is_forgotten_goes_in_order(world, engine):
    """Names first; the weights once the grace is over and no request can mean them; the folder stays in the cache."""

    async def scenario():
        follower = world.replica(engine, forget_after_seconds=0.05)
        await follower.start()
        for number in ("1", "2", "3"):
            world.promote(number)
            await until(lambda number=number: status(follower)["live"] and status(follower)["live"]["version"] == number)
            if number == "1":
                undecided, chosen = Request(), Request(chosen=True, lora_id=world.lora_id("1"))
                world.traffic.open(undecided)
                world.traffic.open(chosen)
                world.traffic.enter(world.lora_id("1"))
                world.metrics.used(world.lora_id("1"), "catalog", "1")
                world.metrics.finished("catalog", "1", "stop", 3, 4)
        assert "catalog/1" not in world.names.routes and set(world.names.routes) == {"catalog", "catalog/2", "catalog/3"}
        for let_go in (lambda: world.traffic.leave(world.lora_id("1")), lambda: world.traffic.close(undecided), lambda: world.traffic.close(chosen)):
            await asyncio.sleep(0.15)
            assert world.lora_id("1") in engine.weights
            let_go()
        assert b'version="1"' in exposition(world)
        await until(lambda: world.lora_id("1") not in engine.weights)
        assert engine.unloads == [world.lora_id("1")] and b'version="1"' not in exposition(world)
        assert (world.tmp_path / "state" / "adapters" / world.digests["1"]).is_dir()
        assert follower.status()["slots"] | {"misses": 0, "waits": 0} == {
            "max_loras": 4,
            "max_cpu_loras": 16,
            "resident": 2,
            "digests": sorted(world.digests[version] for version in ("2", "3")),
            "forgetting": 0,
            "misses": 0,
            "waits": 0,
        }

    run(scenario())


def test_version_that_is_wanted_again_while_it_is_unloaded_is_loaded_again(world, engine):
    """A name that was given to it meanwhile would lead to weights that are gone a moment later."""

    async def scenario():
        engine.unloading = asyncio.Event()
        follower = world.replica(engine, forget_after_seconds=0.0)
        await follower.start()
        for number in ("1", "2", "3"):
            world.promote(number)
            await until(lambda number=number: status(follower)["live"] and status(follower)["live"]["version"] == number)
        await until(lambda: engine.unloads == [world.lora_id("1")])
        world.promote("1")
        await follower.sync(0.2)
        assert status(follower)["live"]["version"] == "3"
        engine.unloading.set()
        await until(lambda: status(follower)["live"]["version"] == "1")
        assert world.lora_id("1") in engine.weights and [adapter.version for adapter in engine.loads] == ["1", "2", "3", "1"]

    run(scenario())


def test_what_the_engine_cannot_unload_is_still_here(world, engine, monkeypatch):
    async def scenario():
        follower = world.replica(engine, forget_after_seconds=0.0)
        unload, faults = engine.unload, [ServingError("vLLM still holds it")]

        async def unload_at_the_second_try(lora_id):
            if faults:
                raise faults.pop()
            await unload(lora_id)

        monkeypatch.setattr(engine, "unload", unload_at_the_second_try)
        await follower.start()
        for number in ("1", "2", "3"):
            world.promote(number)
            await until(lambda number=number: status(follower)["live"] and status(follower)["live"]["version"] == number)
        await until(lambda: world.lora_id("1") not in engine.weights)
        assert not faults and engine.unloads == [world.lora_id("1")]

    run(scenario())


def exposition(world) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(world.metrics._registry)


def test_version_that_is_wanted_again_in_time_is_not_loaded_again(world, engine):
    async def scenario():
        follower = world.replica(engine)
        for number in ("1", "2", "3", "1"):
            world.promote(number)
            await follower.sync(20.0)
        assert len(engine.loads) == 3 and world.names.routes["catalog"].adapter.version == "1"
        assert follower.status()["slots"]["forgetting"] == 1

    run(scenario())


def test_the_engine_never_has_to_drop_one_by_itself(world, engine):
    async def scenario():
        follower = world.replica(engine, max_loras=1, max_cpu_loras=5)
        most = 0
        for number in "123456789":
            world.promote(number)
            await follower.sync(20.0)
            assert status(follower)["live"]["version"] == number
            most = max(most, len(engine.weights))
        assert most == 4 and engine.unloads == [world.lora_id(number) for number in "12345"]

    run(scenario())


def test_a_place_is_taken_from_the_previous_champion_before_a_wanted_one_is_refused(world, engine):
    async def scenario():
        follower = world.replica(engine, max_loras=1, max_cpu_loras=4)
        for number in ("1", "2"):
            world.promote(number)
            await follower.sync(20.0)
        world.want(pinned=(world.version("3"),))
        await follower.sync(20.0)
        assert set(world.names.routes) == {"catalog", "catalog/1", "catalog/2", "catalog/3"}
        world.want(pinned=(world.version("3"), world.version("4")))
        await follower.sync(20.0)
        assert set(world.names.routes) == {"catalog", "catalog/2", "catalog/3", "catalog/4"}
        world.want(pinned=tuple(world.version(number) for number in "345"))
        await follower.sync(20.0)
        assert [refusal["code"] for refusal in status(follower)["refused"]] == ["no-room"] and "max_cpu_loras" in status(follower)["refused"][0]["message"]
        assert len(engine.weights) == 3

    run(scenario())


@pytest.mark.parametrize("harm", ["delete", "truncate", "chmod", "replace"])
def test_damaged_folder_is_said_and_mended_while_it_serves(world, engine, harm):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.start()
        folder = world.tmp_path / "state" / "adapters" / world.digests["1"]
        weights = folder / "adapter_model.safetensors"
        whole = weights.read_bytes()
        world.registry.away = True
        folder.chmod(0o755)
        if harm == "delete":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        elif harm == "truncate":
            weights.chmod(0o644)
            weights.write_bytes(whole[:10])
        elif harm == "replace":
            weights.unlink()
            weights.write_bytes(whole[::-1])
        else:
            folder.chmod(0)
        await until(lambda: "served from memory" in (status(follower)["versions"][0]["fault"] or ""))
        assert world.names.routes["catalog"].adapter.version == "1"
        world.registry.away = False
        follower.residents.get(world.digests["1"]).mend_at = 0.0
        await until(lambda: status(follower)["versions"][0]["fault"] is None)
        assert weights.read_bytes() == whole and oct(folder.stat().st_mode)[-3:] == "555"
        assert len(engine.loads) == 1

    run(scenario())


def test_what_the_engine_lost_is_put_back(world, engine, monkeypatch):
    monkeypatch.setattr("pipeline.serving.residents.LOOK_SECONDS", 0.0)

    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.start()
        engine.weights.clear()
        await until(lambda: world.lora_id("1") in engine.weights)

    run(scenario())


def test_cache_is_bounded_and_keeps_what_is_loaded(world, engine):
    one = sum(file.stat().st_size for file in world.registry.folders["1"].iterdir())

    async def scenario():
        follower = world.replica(engine, cache_bytes=4 * one, forget_after_seconds=0.0, poll_seconds=0.01)
        await follower.start()
        for number in "12345678":
            world.promote(number)
            await until(lambda number=number: status(follower)["live"] and status(follower)["live"]["version"] == number)
            await until(lambda: follower.status()["slots"]["forgetting"] == 0)
        kept = {folder.name for folder in (world.tmp_path / "state" / "adapters").iterdir()}
        assert len(kept) == 4 and {world.digests["7"], world.digests["8"]} <= kept
        assert follower.status()["cache"] == {"folders": 4, "bytes": 4 * one, "limit_bytes": 4 * one}

    run(scenario())


def test_restart_without_mlflow_brings_back_canary_switches_and_previous(world, engine, new_engine):
    async def before():
        follower = world.replica(engine)
        for number in ("1", "2"):
            world.promote(number)
            await follower.sync(20.0)
        world.want(candidate=world.version("3"), percent=5.0, pinned=(world.version("4"),), off={DISABLED_TAG: OFF})
        await follower.sync(20.0)
        return dict(world.names.routes)

    async def after():
        follower = world.replica(new_engine())
        await follower.start()
        assert follower.ready
        return world.names.routes

    routes = run(before())
    world.registry.away = True
    assert run(after()) == routes and set(routes) == {"catalog", "catalog/1", "catalog/2", "catalog/3", "catalog/4"}
    assert routes["catalog"].off and routes["catalog"].share == 0.05


def test_a_fresh_replica_without_mlflow_is_not_ready(world, engine):
    world.registry.away = True

    async def scenario():
        follower = world.replica(engine, first_sync_seconds=0.2)
        await follower.start()
        assert not follower.ready and "cannot be reached" in follower.waits_for()["catalog"]
        world.promote("1")
        world.registry.away = False
        await until(lambda: follower.ready)
        world.registry.away = True
        await asyncio.sleep(0.1)
        assert follower.ready and world.names.routes["catalog"].adapter.version == "1"

    run(scenario())


def test_a_champion_that_is_refused_does_not_hold_a_new_replica_for_ever(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1", base_revision="base-2")
        await follower.start()
        assert follower.ready and status(follower)["code"] == "wrong-base"

    run(scenario())


def test_models_are_found_by_their_tag(world, engine):
    world.registry.tags["team=shop"] = ["catalog", "image", "..", "glm-4.5v", "x" * 300]

    async def scenario():
        follower = world.replica(engine, models=(), follow_tag="team=shop")
        world.promote("1")
        await follower.start()
        assert follower.ready and set(world.names.routes) == {"catalog", "catalog/1"}
        models = follower.status()["models"]
        assert {name: model["code"] for name, model in models.items()} == {"catalog": None} | dict.fromkeys(["image", "..", "glm-4.5v", "x" * 300], "bad-name")
        world.registry.tags["team=shop"] = ["late"]
        world.promote("2", model="late")
        await until(lambda: "late" in world.names.routes)
        assert "catalog" in world.names.routes  # it lost its tag; what is served stays served

    run(scenario())


def test_a_model_that_vanishes_is_served_on_with_its_canary(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        world.want(candidate=world.version("2"), percent=10.0)
        await follower.sync(20.0)
        routes = dict(world.names.routes)
        del world.registry.wanted["catalog"]
        await follower.sync(20.0)
        assert world.names.routes == routes
        assert status(follower)["code"] == "model-missing" and "catalog/1 is still served" in status(follower)["error"]

    run(scenario())


def test_keys_that_lead_nowhere_are_refused_by_what_the_engine_says(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        engine.unmapped = ("model.layers.0.self_attn.q_proj",)
        await follower.sync(20.0)
        assert status(follower)["code"] == "keys-unmatched" and not engine.weights and not world.names.routes

    run(scenario())


def test_a_version_that_disturbs_others_is_taken_out_again(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        engine.leaks = 0.5
        world.promote("2")
        await follower.sync(20.0)
        assert status(follower)["code"] == "disturbs-others" and set(engine.weights) == {world.lora_id("1")}

    run(scenario())


def test_what_one_look_shows_by_chance_refuses_nobody(world, engine):
    async def scenario():
        follower = world.replica(engine)
        world.promote("1")
        await follower.sync(20.0)
        engine.noise = [0.17, 0.05]
        world.promote("2")
        await follower.sync(20.0)
        assert status(follower)["live"]["version"] == "2" and not engine.noise and engine.unloads == []
        engine.noise = [0.17, 0.16]
        world.promote("3")
        await follower.sync(20.0)
        assert status(follower)["code"] == "disturbs-others" and status(follower)["live"]["version"] == "2"

    run(scenario())


def test_only_what_is_in_slots_is_asked_again(world, engine):
    """More adapters than slots: asking them all would move weights in and out between users' steps."""
    engine.slots = 2

    async def scenario():
        follower = world.replica(engine)
        for version in "123":
            world.promote(version)
            await follower.sync(20.0)
        assert status(follower)["live"]["version"] == "3"
        return [adapter.version if adapter else None for adapter in engine.asked]

    assert run(scenario()) == [None, "1", None, "2", None, "1", "3", None, "2"]


def test_a_load_asks_few_at_a_time(world, engine):
    """All at once would make one step long for every stream."""

    async def scenario():
        follower = world.replica(engine, models=tuple("abcde"))
        for number, model in enumerate("abcde", 1):
            world.promote(str(number), model=model)
            await follower.sync(20.0)
        # the last asks for itself, the base and four others
        assert [adapter.model if adapter else None for adapter in engine.asked][-6:] == ["e", None, *"abcd"] and engine.most_looking == LOOKS_AT_A_TIME

    run(scenario())


def test_two_models_with_the_same_adapter_share_its_weights(world, engine):
    async def scenario():
        follower = world.replica(engine, models=("catalog", "copy"), forget_after_seconds=0.0)
        world.promote("1")
        world.promote("1", model="copy")
        await follower.start()
        assert {"catalog", "copy"} <= set(world.names.routes) and len(engine.loads) == 1
        world.promote("2")
        world.promote("3")
        await until(lambda: world.names.routes["catalog"].adapter.version == "3")
        await asyncio.sleep(0.1)
        assert world.lora_id("1") in engine.weights and world.names.routes["copy"].adapter.version == "1"

    run(scenario())


def test_live_json_is_whole(world, engine):
    world.promote("1")
    run(world.replica(engine).start())
    saved = json.loads((world.tmp_path / "state" / "live.json").read_text())
    assert saved["catalog"]["champion"]["digest"] == world.digests["1"] and saved["catalog"]["off"] == {}
