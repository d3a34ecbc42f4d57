"""The registry against what replicas say: what lags, what fails, and what is only said."""

from typing import Any

import pytest

from pipeline.fleet import Look
from pipeline.fleet_status import FleetStatus, compare
from pipeline.serving.client import ReplicaStatus
from pipeline.serving.wanted import RegisteredVersion, Wanted
from pipeline.switch import Disabled
from pipeline.version import DISABLED_TAG, disabled_tag
from tests.replicas import FakeReplica, model, served

A, B = "http://a:1", "http://b:1"
RECORD = Disabled("x", "me", "now")
OFF = {"reason": "x", "by": "me", "at": "now"}


def version(number: str, digest: str | None = None) -> RegisteredVersion:
    return RegisteredVersion("shop", number, "", digest or number * 8, "base", "template")


def live(number: str, **more: Any) -> dict[str, Any]:
    return served(number, number * 8, **more)


def seen(url: str = A, said: dict[str, Any] | None = None, **extra: Any) -> Look:
    _, body = FakeReplica(lambda: {"shop": said} if said else {}, extra=extra).answer("GET", "/adapters", {"authorization": "Bearer secret"}, b"")
    return Look(url, "ready", "", ReplicaStatus.model_validate(body))


def away(url: str = B, state: Any = "unreachable") -> Look:
    return Look(url, state, f"replica {url} is {state}", None)


def against(wanted: Wanted, *looks: Look, **options: Any) -> FleetStatus:
    return compare(["shop"], {"shop": wanted}, None, looks, **options)


ONE, TWO = Wanted(True, version("1")), Wanted(True, version("2"))
RIGHT = model(live("1"), live("1"))


def test_all_is_as_the_registry_says() -> None:
    found = against(ONE, seen(A, RIGHT), seen(B, RIGHT), required=["shop"])
    assert found.ok and not found.problems and not found.lags
    said = found.as_dict()
    assert said["ok"] is True and said["problems"] == [] and said["registry_error"] is None
    assert said["registry"] == {"shop": {"champion": {"version": "1", "digest": "11111111"}, "candidate": None, "disabled": None, "error": None}}
    assert {key: said["replicas"][0][key] for key in ("url", "state", "why")} == {"url": A, "state": "ready", "why": ""}
    one = said["replicas"][0]["models"]["shop"]
    assert (one["verified"], one["lagging"], one["error"], one["code"], one["refused"]) == (True, False, None, None, [])
    assert one["live"]["version"] == one["wanted"]["version"] == "1"
    assert said["replicas"][0]["last_sync_age_seconds"] == 0.4 and said["replicas"][0]["slots"]["max_loras"] == 4


REFUSED = {**live("2"), "code": "rank-too-large", "message": "rank 64 > 16", "attempts": 1}


@pytest.mark.parametrize(
    ("wanted", "said", "problem"),
    [
        (TWO, RIGHT, "http://a:1: shop lags: live 1, wanted 2 (it wants 1)"),
        (ONE, model(live("2"), live("1"), refused=[REFUSED], error="rank 64 > 16", code="rank-too-large"), "live 1, wanted 1 (it wants 2): rank 64 > 16"),
        (TWO, model(live("2"), live("1"), refused=[REFUSED], error="rank 64 > 16", code="rank-too-large"), "rank 64 > 16"),
        (TWO, model(live("2"), None), "live none, wanted 2"),
        (Wanted(True, version("1", "another")), RIGHT, "live 1, wanted 1"),
        (Wanted(True, version("1"), version("2"), 10.0), RIGHT, "wanted 1, candidate 2 at 10 % (live none)"),
        (
            Wanted(True, version("1"), version("2"), 10.0),
            {**RIGHT, "candidate": {"wanted": None, "live": live("2", percent=5.0)}},
            "candidate 2 at 10 % (live 2 at 5 %)",
        ),
        (ONE, {**RIGHT, "candidate": {"wanted": None, "live": live("2", percent=5.0)}}, "candidate none (live 2 at 5 %)"),
        (Wanted(True, version("1"), off={DISABLED_TAG: RECORD}), RIGHT, "switched on or off meanwhile"),
        (Wanted(True, version("1"), off={disabled_tag("1", "1" * 8): RECORD}), RIGHT, "switched on or off meanwhile"),
        (ONE, {**RIGHT, "disabled": {"model": OFF, "versions": {}}}, "switched on or off meanwhile"),
    ],
)
def test_a_replica_that_is_behind_lags(wanted: Wanted, said: dict[str, Any], problem: str) -> None:
    found = against(wanted, seen(A, said))
    assert not found.ok and found.lags
    assert problem in found.problems[0].text and len(found.problems) == 1
    ready_or_not = against(wanted, Look(A, "not-ready", "starting", seen(A, said).status), seen(B, model(live("9"), live("9"))))
    assert [problem.fails for problem in ready_or_not.problems if problem.text.startswith(A)] == [False]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(True, version("1"), version("2"), 10.0), {**RIGHT, "candidate": {"wanted": None, "live": live("2", percent=10.0)}}),
        (Wanted(True, version("1"), version("1"), 10.0), {**RIGHT, "candidate": {"wanted": live("1", percent=10.0), "live": None}}),
        (Wanted(True, version("1"), off={DISABLED_TAG: RECORD}), {**RIGHT, "disabled": {"model": OFF, "versions": {}}}),
        (Wanted(True, version("1"), off={disabled_tag("7", "7" * 8): RECORD}), RIGHT),
    ],
)
def test_canaries_and_switches_that_are_as_wanted_are_no_problem(wanted: Wanted, said: dict[str, Any]) -> None:
    assert against(wanted, seen(A, said)).problems == ()


def test_what_is_switched_off_is_shown_in_one_shape() -> None:
    wanted = Wanted(True, version("1"), off={DISABLED_TAG: RECORD, disabled_tag("3", "3" * 8): RECORD})
    entry = against(wanted, seen(A, {**RIGHT, "disabled": {"model": OFF, "versions": {}}})).as_dict()["registry"]["shop"]
    assert entry["disabled"] == {"model": OFF, "versions": {"3": OFF}}


def test_what_is_not_promoted_yet_is_no_failure_but_a_lost_alias_is() -> None:
    nothing = model(error="shop: no champion", code="no-champion")
    assert against(Wanted(True), seen(A, nothing)).ok
    assert against(Wanted(False), seen(A, model(error="shop: not in MLflow", code="model-missing"))).ok
    lost = against(Wanted(True), seen(A, model(None, live("1"), error="shop/1 is still served", code="no-champion")))
    assert not lost.ok and not lost.lags
    unknown = against(Wanted(False))
    assert not unknown.ok and "no registered model of that name" in unknown.problems[0].text


@pytest.mark.parametrize(
    ("extra", "problem", "ok"),
    [
        ({"mlflow_error": "refused"}, "cannot read MLflow", False),
        ({"state_error": "disk full"}, "cannot keep its state", False),
        ({"slots": {"max_loras": 4, "waits": 3}}, "3 requests waited for one of its 4 adapter slots", True),
    ],
)
def test_a_servers_own_troubles(extra: dict[str, Any], problem: str, ok: bool) -> None:
    found = against(ONE, seen(A, RIGHT, **extra))
    assert found.ok == ok and [problem in each.text for each in found.problems] == [True]


def test_a_damaged_folder_fails_and_a_refused_version_that_is_not_the_champion_is_only_said() -> None:
    damaged = {**RIGHT, "versions": [{**RIGHT["versions"][0], "fault": "its folder is gone"}]}
    found = against(ONE, seen(A, damaged))
    assert not found.ok and found.problems[0].text == "http://a:1: shop/1: its folder is gone"
    assert not found.as_dict()["replicas"][0]["models"]["shop"]["verified"]
    pinned = against(ONE, seen(A, {**RIGHT, "refused": [REFUSED]}))
    assert pinned.ok and "shop/2 is refused: rank 64 > 16 (rank-too-large)" in pinned.problems[0].text


def test_replicas_that_cannot_be_asked() -> None:
    found = against(ONE, seen(A, RIGHT), away())
    assert found.ok and [problem.text for problem in found.problems] == [f"replica {B} is unreachable"]
    assert not against(ONE, seen(A, RIGHT), away(), unreachable_fails=True).ok
    assert against(ONE, seen(A, RIGHT), away(state="not-ready")).ok
    assert not against(ONE, seen(A, RIGHT), away(state="refuses-us")).ok
    none = against(ONE, away())
    assert not none.ok and "no replica is ready" in none.problems[-1].text


def test_without_any_replica() -> None:
    assert against(ONE).ok and "no replica runs in this project" in against(ONE).problems[0].text
    assert not against(ONE, expected=True).ok


def test_a_model_that_is_not_followed() -> None:
    found = against(ONE, seen(A, RIGHT), seen(B), required=["shop"])
    assert not found.ok and [problem.text.partition(";")[0] for problem in found.problems] == [f"{B} does not follow shop"]
    assert against(ONE, seen(A, RIGHT), seen(B)).ok
    assert "no ready replica follows shop" in against(ONE, seen(B)).problems[0].text


def test_while_mlflow_is_away_replicas_are_shown_against_what_they_want_themselves() -> None:
    found = compare(["shop"], {}, "MLflow is away", [seen(A, RIGHT), seen(B, model(live("2"), live("1")))])
    assert not found.ok and found.problems[0].text == "MLflow is away"
    said = found.as_dict()
    assert said["registry"]["shop"]["error"] == said["registry_error"] == "MLflow is away"
    assert [replica["models"]["shop"]["lagging"] for replica in said["replicas"]] == [False, True]
    assert [replica["models"]["shop"]["verified"] for replica in said["replicas"]] == [True, False]
    one = compare(["shop", "toys"], {"shop": ONE, "toys": "toys: bad name"}, None, [seen(A, RIGHT)])
    assert not one.ok and one.as_dict()["registry"]["toys"]["error"] == "toys: bad name" and one.as_dict()["registry"]["shop"]["error"] is None


def test_a_broken_share_is_said() -> None:
    found = against(Wanted(True, version("1"), complaint="shop/2: no percentage"), seen(A, RIGHT))
    assert not found.ok and found.as_dict()["registry"]["shop"]["error"] == "shop/2: no percentage"
