"""Arms take turns: the order of runs, what is warmed up, what is on record, and when it is given up."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.arms import Arm
from pipeline.bench.record import LINES, Record, read_record
from pipeline.bench.serving import Load, measure
from pipeline.errors import ServingError
from tests.openai_server import BASE, FakeOpenAI, asked_models, openai_server

ARMS = {"base": (BASE,), "one": ("shop",), "mixed": ("shop", "shop/1")}


def bench(server: FakeOpenAI, folder: Path, load: Load, arms: dict[str, tuple[str, ...]] = ARMS) -> list[dict[str, Any]]:
    with openai_server(server) as url:
        chosen = [Arm(name, url, models) for name, models in arms.items()]
        measure(chosen, load, {}, Record(folder, {"kind": "serve"}), lambda text, fraction: None)
    return read_record(folder)[1]


def test_each_round_has_every_level_and_arms_go_to_and_fro() -> None:
    arms = [Arm(name, "http://a:1", ("m",)) for name in "ABC"]
    plan = Load({1: 2, 4: 4}, 2, 5, "image", 1).plan(arms)
    assert "".join(arm.name for _, _, arm in plan) == "ABCABC" + "CBACBA"
    assert [(number, level) for number, level, _ in plan][::3] == [(0, 1), (0, 4), (1, 1), (1, 4)]


def test_runs_are_on_record_in_the_order_of_the_plan_after_a_warm_up(tmp_path: Path) -> None:
    server = FakeOpenAI()
    load = Load({1: 3, 4: 4}, 2, 4, "mixed", 1)
    lines = bench(server, tmp_path / "out", load)
    assert [(line["round"], line["concurrency"], line["arm"]) for line in lines] == [
        (number, level, arm.name) for number, level, arm in load.plan([Arm(name, "", ()) for name in ARMS])
    ]
    assert all(len(line["requests"]["model"]) == {1: 3, 4: 4}[line["concurrency"]] and line["seconds"] > 0 for line in lines)
    assert lines[2]["requests"]["model"] == ["shop", "shop/1", "shop"] and lines[0]["requests"]["kind"] == ["image", "text", "image"]
    assert asked_models(server)[:4] == [BASE, "shop", "shop", "shop/1"]  # one at a time, but each adapter once
    assert len(server.bodies) == (1 + 1 + 2) + 3 * 4 + 2 * (3 * 3 + 3 * 4)
    asked = [json.dumps(body["messages"][1]) for body in server.bodies]
    assert len(set(asked)) == len(asked)


def test_failed_requests_are_on_record_and_do_not_end_it(tmp_path: Path) -> None:
    lines = bench(FakeOpenAI(fails=lambda number: "500" if number == 4 else None), tmp_path / "out", Load({2: 4}, 1, 4, "text", 1), {"base": (BASE,)})
    assert [error and error[:8] for error in lines[0]["requests"]["error"]].count("HTTP 500") == 1


def test_an_arm_that_is_not_answered_at_all_ends_it_and_what_was_measured_stays(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"base: none of 2 requests to glm-4.5v at http.* was answered: HTTP 500"):
        bench(FakeOpenAI(fails=lambda number: "500"), tmp_path / "cold", Load({2: 4}, 1, 4, "text", 1))
    assert read_record(tmp_path / "cold")[1] == []
    with pytest.raises(ServingError, match="none of 4 requests"):
        bench(FakeOpenAI(fails=lambda number: "500" if number > 6 else None), tmp_path / "later", Load({2: 4}, 2, 4, "text", 1), {"base": (BASE,)})
    assert len((tmp_path / "later" / LINES).read_text().splitlines()) == 3
