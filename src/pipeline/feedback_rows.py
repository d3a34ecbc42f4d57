"""Approved feedback as training rows: checked as all rows are, each once, none that is held out, each with where it comes from."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.dataset import plain, question_keys, read_examples
from pipeline.errors import Fault, InvalidInput
from pipeline.example import Example, read_example
from pipeline.feedback import Judged, iso, judged_samples, refuse
from pipeline.process import locked
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe
from pipeline.rows import read_rows


@dataclass(frozen=True)
class Export:
    """What became of the approved feedback of a model, by sample. `written` are new in `file`; `there` were in it, or in the training rows, already; the reasons for `refused` are on record."""

    file: Path
    written: tuple[str, ...] = ()
    there: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def export(project: Project, recipe: FinetuneRecipe, to: Path, by: str) -> Export:
    """Adds the approved feedback on the recipe's model to the JSONL file `to`, its pictures copied beside it. Again, it adds only what is new.

    Refused is what asks what a held-out row asks, what contradicts a training row, and what is no row at all; `by` is who had it exported.
    Raises InvalidInput if `to` or the recipe's own rows are wrong.
    """
    _refuse_misplaced(project, recipe, to)
    with locked(project.feedback / ".export.lock"):
        approved = [each for each in judged_samples(project) if each.feedback.state == "approved" and each.sample.name == recipe.name]
        known = _known_rows(project, recipe, to)
        exported = _exported(to, known.get(project.relative(to), ()), project)
        again = [each for each in approved if each.sample.id in exported]
        changed = {each.sample.id for each in again if plain(str(each.feedback.answer(each.sample))) != exported[each.sample.id]}
        there = {each.sample.id: f"is in {project.relative(to)} already" for each in again if each.sample.id not in changed}
        new = sorted((each for each in approved if each.sample.id not in exported), key=lambda each: (each.feedback.decided_at, each.sample.at))
        rows, refused = _checked(new, recipe, to)
        refused |= {
            sample: f"was exported to {project.relative(to)} with another answer; take that row out, approve it again and export again" for sample in changed
        }
        twice, doubtful = _sorted_out({sample: example for sample, (_, example) in rows.items()}, known)
        written = [sample for sample in rows if sample not in twice and sample not in doubtful]
        images = {each.sample.id: each.pictures for each in new}
        _write(to, [rows[sample][0] for sample in written], [image for sample in written for image in images[sample]])
        refused |= doubtful
        refuse(project, refused, by)
    return Export(to, tuple(written), there | twice, refused)


def _refuse_misplaced(project: Project, recipe: FinetuneRecipe, to: Path) -> None:
    held_out = project.resolve(recipe.dataset.eval).resolve()
    if to.suffix != ".jsonl":
        raise InvalidInput([Fault(str(to), "", "is no .jsonl file; rows are written one a line: --to FILE.jsonl")])
    if held_out in (to.resolve(), *to.resolve().parents):
        raise InvalidInput([Fault(str(to), "", "is among the held-out rows of the recipe; name another file")])
    if not to.parent.is_dir():
        raise InvalidInput([Fault(str(to), "", "its folder does not exist; make it, or correct the path")])


def _known_rows(project: Project, recipe: FinetuneRecipe, to: Path) -> dict[str, tuple[Example, ...]]:
    """By what people call the file: the held-out rows first, then those trained on, then those exported before."""
    files = recipe.dataset
    found = {"the held-out rows": read_examples(project.resolve(files.eval), project, files.max_bad_rows)}
    train = project.resolve(files.train)
    if train.resolve() != to.resolve():
        found[project.relative(train)] = read_examples(train, project, files.max_bad_rows)
    if to.is_file() and to.stat().st_size:
        found[project.relative(to)] = read_examples(to, project)
    return found


def _exported(to: Path, rows: Sequence[Example], project: Project) -> dict[str, str]:
    """The answers of these rows of the file by the sample that each comes from."""
    origins = _provenances(to, project) if rows else {}
    return {sample: plain(row.answer) for row in rows if (sample := origins[row.row].get("sample"))}


def _provenances(path: Path, project: Project) -> dict[int, dict[str, Any]]:
    """What each row of a file says of where it comes from, by its number."""
    said = {row.number: row.content.get("provenance") if isinstance(row.content, dict) else None for row in read_rows(path, project)}
    return {number: provenance if isinstance(provenance, dict) else {} for number, provenance in said.items()}


def _checked(new: Sequence[Judged], recipe: FinetuneRecipe, to: Path) -> tuple[dict[str, tuple[dict[str, Any], Example]], dict[str, str]]:
    """By sample: the row as it will be written and as an example whose pictures are still where they were kept; and why it is none."""
    rows, refused = {}, {}
    for each in new:
        row, sample = row_of(each, to, preference=recipe.method == "dpo"), each.sample
        if len(each.pictures) < len(set(sample.images)):
            refused[sample.id] = "its pictures were not kept; set sampling.keep_images in the serving recipe"
        elif row is None:
            refused[sample.id] = "method: dpo learns from corrections of answers, and this has none"
        else:
            example, faults = read_example(row | {"images": [str(each.images / name) for name in sample.images]}, to.parent, 1)
            if example:
                rows[sample.id] = row, example
            else:
                refused[sample.id] = "; ".join(f"{where.lstrip('.')}: {fault}" for where, fault in faults)
    return rows, refused


def row_of(judged: Judged, to: Path, *, preference: bool) -> dict[str, Any] | None:
    """The row for the file `to`; None if it should say what not to answer (`preference`), and nobody said that."""
    sample, feedback = judged.sample, judged.feedback
    messages = [message.model_dump() for message in sample.messages]
    row = {
        "messages": [*messages, {"role": "assistant", "content": feedback.answer(sample)}],
        "images": [f"{image_folder(to).name}/{name}" for name in sample.images],
        "provenance": {
            "sample": sample.id,
            "asked_at": sample.at,
            "answered_by": sample.answered_by,
            "said": "correction" if feedback.correction is not None else "good",
            "given_by": feedback.given_by,
            "approved_by": feedback.decided_by,
            "approved_at": iso(feedback.decided_at),
        },
    }
    if not preference:
        return row
    return row | {"rejected_response": sample.answer} if feedback.correction is not None and sample.answer.strip() else None


def image_folder(to: Path) -> Path:
    """Where the pictures of an exported file lie."""
    return to.with_name(f"{to.stem}-images")


def _sorted_out(new: Mapping[str, Example], known: Mapping[str, Sequence[Example]]) -> tuple[dict[str, str], dict[str, str]]:
    """By sample, why it is not to be written: it is there twice, or it may not be."""
    places = [(file, example) for file, examples in known.items() for example in examples]
    keys = question_keys([*(example for _, example in places), *new.values()])
    held_out = len(next(iter(known.values())))
    judged = set(keys[:held_out])
    trained = {key: (f"row {example.row} of {file}", example) for key, (file, example) in zip(keys[held_out:], places[held_out:], strict=False)}
    twice, refused = {}, {}
    for key, (sample, example) in zip(keys[len(places) :], new.items(), strict=True):
        if key and key in judged:
            refused[sample] = "asks what a held-out row asks, which must not be trained on"
        elif key and key in trained:
            place, other = trained[key]
            if plain(other.answer) == plain(example.answer):
                twice[sample] = f"is also {place}"
            else:
                refused[sample] = f"{place} answers the same question otherwise; correct that row, or reject this: tuneserve feedback reject {sample}"
        elif key:
            trained[key] = f"sample {sample}", example
    return twice, refused


def _write(to: Path, rows: Sequence[Mapping[str, Any]], images: Sequence[Path]) -> None:
    """Pictures first, then the rows, all or none, after those that are there."""
    if not rows:
        return
    if images:
        image_folder(to).mkdir(mode=0o700, exist_ok=True)
    for image in images:
        if not (copy := image_folder(to) / image.name).is_file():
            _copy(image, copy)
    before = to.read_bytes() if to.is_file() else b""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with _replacing(to) as draft:
        if before:
            shutil.copymode(to, draft)
        draft.write_bytes(before + (b"\n" if before and not before.endswith(b"\n") else b"") + text)


def _copy(image: Path, to: Path) -> None:
    with _replacing(to) as draft:
        draft.write_bytes(image.read_bytes())


@contextlib.contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    """A file beside `to`, readable by its owner alone, that takes its place if the block ends well."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".draft", dir=to.parent)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).replace(to)
    finally:
        Path(name).unlink(missing_ok=True)


def rows_since(path: Path, project: Project, since: float) -> tuple[Example, ...]:
    """The rows of an exported file that were approved after that unix time; none while nothing was exported. Raises InvalidInput if the file is not one of rows."""
    if not path.exists():
        return ()
    examples = read_examples(path, project)
    origins = _provenances(path, project)
    return tuple(example for example in examples if _moment(str(origins[example.row].get("approved_at", ""))) > since)


def _moment(text: str) -> float:
    """Unix time; 0 where none is said, so that it counts as old."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
