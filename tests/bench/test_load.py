"""A closed loop against a server in this process: what is sent, when its parts came, and what is told of what fails."""

import asyncio
import gc

import pytest

from pipeline.bench.load import Answer, closed_loop, connections
from pipeline.bench.questions import questions
from tests.openai_server import BASE, FakeOpenAI, openai_server


def load(server: FakeOpenAI, count: int = 4, concurrency: int = 2, models: tuple[str, ...] = (BASE,), answer_tokens: int = 5) -> list[Answer]:
    async def run(url: str) -> list[Answer]:
        async with connections({"Authorization": "Bearer k"}) as http:
            return await closed_loop(http, url, models, questions("text", 0, count, 1), concurrency, answer_tokens)

    with openai_server(server) as url:
        return asyncio.run(run(url))


def test_every_question_is_answered_by_the_models_in_turn_and_timed() -> None:
    server = FakeOpenAI(first_seconds=0.02, token_seconds=lambda model: 0.01)
    answers = load(server, count=5, models=("shop", "shop/1"))
    assert [answer.model for answer in answers] == ["shop", "shop/1", "shop", "shop/1", "shop"]
    assert {answer.answered_by for answer in answers} == {"shop/2@bb", "shop/1@aa"}
    for answer in answers:
        assert answer.ok and (answer.prompt_tokens, answer.answer_tokens, len(answer.parts)) == (300, 5, 5)
        assert answer.first and answer.parts == sorted(answer.parts) and answer.sent < answer.first == answer.parts[0] <= answer.parts[-1] <= answer.end
        assert answer.first - answer.sent >= 0.02 and answer.parts[-1] - answer.sent >= 0.06


def test_a_request_is_streamed_with_usage_and_of_exact_length() -> None:
    server = FakeOpenAI()
    load(server, count=1)
    (body,) = server.bodies
    assert (body["stream"], body["stream_options"], body["ignore_eos"], body["temperature"], body["max_tokens"]) == (
        True,
        {"include_usage": True},
        True,
        1.0,
        5,
    )


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_so_many_are_under_way(concurrency: int) -> None:
    answers = load(FakeOpenAI(), count=9, concurrency=concurrency)
    most = max(sum(other.sent <= answer.sent < other.end for other in answers) for answer in answers)
    assert most == concurrency


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", 'HTTP 500: {"error": {"message": "no"}}'),
        ("cut", "ended early"),
        ("error", "the engine is gone"),
        ("empty", "the answer has no text"),
        ("no-usage", "include_usage"),
    ],
)
def test_what_fails_says_why_and_is_not_asked_again(fault: str, said: str) -> None:
    server = FakeOpenAI(fails=lambda number: fault if number == 2 else None)
    answers = load(server, concurrency=1)
    assert [answer.ok for answer in answers] == [True, False, True, True] and len(server.bodies) == 4
    assert said in str(answers[1].error)


def test_the_collector_leaves_alone_what_was_there_while_requests_are_timed() -> None:
    async def run() -> tuple[int, int]:
        async with connections({}):
            left_alone = gc.get_freeze_count()
            return left_alone, sum(gc.get_count())

    (left_alone, to_go_through), after = asyncio.run(run()), gc.get_freeze_count()
    assert left_alone > 10_000 > to_go_through and after == 0


def test_a_server_that_is_gone_fails_every_request() -> None:
    async def run() -> list[Answer]:
        async with connections({}) as http:
            return await closed_loop(http, "http://127.0.0.1:9", (BASE,), questions("text", 0, 2, 1), 2, 5)

    answers = asyncio.run(run())
    assert [answer.ok for answer in answers] == [False, False] and "ConnectError" in str(answers[0].error) and answers[0].end >= answers[0].sent > 0
