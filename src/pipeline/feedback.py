"""What people say of sampled answers: a rating, a correction, and whether it may be trained on. One JSON object a line, only ever added to; the last word counts."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import Fault, InvalidInput
from pipeline.example import read_example
from pipeline.process import locked
from pipeline.project import Project
from pipeline.sample import Sample, read_samples

State = Literal["new", "given", "approved", "rejected", "refused"]
"""new: nobody said anything; given: it waits for approve or reject; refused: approved, but `export` could not take it."""
STATES: tuple[State, ...] = get_args(State)
Rating = Literal["good", "bad"]
MAX_TEXT_CHARACTERS = 100_000


@dataclass(frozen=True)
class Feedback:
    """What was last said of one sample. Times are unix seconds."""

    state: State = "new"
    rating: Rating | None = None
    correction: str | None = None
    given_by: str = ""
    decided_by: str = ""
    decided_at: float = 0.0
    why: str = ""

    def answer(self, sample: Sample) -> str | None:
        """The answer that is right: the correction, or the sample's own if it was found good; None if nobody knows one."""
        return self.correction if self.correction is not None else sample.answer if self.rating == "good" else None


@dataclass(frozen=True)
class Judged:
    """A sample, where its pictures lie, and what was said of it."""

    sample: Sample
    images: Path
    feedback: Feedback = field(default=Feedback())

    @property
    def pictures(self) -> list[Path]:
        """Those that were kept."""
        return [path for name in self.sample.images if (path := self.images / name).is_file()]

    def as_dict(self, project: Project) -> dict[str, Any]:
        sample = self.sample
        said = {key: value for key, value in self.feedback.__dict__.items() if key != "decided_at"}
        decided = {"decided_at": iso(self.feedback.decided_at) if self.feedback.decided_at else ""}
        return {
            **sample.model_dump(mode="json"),
            "images": [project.relative(path) for path in self.pictures],
            "images_asked": len(sample.images),
            **said,
            **decided,
        }

    def line(self) -> str:
        sample, feedback = self.sample, self.feedback
        said = [
            *([feedback.rating] if feedback.rating else []),
            *([f"should be {_short(feedback.correction)}"] if feedback.correction is not None else []),
            *([feedback.why] if feedback.why else []),
        ]
        return f"{sample.id}  {sample.at[:19]}  {feedback.state:<8}  {sample.answered_by}  {_short(sample.question)} -> {_short(sample.answer)}" + (
            f"  ({'; '.join(said)})" if said else ""
        )


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return repr(plain if len(plain) <= 60 else f"{plain[:60]}...")


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def judged_samples(project: Project, naming: Sequence[str] = ()) -> list[Judged]:
    """Every sample that is still kept, or of those whose lines hold one of these texts, with what was said of it, the newest first."""
    said = _read(project)
    found = [Judged(sample, images, said.get(sample.id, Feedback())) for sample, images in read_samples(project.samples, naming)]
    return sorted(found, key=lambda each: each.sample.at, reverse=True)


def find(judged: Sequence[Judged], given: str) -> Judged:
    """The sample with that id, or whose answer called itself so. Raises InvalidInput if there is none, or several."""
    found = [each for each in judged if given in (each.sample.id, each.sample.answer_id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidInput(
            [Fault(given, "", f"{len(found)} samples' answers called themselves so; give the sample's own id: {', '.join(each.sample.id for each in found)}")]
        )
    raise InvalidInput([Fault(given, "", "no sample has that id; it was not sampled, or its days are over: tuneserve feedback list")])


def give(project: Project, judged: Judged, rating: Rating | None, correction: str | None, by: str) -> None:
    """Writes down what `by` says of an answer; it waits for approval then, also if something was approved before. Raises InvalidInput for a correction that cannot be trained on."""
    if (rating is None) == (correction is None):
        raise InvalidInput([Fault(judged.sample.id, "", "give either a rating or a correction: --rating good|bad, or --correction TEXT")])
    if correction is not None and (faults := correction_faults(judged.sample, correction)):
        raise InvalidInput([Fault("--correction", "", fault) for fault in faults])
    _add(project, [{"sample": judged.sample.id, "said": "given", "rating": rating or "bad", "correction": correction, "by": by}])


def correction_faults(sample: Sample, correction: str) -> list[str]:
    """Why a text cannot be the answer to learn."""
    if len(correction) > MAX_TEXT_CHARACTERS:
        return [f"has {len(correction)} characters; at most {MAX_TEXT_CHARACTERS} can be given"]
    if correction.strip() == sample.answer.strip():
        return ["is the answer that was given; rate it instead: --rating good"]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": correction}]
    return [fault for _, fault in read_example({"messages": turns}, Path(), 1)[1]]


def decide(project: Project, judged: Sequence[Judged], state: Literal["approved", "rejected"], by: str, why: str = "") -> None:
    """Approves or rejects all of them, or raises InvalidInput and changes nothing."""
    faults = []
    for each in judged:
        if each.feedback.state == "new":
            faults.append(Fault(each.sample.id, "", f"nobody said anything of it yet: tuneserve feedback give {each.sample.id} --correction TEXT"))
        elif state == "approved" and each.feedback.answer(each.sample) is None:
            faults.append(Fault(each.sample.id, "", f"was rated bad and nobody said what is right: tuneserve feedback give {each.sample.id} --correction TEXT"))
    if faults:
        raise InvalidInput(faults)
    _add(project, [{"sample": each.sample.id, "said": state, "by": by, "why": why} for each in judged])


def refuse(project: Project, reasons: Mapping[str, str], by: str) -> None:
    """Writes down why approved feedback, by sample, cannot be trained on."""
    _add(project, [{"sample": sample, "said": "refused", "by": by, "why": why} for sample, why in reasons.items()])


def _file(project: Project) -> Path:
    return project.feedback / "feedback.jsonl"


def _add(project: Project, said: Sequence[Mapping[str, Any]]) -> None:
    path, now = _file(project), time.time()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(path.with_name(".feedback.lock")), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        torn = file.tell() and not path.read_bytes().endswith(b"\n")  # by a power cut
        file.write((b"\n" if torn else b"") + b"".join(json.dumps({"at": now, **each}, ensure_ascii=False).encode() + b"\n" for each in said))


def _read(project: Project) -> dict[str, Feedback]:
    """By sample. Lines that are none of ours are passed over."""
    found: dict[str, Feedback] = {}
    try:
        lines = _file(project).read_bytes().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            said = json.loads(line)
            sample, before = said["sample"], found.get(said["sample"], Feedback())
            found[sample] = _after(before, said)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _after(before: Feedback, said: Mapping[str, Any]) -> Feedback:
    if said["said"] == "given":
        return Feedback("given", said["rating"], said["correction"], said["by"])
    if said["said"] not in STATES:
        raise ValueError(said["said"])
    # a refusal keeps who approved it
    by, at = (before.decided_by, before.decided_at) if said["said"] == "refused" else (said["by"], float(said["at"]))
    return replace(before, state=said["said"], decided_by=by, decided_at=at, why=said["why"])
