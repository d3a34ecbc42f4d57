"""What an evaluation came to: compared, decided, and told as figures, table and text."""

import json
from dataclasses import replace
from pathlib import Path

from pipeline.assessment import BASE, CHAMPION, Recorded, assess
from pipeline.evaluation import Answer, Evaluation
from pipeline.example import Example
from pipeline.parity import NO_REFERENCE, Mismatch, Parity
from pipeline.recipe import Judge, PromotionRules
from tests.conftest import write_image

RULES = PromotionRules(protect=("name",), floor=0.1)


def answers(texts: list[str], images: tuple[Path, ...] = (), model: str = "shop/2@bbbbbbbb") -> Evaluation:
    def example(row: int) -> Example:
        return Example(
            ({"role": "user", "content": f"<image>What is `{row}`?"}, {"role": "assistant", "content": "a watch"}),
            images,
            "name" if row % 2 else "use",
            row=row,
        )

    return Evaluation(tuple(Answer(example(row), text, model, 0.01 * row) for row, text in enumerate(texts)))


RIGHT, WRONG = "a watch", "a <b>tote</b>"


def test_better_than_champion_and_base(tmp_path: Path) -> None:
    images = (write_image(tmp_path / "1.png"),)
    own = answers([RIGHT] * 38 + [WRONG] * 2, images)
    champion = answers([RIGHT, WRONG] * 20, images, "shop/1@aaaaaaaa")
    found = assess("shop/2", own, ("shop/1", champion), {BASE: answers([WRONG] * 40, images, "glm-4.5v")}, RULES, dataset_digest="d")
    assert found.decision.verdict == "promote"
    said = found.as_dict()
    assert said["scores"]["shop/2"]["score"] == 0.95 and said["scores"]["shop/1"]["score"] == 0.5 and said["scores"]["base"]["score"] == 0.0
    assert said["parts"]["use"] == {"shop/2": 0.95, "shop/1": 1.0, "base": 0.0}
    assert [each["part"] for each in said["against"]["shop/1"]] == ["", "images=1", "name", "use"]
    assert said["decision"]["reasons"][0]["code"] == "better"
    assert json.loads(json.dumps(said)) == said
    assert found.metrics()["gain_over_champion"] == 0.45 and found.metrics()["score.images-1"] == 0.95
    rows = [json.loads(line) for line in found.table().splitlines()]
    assert len(rows) == 40 and rows[39]["wanted"] == RIGHT
    assert (rows[38]["version"]["text"], rows[38][CHAMPION]["score"], rows[38]["base"]["model"]) == (WRONG, 1.0, "glm-4.5v")
    assert any("shop/1" in line and "50.0%" in line for line in found.lines()) and found.lines()[-1].startswith("decision: promote")


def test_the_report_shows_the_worst_regressions_with_pictures_and_no_markup_of_theirs(tmp_path: Path) -> None:
    images = (write_image(tmp_path / "1.png"),)
    found = assess("shop/2", answers([WRONG] * 40, images), ("shop/1", answers([RIGHT] * 40, images)), {}, RULES)
    text = found.markdown()
    assert text.startswith("**refuse** shop/2") and "part-worse" in text
    assert text.count("<img src='data:image/png;base64,") == 5
    assert "<b>" not in text and "&lt;b&gt;tote" in text


def test_the_first_version_and_the_same_one_again() -> None:
    own = answers([RIGHT] * 40)
    assert assess("shop/1", own, None, {}, RULES).decision.verdict == "promote"
    again = assess("shop/2", own, ("shop/1", own), {}, RULES, same_digest=True)
    assert (again.decision.verdict, again.decision.reasons[0].code) == ("keep", "same-adapter")
    assert assess("shop/2", own, ("shop/1", own), {}, RULES).decision.reasons[0].code == "no-gain"


def test_what_is_not_served_as_trained_is_refused_and_what_is_not_known_if_the_rules_ask_for_it() -> None:
    own, champion = answers([RIGHT] * 40), ("shop/1", answers([WRONG] * 40))
    differs = Parity("adapter-differs", (Mismatch("adapter", "text", "token 7 is apart"),))
    lax = PromotionRules(require_parity=False)
    for parity, rules, verdict in [
        (Parity("faithful"), RULES, "promote"),
        (differs, RULES, "refuse"),
        (differs, lax, "refuse"),
        (NO_REFERENCE, RULES, "refuse"),
        (NO_REFERENCE, lax, "promote"),
        (None, RULES, "promote"),
    ]:
        assert assess("shop/2", own, champion, {}, rules, parity=parity).decision.verdict == verdict
    found = assess("shop/2", own, champion, {}, RULES, parity=differs)
    assert found.decision.reasons[0].code == "not-faithful" and "token 7" in found.decision.text
    assert json.loads(json.dumps(found.as_dict()))["parity"]["verdict"] == "adapter-differs"


def test_a_champion_may_stand_by_its_record_overall_and_per_part() -> None:
    first = assess("shop/1", answers([RIGHT] * 38 + [WRONG] * 2), None, {}, RULES)
    recorded = Recorded("shop/1", first.metrics(), "r1")
    found = assess("shop/2", answers([RIGHT] * 40), None, {BASE: answers([WRONG] * 40)}, RULES, recorded=recorded)
    assert (found.champion, found.decision.verdict, found.decision.reasons[0].code) == ("shop/1", "promote", "as-good")
    assert [(each.part, each.gain) for each in found.against[CHAMPION]] == [("", 0.05), ("images=0", 0.05), ("name", 0.05), ("use", 0.05)]
    assert "against shop/1 on record (run r1): 100.0% against 95.0%" in "\n".join(found.lines())
    said = json.loads(json.dumps(found.as_dict()))
    assert (said["on_record"], list(said["scores"])) == ("r1", ["shop/2", "base"]) and CHAMPION not in found.others
    assert found.metrics()["gain_over_champion"] == 0.05 and "### Worst" not in found.markdown()
    worse = assess("shop/2", answers([RIGHT, WRONG] * 20), None, {}, RULES, recorded=recorded)
    assert [reason.code for reason in worse.decision.reasons] == ["part-worse"]  # the rows named `name` are all wrong
    assert assess("shop/2", answers([RIGHT] * 36 + [WRONG] * 4), None, {}, PromotionRules(), recorded=recorded).decision.reasons[0].code == "worse"


def graded(found: Evaluation, grade: float) -> Evaluation:
    return Evaluation(tuple(replace(answer, grade=grade) for answer in found.answers))


def test_grades_are_told_where_there_are_any_and_decide_if_the_rules_say_so() -> None:
    plain = assess("shop/2", answers([RIGHT] * 40), None, {BASE: answers([WRONG] * 40)}, RULES)
    assert plain.judge is None and "judge" not in plain.metrics() and "judge" not in json.loads(plain.table().splitlines()[0])["version"]
    assert "judge" not in plain.markdown() + "".join(plain.lines()) and "judge" not in plain.as_dict()["scores"]["base"]
    judge = Judge(url="http://j/v1", model="the-judge")
    own, champion = graded(answers([WRONG] * 40), 0.9), graded(answers([RIGHT] * 40), 0.4)
    beside = assess("shop/2", own, ("shop/1", champion), {}, PromotionRules(judge=judge))
    assert beside.decision.verdict == "keep" and beside.as_dict()["scores"]["shop/1"]["judge"] == 0.4 and beside.as_dict()["judge"] == "the-judge"
    assert (beside.metrics()["judge"], beside.metrics()["score"]) == (0.9, 0.0)
    assert json.loads(beside.table().splitlines()[0])["version"]["judge"] == 0.9
    assert "| **judge** | 90.0% | 40.0% |" in beside.markdown() and "graded by the-judge" in beside.markdown()
    assert "graded by the-judge" in beside.lines()[0] and "judge 90.0%" in beside.lines()[1]
    deciding = assess("shop/2", own, ("shop/1", champion), {}, PromotionRules(metric="judge", judge=judge))
    assert deciding.decision.verdict == "promote" and deciding.metrics()["gain_over_champion"] == 0.5
    assert deciding.markdown().count("**judge**") == 1 and "judge 90.0%" not in deciding.lines()[1]
