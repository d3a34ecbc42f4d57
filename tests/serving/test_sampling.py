"""Sampling beside requests: what is drawn, handed over, dropped and counted; and the writer as a process of its own."""

import collections
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import ServingError
from pipeline.sample import read_samples
from pipeline.serving import sampling
from pipeline.serving.sampling import SAMPLED_PATH, Exchange, Recording, Sampler, Writer
from pipeline.serving.settings import SamplingSettings
from pipeline.serving.traffic import Request
from tests.serving.test_exchange import asked, whole

Counts = collections.Counter[str]


def settings(below: Path, **changed: Any) -> SamplingSettings:
    return SamplingSettings(**{"folder": below / "server", "share": 1.0, "keep_days": 1, "keep_images": True, "max_bytes": 10**6, **changed})


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class StuckWriter:
    """Says what becomes of exchanges only once it may."""

    def __init__(self, *_: object) -> None:
        self.may_go = threading.Event()
        self.taken: list[Exchange] = []

    def first_word(self) -> str:
        return sampling.READY

    def take(self, exchange: Exchange) -> str:
        self.taken.append(exchange)
        self.may_go.wait(20)
        return "kept"

    def end(self) -> None:
        pass


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[StuckWriter]:
    writer = StuckWriter()
    monkeypatch.setattr(sampling, "Writer", lambda *_: writer)
    yield writer
    writer.may_go.set()


def started(below: Path, **changed: Any) -> tuple[Sampler, Counts]:
    counts: Counts = collections.Counter()
    sampler = Sampler(settings(below, **changed), lambda outcome: counts.update([outcome]))
    sampler.start()
    return sampler, counts


def request(**changed: Any) -> Request:
    return Request(**{"chosen": True, "lora_id": 7, "served": "catalog", "version": "1", "by_name": True, **changed})


def recorded(recording: Recording | None, body: bytes = b"asked", answer: bytes = b"told") -> Recording:
    assert recording
    recording.heard({"type": "http.request", "body": body[:3], "more_body": True})
    recording.heard({"type": "http.request", "body": body[3:]})
    recording.heard({"type": "http.disconnect"})
    recording.said({"type": "http.response.start", "status": 200, "headers": [(b"set-cookie", b"secret")]})
    recording.said({"type": "http.response.body", "body": answer})
    return recording


def test_the_share_is_drawn_among_chat_requests(tmp_path: Path) -> None:
    sampler = Sampler(settings(tmp_path, share=0.2), lambda outcome: None)
    drawn = sum(sampler.begin(SAMPLED_PATH) is not None for _ in range(5000))
    assert 800 < drawn < 1200 and not any(sampler.begin(path) for path in ("/v1/completions", "/tokenize") for _ in range(100))


def test_only_answers_of_adapters_under_their_models_names_are_handed_over(tmp_path: Path, stuck: StuckWriter) -> None:
    sampler, counts = started(tmp_path)
    stuck.may_go.set()
    for other, status in ((request(lora_id=None), 200), (request(by_name=False), 200), (request(), 500), (request(), 0)):
        recorded(sampler.begin(SAMPLED_PATH)).end(other, status)
    recorded(sampler.begin(SAMPLED_PATH)).end(request(), 200)
    until(lambda: counts["kept"])
    assert counts == {"kept": 1} and sampler._held == sampler._released == 9
    assert [(each.name, b"".join(each.body), b"".join(each.answer), each.size) for each in stuck.taken] == [("catalog", b"asked", b"told", 9)]


def test_a_writer_that_hangs_costs_no_request_anything(tmp_path: Path, stuck: StuckWriter) -> None:
    sampler, counts = started(tmp_path)
    began = time.monotonic()
    for _ in range(sampling.MAX_WAITING + 50):
        recorded(sampler.begin(SAMPLED_PATH)).end(request(), 200)
    assert time.monotonic() - began < 1 and 49 <= counts["busy"] <= 50
    stuck.may_go.set()
    until(lambda: counts.total() == sampling.MAX_WAITING + 50)
    assert counts["kept"] == len(stuck.taken) and sampler._held == sampler._released


def test_what_is_held_is_bounded(tmp_path: Path, stuck: StuckWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_BYTES", 100)
    monkeypatch.setattr(sampling, "MAX_HELD_BYTES", 250)
    sampler, counts = started(tmp_path)
    recorded(sampler.begin(SAMPLED_PATH), answer=bytes(200)).end(request(), 200)
    assert counts == {"too-large": 1} and sampler._held == 0
    recordings = [recorded(sampler.begin(SAMPLED_PATH), answer=bytes(85)) for _ in range(3)]
    assert sampler._held == 180
    for recording in recordings:
        recording.end(request(), 200)
    assert counts == {"too-large": 1, "busy": 1}
    stuck.may_go.set()
    until(lambda: counts["kept"] == 2)
    recorded(sampler.begin(SAMPLED_PATH), answer=bytes(85)).end(request(), 200)
    until(lambda: counts["kept"] == 3)


def exchange(body: bytes | None = None) -> Exchange:
    parts = (asked() if body is None else body, whole())
    return Exchange("catalog", time.time(), (parts[0],), (parts[1],), sum(map(len, parts)))


def test_the_writer_is_a_process_that_ends_with_its_parent_and_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_hooks.py").write_text(
        "import os\ndef redact(sample):\n    print('a word too many')\n    if 'die' in sample['messages'][0]['content']: os._exit(1)\n    return sample\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    sampler, counts = started(tmp_path, redact="shop_hooks.redact")
    for body in (None, b"{}", None):
        sampler.offer(exchange(body))
    until(lambda: counts.total() == 3)
    assert counts == {"kept": 2, "unusable": 1} and len(list(read_samples(tmp_path))) == 2
    sampler.offer(exchange(asked([{"role": "user", "content": "die"}])))
    sampler.offer(exchange())
    until(lambda: counts["failed"] == 2)
    monkeypatch.setattr(sampling, "RESTART_SECONDS", 0.0)
    sampler.offer(exchange())
    until(lambda: counts["kept"] == 3)
    (child,) = [each for each in psutil.Process().children() if "sample_writer" in " ".join(each.cmdline())]
    writer = sampler._writer
    assert writer
    writer._stdin.close()  # as when the server dies
    child.wait(10)


@pytest.mark.parametrize(
    ("changed", "says"), [({"redact": "nowhere.redact"}, "nowhere.redact cannot be imported"), ({"folder": Path("/proc/none")}, "/proc/none")]
)
def test_a_writer_that_cannot_start_ends_the_servers_start(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ServingError, match=says):
        started(tmp_path, **changed)


def test_a_writer_that_is_gone_says_nothing(tmp_path: Path) -> None:
    writer = Writer(settings(tmp_path))
    assert writer.first_word() == sampling.READY
    writer._process.kill()
    assert writer.take(exchange()) == ""
    writer.end()
