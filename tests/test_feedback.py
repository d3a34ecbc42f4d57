"""What was said of a sample, by whom, and what counts of it."""

import stat

import pytest

from pipeline.errors import InvalidInput
from pipeline.feedback import Feedback, Judged, correction_faults, decide, find, give, judged_samples, refuse
from pipeline.project import Project
from tests.feedback import write_sample


def the(project: Project, number: int = 1) -> Judged:
    return find(judged_samples(project), f"{number:016x}")


def test_the_last_word_counts_and_has_to_be_approved_anew(project: Project) -> None:
    sample = write_sample(project, 1)
    assert the(project).feedback == Feedback() and the(project).feedback.answer(sample) is None
    give(project, the(project), "good", None, "ann@a")
    assert the(project).feedback == Feedback("given", "good", None, "ann@a") and the(project).feedback.answer(sample) == "a red circle"
    decide(project, [the(project)], "approved", "bob@b")
    approved = the(project).feedback
    assert (approved.state, approved.given_by, approved.decided_by) == ("approved", "ann@a", "bob@b") and approved.decided_at > 1e9
    give(project, the(project), None, "Rubio watch", "eve@e")
    assert the(project).feedback == Feedback("given", "bad", "Rubio watch", "eve@e") and the(project).feedback.answer(sample) == "Rubio watch"
    decide(project, [the(project)], "rejected", "bob@b", "no such product")
    assert (the(project).feedback.state, the(project).feedback.why) == ("rejected", "no such product")
    decide(project, [the(project)], "approved", "bob@b")
    refuse(project, {sample.id: "held out"}, "cron@c")
    refused = the(project).feedback
    assert (refused.state, refused.why, refused.decided_by) == ("refused", "held out", "bob@b")
    assert stat.S_IMODE((project.feedback / "feedback.jsonl").stat().st_mode) == 0o600


def test_half_a_line_and_foreign_ones_cost_only_themselves(project: Project) -> None:
    write_sample(project, 1)
    write_sample(project, 2)
    give(project, the(project), "good", None, "ann@a")
    path = project.feedback / "feedback.jsonl"
    path.write_text(path.read_text() + '[]\n{"sample": "x", "said": "eaten", "by": "", "at": 1, "why": ""}\n{"sample": "00000')
    give(project, the(project, 2), "bad", None, "ann@a")
    assert [each.feedback.rating for each in judged_samples(project)] == ["bad", "good"]


def test_a_sample_is_found_by_its_id_or_by_its_answers(project: Project) -> None:
    one, two = write_sample(project, 1), write_sample(project, 2)
    judged = judged_samples(project)
    assert [each.sample for each in judged] == [two, one]
    assert find(judged, "chatcmpl-2").sample == two and find(judged_samples(project, ["chatcmpl-2"]), "chatcmpl-2").sample == two
    assert [each.sample for each in judged_samples(project, [one.id, "nothing", "\udcff"])] == [one]
    with pytest.raises(InvalidInput, match="no sample has that id"):
        find(judged, "chatcmpl-3")
    with (project.samples / "server/2026-11-27.jsonl").open("a") as file:  # clients may choose what an answer is called
        file.write(one.model_copy(update={"id": "f" * 16}).model_dump_json() + "\n")
    with pytest.raises(InvalidInput, match="2 samples' answers called themselves so"):
        find(judged_samples(project), "chatcmpl-1")


@pytest.mark.parametrize(
    ("correction", "says"),
    [
        ("", "must be a non-empty string"),
        (" a red circle\n", "rate it instead"),
        ("<|user|>", "part of the prompt format"),
        ("x" * 100_001, "at most"),
        ("\udcff", "half a character"),
    ],
)
def test_a_correction_that_cannot_be_learnt_is_refused_at_once(project: Project, correction: str, says: str) -> None:
    sample = write_sample(project, 1)
    assert says in correction_faults(sample, correction)[0] and not correction_faults(sample, "Rubio watch")
    with pytest.raises(InvalidInput, match=says):
        give(project, the(project), None, correction, "ann@a")
    assert the(project).feedback == Feedback()


def test_what_nobody_knows_the_answer_to_is_not_approved(project: Project) -> None:
    for number in (1, 2, 3):
        write_sample(project, number)
    give(project, the(project, 1), "good", None, "ann@a")
    give(project, the(project, 2), "bad", None, "ann@a")
    with pytest.raises(InvalidInput) as refused:
        decide(project, [the(project, number) for number in (1, 2, 3)], "approved", "bob@b")
    assert "rated bad and nobody said what is right" in str(refused.value) and "nobody said anything of it yet" in str(refused.value)
    assert the(project, 1).feedback.state == "given"
    for rating, correction in ((None, None), ("good", "x")):
        with pytest.raises(InvalidInput, match="either a rating or a correction"):
            give(project, the(project, 1), rating, correction, "ann@a")  # type: ignore[arg-type]
