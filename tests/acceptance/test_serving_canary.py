"""A canary of 10 %: its share of 3,000 users; each user always on one side; 10 -> 20 % moves users one way only; n > 1 takes one side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.registry import Version
from pipeline.version import CANARY_TAG, CANDIDATE
from tests.acceptance.figures import show
from tests.acceptance.load import Body, ask_all
from tests.acceptance.serving_environment import TEXT, Server, World, engine_name, wait_until

MODEL = "canary"
USERS, STICKY_USERS, REPEATS = 3_000, 300, 10
TOLERANCE = 0.02
Request = tuple[Body, Mapping[str, str]]


def request(user: str | None = None, header: str | None = None, **more: object) -> Request:
    body = {"model": MODEL, "messages": TEXT, "max_tokens": 1, "temperature": 0} | ({"user": user} if user else {}) | more
    return body, {"X-User-Id": header} if header else {}


def sides(server: Server, requests: Sequence[Request]) -> list[str]:
    """The version that answered each request."""
    answers = ask_all(server.url, requests)
    assert [answer for answer in answers if not answer.ok] == []
    return [answer.model for answer in answers]


def share_out(world: World, server: Server, candidate: Version, percent: str) -> None:
    world.tag_version(candidate, CANARY_TAG, percent)
    world.set_alias(candidate, CANDIDATE)

    def shared() -> bool:
        live = server.model(MODEL)["candidate"]["live"]
        return bool(live) and live["version"] == candidate.version and live["percent"] == float(percent)

    wait_until(shared, 20, lambda: f"{candidate.label} with {percent} %: {server.model(MODEL)}")


def by_user(server: Server, users: int = USERS) -> list[str]:
    return sides(server, [request(f"user-{number}") for number in range(users)])


def test_the_canary_is_sticky_and_grows_one_way(world: World, tmp_path: Path) -> None:
    champion, candidate = world.variants(MODEL, [0.85, 0.55], tmp_path)
    new = engine_name(candidate)
    with world.serving("canary", follow=[MODEL]) as server:
        server.promote(champion)
        share_out(world, server, candidate, "10")
        ten = by_user(server)
        sticky = [request(user=f"sticky-{number}") if number % 2 else request(header=f"sticky-{number}") for number in range(STICKY_USERS)]
        repeats = [sides(server, sticky) for _ in range(REPEATS)]
        several = ask_all(server.url, [request(n=2, stream=True, max_tokens=2, temperature=1) for _ in range(200)])
        share_out(world, server, candidate, "20")
        twenty = by_user(server)
        world.delete_alias(MODEL, CANDIDATE)
        wait_until(lambda: server.model(MODEL)["candidate"]["live"] is None, 20, "no candidate any more")
        ended = set(by_user(server, users=300))
    unsteady = sum(len(set(each)) > 1 for each in zip(*repeats, strict=True))
    back = sum(before == new != after for before, after in zip(ten, twenty, strict=True))
    shares = {"10": ten.count(new) / USERS, "20": twenty.count(new) / USERS}
    show(users=USERS, shares=shares, sticky_users=STICKY_USERS, changed_sides=unsteady, moved_back=back, sides_of_n_2=len({answer.model for answer in several}))
    assert abs(shares["10"] - 0.10) <= TOLERANCE and abs(shares["20"] - 0.20) <= TOLERANCE
    assert set(ten) == {new, engine_name(champion)}
    assert unsteady == 0 and 0 < repeats[0].count(new) < STICKY_USERS
    assert back == 0
    assert all(answer.ok for answer in several) and {answer.model for answer in several} == {new, engine_name(champion)}
    assert ended == {engine_name(champion)}
