"""What we understand of a replica's answers, and what its failures are to us; over a real connection, or none."""

import json
import time
from typing import Any

import httpx
import pytest

from pipeline.serving import client
from pipeline.serving.client import Replica, ReplicaError, new_client
from pipeline.switch import Disabled
from tests.replicas import TOKEN, FakeReplica, http_server, model, served


def shop(**more: Any) -> dict[str, Any]:
    return {"shop": model(served("2", "bb"), served("1", "aa"), **more)}


def test_a_status_is_read_and_what_is_new_in_it_is_left_out() -> None:
    off = {"reason": "x", "by": "me", "at": "now", "more": 1}
    candidate = {"wanted": served("3", "cc", percent=10), "live": None}
    refused = [{**served("2", "bb"), "code": "rank-too-large", "message": "rank", "attempts": 2, "retry_in_seconds": 3.1}]
    models = shop(candidate=candidate, refused=refused, disabled={"model": off, "versions": {"1": off}}, error="rank", code="rank-too-large")
    fake = FakeReplica(lambda: models, extra={"new": {}, "slots": {"waits": 2}})
    with http_server(fake.answer) as url:
        replica = Replica(url + "/", TOKEN)
        said = replica.status()
        assert replica.ready()
    found = said.models["shop"]
    assert found.wanted and found.live and (found.wanted.key, found.live.key) == (("2", "bb"), ("1", "aa"))
    assert found.candidate and found.candidate.wanted and found.candidate.wanted.percent == 10 and found.live_candidate is None
    assert found.off.model == found.off.versions["1"] == Disabled("x", "me", "now")
    refusal, entry = found.refusal("2", "bb"), found.entry(found.live)
    assert refusal and (refusal.code, refusal.attempts) == ("rank-too-large", 2) and found.refusal("2", "other") is None
    assert entry and entry.verified and entry.verified.modules == 16
    assert (said.ready, said.pid, said.last_sync_age_seconds, said.slots.waits, said.cache.bytes) == (True, 1, 0.4, 2, 5)


def test_an_answer_with_the_least_there_may_be_is_read() -> None:
    with http_server(lambda *_: (200, {"models": {"shop": {"wanted": None, "live": {"version": 1, "digest": "aa"}}}})) as url:
        said = Replica(url, TOKEN).status()
    live = said.models["shop"].live
    assert live and live.key == ("1", "aa") and said.models["shop"].off.model is None and said.slots.waits == 0


def test_a_hint_is_signed_and_a_replica_with_another_token_refuses_it() -> None:
    fake = FakeReplica(shop)
    with http_server(fake.answer) as url:
        assert Replica(url, TOKEN).hint("shop", "champion", "2").models["shop"].live
        with pytest.raises(ReplicaError, match="refuses our token.*not signed with this replica's token") as refused:
            Replica(url, "other").hint("shop", "champion", "2")
    assert refused.value.state == "refuses-us"
    assert fake.hints == [{"name": "shop", "alias": "champion", "version": "2"}]


def test_a_replica_that_is_not_ready_says_what_it_waits_for() -> None:
    with http_server(FakeReplica(shop, ready=False).answer) as url:
        replica = Replica(url, TOKEN)
        assert not replica.ready()
        assert replica.status().waiting == "shop: no champion yet"


@pytest.mark.parametrize(
    ("answer", "state", "message"),
    [
        ((401, {}), "refuses-us", "refuses our token"),
        ((404, {}), "refuses-us", "without the tuneserve plugin"),
        ((200, []), "refuses-us", "not as a replica does"),
        ((200, {"models": {"shop": {"live": "1"}}}), "refuses-us", r"not as a replica does \(models\.shop\.live"),
        ((503, {"ready": False}), "not-ready", "still starting"),
        ((500, {"error": "boom"}), "not-ready", "GET /adapters answered 500.*boom"),
        ((302, {}), "not-ready", "answered 302"),
    ],
)
def test_what_else_answers_is_told_apart(answer: tuple[int, Any], state: str, message: str) -> None:
    with http_server(lambda *_: answer) as url, pytest.raises(ReplicaError, match=message) as failed:
        Replica(url, TOKEN).status()
    assert failed.value.state == state


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "ftp://h:1", "http://[::1"])
def test_what_cannot_be_reached_is_said_at_once(url: str) -> None:
    began = time.monotonic()
    with pytest.raises(ReplicaError, match="cannot be reached") as failed:
        Replica(url, TOKEN).status()
    assert failed.value.state == "unreachable" and time.monotonic() - began < 5


def test_a_replica_that_does_not_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STATUS_SECONDS", 0.1)

    def slow(*_: object) -> tuple[int, Any]:
        time.sleep(0.5)
        return 200, {}

    with http_server(slow) as url, pytest.raises(ReplicaError, match="timed out") as failed:
        Replica(url, TOKEN).status()
    assert failed.value.state == "unreachable"


def test_an_address_behind_a_name_is_asked_for_the_names_certificate() -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, text=json.dumps({"models": {}}))

    Replica("https://10.0.0.1:8443", TOKEN, httpx.Client(transport=httpx.MockTransport(handle)), "replicas.example:8443").status()
    assert seen[0].extensions["sni_hostname"] == "replicas.example" and seen[0].headers["Host"] == "replicas.example:8443"


def test_a_prompt_is_replayed_with_the_token_and_what_does_not_fit_is_said() -> None:
    asked: list[tuple[str, str, Any]] = []

    def answer(method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        asked.append((path, headers["authorization"], json.loads(body)))
        return 200, {
            "digest": "aa",
            "precision": "float32",
            "prompt_tokens": [1, 2],
            "base": [-1.5, None],
            "adapter": [-0.5, -2],
            "texts": {"1": "a"},
            "new": 1,
        }

    with http_server(answer) as url:
        found = Replica(url, TOKEN).parity("shop/1", [{"role": "user", "content": []}], (5, 6))
    assert asked == [("/adapters/parity", f"Bearer {TOKEN}", {"model": "shop/1", "messages": [{"role": "user", "content": []}], "answer_tokens": [5, 6]})]
    assert (found.digest, found.prompt_tokens, found.base, found.adapter, found.texts) == ("aa", (1, 2), (-1.5, None), (-0.5, -2.0), {1: "a"})
    for code, body, message in (
        (422, {"detail": "shop/1 is not served here"}, "422.*not served here"),
        (200, [], "not as a replica"),
        (503, {}, "still starting"),
    ):
        with http_server(lambda *_, code=code, body=body: (code, body)) as url, pytest.raises(ReplicaError, match=message):
            Replica(url, TOKEN).parity("shop/1", [], (5,))


def test_the_token_is_not_shown() -> None:
    assert "hidden" not in repr(Replica("http://a:1", "hidden", new_client()))
