"""Arms as they are given, and as they are found out from a server."""

import pytest

from pipeline.bench.arms import Arm, base_url, choose_arms, found_arms, parse_arm, read_server
from pipeline.errors import InvalidInput, ServingError
from tests.openai_server import BASE, FakeOpenAI, openai_server
from tests.replicas import http_server

URL = "http://a:1"


@pytest.mark.parametrize("text", ["http://a:1", "http://a:1/", "http://a:1/v1", " http://a:1/v1/ "])
def test_an_address_is_taken_with_and_without_v1(text: str) -> None:
    assert base_url(text) == URL


@pytest.mark.parametrize("text", ["a:1", "localhost:8000", "http://", "ftp://a", "http://a:1?x=1", ""])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput, match="http://127.0.0.1:8000"):
        base_url(text)


def test_a_password_in_an_address_is_refused_unquoted() -> None:
    with pytest.raises(InvalidInput, match="--api-key-env") as refused:
        base_url("http://me:secret@a:1")
    assert "secret" not in str(refused.value)


def test_arms_are_a_name_its_models_and_perhaps_another_server() -> None:
    assert parse_arm("two=shop/1, shop/2", URL) == Arm("two", URL, ("shop/1", "shop/2"))
    assert parse_arm("merged=http://b:2/v1#shop", URL) == Arm("merged", "http://b:2", ("shop",))
    assert parse_arm("base", URL) == "base"


@pytest.mark.parametrize(
    ("text", "said"),
    [("two", "NAME=URL#MODEL|two=MODEL"), ("=shop", "names no model"), ("x=", "names no model"), ("x=http://b:2", "names no model"), ("x=,", "names no model")],
)
def test_an_arm_that_says_too_little_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse_arm(text, URL)


def test_base_one_and_mixed_are_found_out_and_each_adapter_counts_once() -> None:
    """NAME and NAME/VERSION may be the same adapter; of several names the shortest is asked."""
    with openai_server(FakeOpenAI()) as url:
        server = read_server(url, {})
    assert (server.version, server.bases, server.max_tokens) == ("0.26.0", (BASE,), 2048)
    assert server.adapters == {"shop": "shop/2@bb", "shop/1": "shop/1@aa"} and "shop/2" in server.names
    assert {name: arm.models for name, arm in found_arms(server).items()} == {"base": (BASE,), "one": ("shop",), "mixed": ("shop", "shop/1")}


def test_mixed_has_at_most_eight() -> None:
    with openai_server(FakeOpenAI({f"lora{number}": f"/x/{number}" for number in range(12)})) as url:
        assert len(found_arms(read_server(url, {}))["mixed"].models) == 8


@pytest.mark.parametrize(("adapters", "arms"), [({}, ["base"]), ({"shop": "r", "shop/1": "r"}, ["base", "one"])])
def test_what_a_server_does_not_have_is_no_arm(adapters: dict[str, str], arms: list[str]) -> None:
    with openai_server(FakeOpenAI(adapters)) as url:
        server = read_server(url, {})
    assert [arm.name for arm in choose_arms([], url, {url: server})] == arms
    with pytest.raises(InvalidInput, match=r"mixed: .* too few adapters .*tuneserve promote"):
        choose_arms(["mixed"], url, {url: server})


def test_every_wrong_arm_is_named_with_what_is_served() -> None:
    with openai_server(FakeOpenAI()) as url:
        servers = {url: read_server(url, {})}
        with pytest.raises(InvalidInput) as refused:
            choose_arms([Arm("a", url, ("shpo", "shop")), Arm("a", url, ("none",))], url, servers)
    said = str(refused.value).splitlines()
    assert [line.partition(" is ")[0] for line in said] == ["--arm: a: shpo", "--arm: a: none", "--arm: a:"]
    assert f"it serves {BASE}, shop, shop/1, shop/2" in said[0] and "a name of its own" in said[2]


def test_a_server_that_is_not_there_or_none_of_the_kind_says_the_remedy() -> None:
    with pytest.raises(ServingError, match="cannot be reached.*tuneserve serve"):
        read_server("http://127.0.0.1:9", {})
    with http_server(lambda *_: (200, {"hello": 1})) as url, pytest.raises(ServingError, match="correct the URL"):
        read_server(url, {})
    with http_server(lambda *_: (404, {})) as url, pytest.raises(ServingError, match="correct the URL"):
        read_server(url, {})


def test_a_key_is_asked_for_and_used() -> None:
    with openai_server(FakeOpenAI(key="k")) as url:
        with pytest.raises(ServingError, match="--api-key-env"):
            read_server(url, {})
        assert read_server(url, {"Authorization": "Bearer k"}).bases == (BASE,)
