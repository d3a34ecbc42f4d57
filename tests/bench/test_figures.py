"""Figures and ratios of made-up requests, whose values are known."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from pipeline.bench.figures import LATENCIES, METRICS, THROUGHPUT, Ratio, Request, Run, _percentiles, figures, ratios, read_run, request_of
from pipeline.bench.load import Answer


def request(first: float = 100.0, per_token: float = 10.0, tokens: int = 11, error: str | None = None) -> Request:
    if error:
        return Request("m", "image", 0.0, None, None, None, None, error)
    return Request("m", "image", 0.0, first, first + per_token * (tokens - 1), 300, tokens, None)


def run(arm: str = "base", number: int = 0, seconds: float = 2.0, requests: tuple[Request, ...] = (request(), request()), concurrency: int = 4) -> Run:
    return Run(arm, concurrency, number, seconds, requests)


def by_metric(found: list[Ratio]) -> dict[str, Ratio]:
    return {each.metric: each for each in found}


def test_an_answer_becomes_a_request_in_ms_since_it_was_sent() -> None:
    answer = Answer("m", "text", sent=10.5, first=10.6, parts=[10.6, 10.7, 10.8], end=10.9, prompt_tokens=7, answer_tokens=3)
    found = request_of(answer, 10.0)
    assert (found.sent_ms, found.first_token_ms, found.last_token_ms, found.per_token_ms) == pytest.approx((500, 100, 300, 100))
    failed = request_of(Answer("m", "text", sent=10.5, end=10.9, error="HTTP 500"), 10.0)
    assert failed.first_token_ms is failed.last_token_ms is None and math.isnan(failed.per_token_ms)


def test_figures_are_of_what_was_answered_and_count_what_failed() -> None:
    requests = (request(100), request(200), request(300), request(error="HTTP 500: no"), request(error="other"))
    (found,) = figures([run(requests=requests)])
    assert (found.requests, found.failed, found.first_error, found.rounds) == (5, 2, "HTTP 500: no", 1)
    assert (found.prompt_tokens, found.answer_tokens) == (300, 11)
    assert found.values == pytest.approx({THROUGHPUT: 33 / 2, **dict(zip(LATENCIES, (200, 290, 10, 10, 300, 390), strict=True))})


def test_rounds_are_taken_together_and_levels_come_in_order() -> None:
    runs = [run("one", concurrency=16), run("base", concurrency=16), run("one", 1, 4.0, concurrency=16), run("one", concurrency=4)]
    assert [(each.arm, each.concurrency) for each in figures(runs)] == [("one", 4), ("one", 16), ("base", 16)]
    assert figures(runs)[1].values[THROUGHPUT] == pytest.approx(44 / 6)


def test_where_nothing_was_answered_there_is_no_figure() -> None:
    (found,) = figures([run(requests=(request(error="x"),))])
    assert found.prompt_tokens is None and set(found.values.values()) == {None} and tuple(found.values) == METRICS


def test_answers_of_one_token_have_no_time_per_token() -> None:
    (found,) = figures([run(requests=(request(tokens=1), request(per_token=20.0)))])
    assert found.values["per_token_p50_ms"] == pytest.approx(20)
    (none,) = figures([run(requests=(request(tokens=1),))])
    assert none.values["per_token_p50_ms"] is None and none.values["end_to_end_p50_ms"] == pytest.approx(100)
    compared = by_metric(ratios([run(requests=(request(tokens=1),)), run("one", requests=(request(tokens=1),))], "base"))
    assert "per_token_p50_ms" not in compared and compared["end_to_end_p50_ms"].ratio == pytest.approx(1)


def noisy(arm: str, slower: float, rounds: int, seed: int) -> list[Run]:
    dice = random.Random(seed)
    found = []
    for number in range(rounds):
        requests = tuple(request(slower * dice.gauss(100, 5), slower * dice.gauss(10, 0.5)) for _ in range(30))
        found.append(run(arm, number, slower * dice.gauss(2, 0.02), requests))
    return found


def test_a_ratio_has_an_interval_that_holds_the_truth_and_is_the_same_each_time() -> None:
    runs = noisy("base", 1.0, 8, 3) + noisy("one", 1.25, 8, 4)
    found = by_metric(ratios(runs, "base"))
    assert tuple(found) == METRICS
    for metric, truth in {THROUGHPUT: 0.8, "first_token_p50_ms": 1.25, "per_token_p50_ms": 1.25, "end_to_end_p50_ms": 1.25}.items():
        each = found[metric]
        assert each.low is not None and each.high is not None and each.low <= truth <= each.high and each.high - each.low < 0.1, each
        assert each.low <= each.ratio <= each.high
    assert found == by_metric(ratios(runs, "base"))


def test_percentiles_are_numpys_of_the_values_there_are() -> None:
    rows = np.random.default_rng(1).random((5, 17, 3))
    wanted = np.percentile(rows, (50, 95), axis=1).transpose(1, 2, 0).reshape(5, 6)
    assert _percentiles(rows) == pytest.approx(wanted)
    padded = np.concatenate((rows, np.full((5, 4, 3), np.nan)), axis=1)
    assert _percentiles(padded) == pytest.approx(wanted)
    assert np.isnan(_percentiles(padded[:, 17:])).all()


def test_rounds_with_failed_requests_are_drawn_too() -> None:
    runs = noisy("base", 1.0, 3, 1) + noisy("one", 1.25, 3, 2)
    few = dataclasses.replace(runs[1], requests=(*runs[1].requests[:5], *[request(error="x")] * 25))
    found = by_metric(ratios([runs[0], few, *runs[2:]], "base"))
    each = found["first_token_p50_ms"]
    assert each.low is not None and each.high is not None and 1.1 < each.low < each.ratio < each.high < 1.4


def test_one_round_leaves_throughput_without_an_interval() -> None:
    found = by_metric(ratios(noisy("base", 1.0, 1, 1) + noisy("one", 1.25, 1, 2), "base"))
    assert found[THROUGHPUT].low is None and found["first_token_p50_ms"].low is not None


def test_rounds_that_only_one_arm_has_are_left_out() -> None:
    runs = [run("base"), run("one"), run("base", 1, 8.0), run("base", 2), run("one", 2, requests=(request(error="x"),))]
    assert by_metric(ratios(runs, "base"))[THROUGHPUT].ratio == pytest.approx(1)
    assert ratios([run("base")], "base") == ratios([run("one")], "base") == []


def test_a_run_is_read_as_it_was_written() -> None:
    written = run(requests=(request(), request(error="HTTP 500")))
    assert read_run(json.loads(json.dumps(written.as_dict()))) == written
    assert set(written.as_dict()["requests"]) == {field.name for field in dataclasses.fields(Request)}
