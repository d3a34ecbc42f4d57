import pytest

from pipeline.serving.wanted import RegisteredVersion, canary_percent, registered_version, wanted
from pipeline.switch import Disabled
from pipeline.version import CANARY_TAG, DIGEST_TAG, DISABLED_TAG, disabled_tag


def version(number: str, percent: str | None = None) -> RegisteredVersion:
    return RegisteredVersion("catalog", number, "", number * 64, "base", "template", percent)


def aliased(**aliases: str) -> dict:
    return {"name": "catalog", "aliases": [{"alias": alias, "version": number} for alias, number in aliases.items()]}


def test_aliases_become_champion_candidate_and_pinned():
    found = wanted(
        aliased(champion="1", candidate="2", holidays="3", audit="3", second="1"), version("1", "10"), {number: version(number, "10") for number in "123"}
    )
    assert (found.champion, found.candidate, found.percent) == (version("1", "10"), version("2", "10"), 10.0)
    assert found.pinned == (version("3", "10"),) and found.complaint is None


def test_an_alias_of_a_version_that_is_gone_counts_for_nothing():
    found = wanted(aliased(champion="1", candidate="2"), None, {"2": version("2")})
    assert found.exists and found.champion is None and found.candidate == version("2") and found.percent == 0


@pytest.mark.parametrize(("tag", "percent"), [(None, 0), ("0", 0), ("2.5", 2.5), ("100", 100)])
def test_share(tag, percent):
    assert canary_percent(version("2", tag)) == (percent, None)


@pytest.mark.parametrize("tag", ["", "ten", "nan", "-1", "100.1", "inf", "10%", "x" * 1000])
def test_a_share_that_is_none_is_nothing_and_said(tag):
    percent, complaint = canary_percent(version("2", tag))
    assert percent == 0 and CANARY_TAG in complaint and len(complaint) < 200


def test_switches_are_read_whatever_they_hold():
    tags = {DISABLED_TAG: '{"reason": "wrong prices", "by": "ann@shop", "at": "2026-11-25"}', disabled_tag("3", "3" * 64): "true", "other": "x"}
    model = aliased(champion="3") | {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
    found = wanted(model, version("3"), {})
    assert found.model_off() == Disabled("wrong prices", "ann@shop", "2026-11-25")
    assert found.version_off("3", "3" * 64) == Disabled()
    assert found.version_off("3", "4" * 64) is None  # the number was given again to another adapter


def test_version_from_mlflows_answer():
    answer = {"name": "catalog", "version": 7, "source": "runs:/1/adapter", "tags": [{"key": DIGEST_TAG, "value": "d"}, {"key": CANARY_TAG, "value": "5"}]}
    assert registered_version(answer) == RegisteredVersion("catalog", "7", "runs:/1/adapter", "d", None, None, "5")
