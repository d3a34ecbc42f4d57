"""Alias moves under streams: what is taken for the new version's first token, and what for a gap. The server answers by an alias that the test moves."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import swapping
from pipeline.bench.load import Answer
from pipeline.bench.record import Record, read_record
from pipeline.bench.swapping import Move, Plan, Streams, Target, gaps_of, longest_gap, measure, seconds_of
from pipeline.errors import ServingError
from tests.openai_server import BASE, FakeOpenAI, openai_server

ONE, TWO = Target("shop/1", "shop/1@aa"), Target("shop/2", "shop/2@bb")


def answer(*parts: float, **more: Any) -> Answer:
    return Answer("shop", "text", parts=list(parts), **more)


def test_a_gap_counts_where_it_reaches_into_the_time() -> None:
    answers = [answer(0.0, 1.0, 1.1, 3.1), answer(1.0, 1.3, 1.4), answer()]
    assert longest_gap(answers, 1.2, 1.35) == pytest.approx(2000)  # begun before, over after
    assert longest_gap(answers, 1.02, 1.05) == pytest.approx(300)
    assert longest_gap(answers[1:], 1.02, 1.5) == pytest.approx(300)
    assert longest_gap(answers, 3.2, 4.0) is None and longest_gap([answer(1.0)], 0.0, 2.0) is None


def move(number: int, first: float, loaded: bool | None = True, around: float | None = 50.0, between: float | None = 40.0) -> Move:
    return Move(number, "shop/2", loaded, first, first / 2, None, around, between)


def test_figures_of_moves() -> None:
    moves = [move(0, 1.0, False, 100.0, None), move(1, 0.2), move(2, 0.4)]
    found = seconds_of(moves)
    assert (found["moves"], found["p50"], found["max"], found["sent_p50"], found["live_p50"]) == (3, pytest.approx(0.4), 1.0, pytest.approx(0.2), None)
    gaps = gaps_of(moves)
    assert gaps["around"] == {"windows": 3, "p50": 50.0, "p95": pytest.approx(95), "max": 100.0} and gaps["between"]["windows"] == 2
    assert seconds_of([])["p50"] is None and gaps_of([])["around"]["max"] is None


class Shop:
    """A server whose `shop` follows `alias`, `lag_seconds` late; while it changes over, every stream stands still for `stall_seconds`."""

    def __init__(self, lag_seconds: float = 0.0, stall_seconds: float = 0.0) -> None:
        self.alias, self.lag_seconds, self.stall_seconds = "1", lag_seconds, stall_seconds
        self.server = FakeOpenAI({"shop": "shop/1@aa"}, first_seconds=0.005, token_seconds=self._token)
        self.stalled_until = 0.0

    def _token(self, model: str) -> float:
        return max(0.003, self.stalled_until - time.perf_counter())

    def move(self, label: str) -> tuple[float, float | None]:
        set_at = time.perf_counter()
        threading.Timer(self.lag_seconds, self._follow, (label,)).start()
        return set_at, None

    def _follow(self, label: str) -> None:
        self.stalled_until = time.perf_counter() + self.stall_seconds
        self.server.adapters["shop"] = {"shop/1": "shop/1@aa", "shop/2": "shop/2@bb"}[label]


def swap(shop: Shop, folder: Path, moves: int = 3, pause: float = 0.3) -> list[dict[str, Any]]:
    with openai_server(shop.server) as url:
        streams = Streams(url, ("shop", BASE), 4, 30, "text", 1, {})
        record = Record(folder, {"kind": "swap"})
        with streams:
            measure(streams, shop.move, lambda label: label == "shop/1", Plan((TWO, ONE), moves, pause), record, lambda text, fraction: None)
    return read_record(folder)[1]


def test_moves_are_timed_to_the_first_token_of_the_new_version_and_gaps_seen(tmp_path: Path) -> None:
    *lines, last = swap(Shop(0.15, 0.1), tmp_path / "out")
    moves = [swapping.read_move(line["move"]) for line in lines]
    assert [(found.number, found.to, found.was_loaded) for found in moves] == [(0, "shop/2", False), (1, "shop/1", True), (2, "shop/2", False)]
    for found in moves:
        assert 0.15 <= found.first_token_seconds < 2 and found.sent_seconds < found.first_token_seconds
        assert found.gap_around_ms is not None and found.gap_around_ms >= 60
    calm = [found.gap_between_ms for found in moves if found.gap_between_ms is not None]
    assert calm and min(calm) < 60
    assert last["ended"]["failed"] == 0 and last["ended"]["requests"] == len(last["requests"]["model"]) > 8
    assert {"shop", BASE} == set(last["requests"]["model"])


def test_failed_requests_are_counted_beside_the_moves(tmp_path: Path) -> None:
    shop = Shop()
    shop.server.fails = lambda number: "500" if number == 10 else None
    *_, last = swap(shop, tmp_path / "out", moves=1)
    assert last["ended"]["failed"] == 1 and last["ended"]["first_error"].startswith("HTTP 500")


def test_a_version_that_never_answers_ends_it_with_the_traffic_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(lag_seconds=30)
    monkeypatch.setattr(swapping, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(threading, "Timer", lambda *_: threading.Thread())  # nobody follows
    with pytest.raises(ServingError, match="shop/2 answered nothing .*tuneserve status"):
        swap(shop, tmp_path / "out")
    (line,) = read_record(tmp_path / "out")[1]
    assert line["ended"]["requests"] > 0


def test_streams_that_nobody_answers_end_it_before_any_move(tmp_path: Path) -> None:
    shop = Shop()
    shop.server.fails = lambda number: "500"
    with pytest.raises(ServingError, match="does not answer: HTTP 500"):
        swap(shop, tmp_path / "out")
    assert shop.server.adapters["shop"] == "shop/1@aa"


def test_leaving_by_an_error_breaks_requests_off_and_else_each_still_ends() -> None:
    server = FakeOpenAI(token_seconds=lambda model: 0.05)
    with openai_server(server) as url:
        with Streams(url, (BASE,), 2, 8, "text", 1, {}) as calm:
            while not calm.answers:
                time.sleep(0.01)
        assert all(answer.ok for answer in calm.answers)
        server.token_seconds = lambda model: 30.0
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), Streams(url, (BASE,), 2, 8, "text", 1, {}) as broken:
            while not any(answer.parts for answer in broken.answers):
                time.sleep(0.01)
            raise KeyboardInterrupt
    assert time.monotonic() - began < 10 and broken.traffic()["ended"]["requests"] == 0
