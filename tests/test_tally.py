"""Counters as a replica shows them, and their sums over replicas that restart, go away and come."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pipeline.serving.metrics import Metrics
from pipeline.serving.traffic import Request
from pipeline.tally import NOTHING, Meter, Tally, Timing, read_tallies

ONE = ("shop", "1")


def test_a_tally_is_read_from_what_a_replica_writes() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for finish in ("stop", "length", "tool_calls", "error", "abort", "invalid"):
        metrics.finished("shop", "1", finish, 3, 4)
    for status in (500, 503, 404):
        metrics.http_error(Request(served="shop", version="1"), status)
    metrics.http_error(Request(), 500)
    for seconds in (0.1, 0.3):
        metrics.first_token.labels("shop", "1").observe(seconds)
    metrics.per_token.labels("shop", "1").observe(0.01)
    metrics.request.labels("glm-4.5v", "base").observe(2.0)
    found = read_tallies(generate_latest(registry).decode())
    assert found[ONE] == Tally(3, 1, 2, Timing(pytest.approx(0.4), 2), Timing(0.01, 1), Timing())
    assert found["glm-4.5v", "base"].request == Timing(2.0, 1)
    assert (found["-", "-"].http_errors, found["-", "-"].failed) == (1, 1)


def test_what_is_no_metric_of_ours_is_left_out() -> None:
    assert read_tallies('# HELP x y\nvllm:num_requests{engine="0"} 1.0\ntuneserve_live_version{served="shop"} 1.0\n') == {}
    with pytest.raises(ValueError):
        read_tallies("tuneserve_requests_total{served=broken\n")


def test_a_failed_request_counts_once_though_both_counters_have_it() -> None:
    assert Tally(answered=6, errors=4, http_errors=2).failed == 4
    assert Tally(answered=6, errors=1, http_errors=4).error_rate == 0.4
    assert NOTHING.error_rate == 0.0 and Timing().mean == 0.0


def test_replicas_are_summed_and_what_was_before_counts_only_for_ever() -> None:
    meter = Meter()
    for replica in ("a", "b"):
        meter.take(replica, {ONE: Tally(100)})
    assert meter.since() == {} and meter.ever() == {ONE: Tally(200)}
    meter.take("a", {ONE: Tally(105)})
    meter.take("b", {ONE: Tally(107, errors=1), ("shop", "2"): Tally(3)})
    assert meter.since() == {ONE: Tally(12, errors=1), ("shop", "2"): Tally(3)} and meter.ever()[ONE] == Tally(212, errors=1)


def test_counters_that_went_back_are_counted_from_zero() -> None:
    meter = Meter()
    meter.take("a", {ONE: Tally(100, errors=2)})
    meter.take("a", {ONE: Tally(7, errors=2)})
    assert meter.since()[ONE] == Tally(7, errors=2)
    meter.take("a", {})  # forgotten by the replica
    meter.take("a", {ONE: Tally(4)})
    assert meter.since()[ONE] == Tally(11, errors=2)


def test_a_replica_that_was_away_is_caught_up_with_and_a_new_one_brings_no_past() -> None:
    meter = Meter()
    meter.take("a", {ONE: Tally(10)})
    meter.take("b", {ONE: Tally(1000)})
    meter.take("a", {ONE: Tally(14)})
    assert meter.since()[ONE] == Tally(4)
    meter.take("b", {ONE: Tally(1030)})
    meter.take("c", {ONE: Tally(500)})
    assert meter.since()[ONE] == Tally(34) and meter.ever()[ONE] == Tally(1544)
