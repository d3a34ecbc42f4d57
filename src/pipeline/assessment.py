"""What an evaluation of a version came to: its answers beside the champion's and the base's, how they compare, and what is decided; as figures, table and text."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.comparison import Comparison, against_level, compare, worst
from pipeline.decision import Decision, Evidence, decide
from pipeline.evaluation import METRICS, Answer, Evaluation, data_url
from pipeline.parity import Parity
from pipeline.recipe import PromotionRules

BASE, FEW_SHOT, CHAMPION = "base", "base with examples", "champion"
"""Who else answered, beside the version."""
SHOWN_REGRESSIONS = 5
SHOWN_PIXELS = 256
"""Longest side of a picture in a report."""


@dataclass(frozen=True)
class Recorded:
    """What a version came to on the same held-out rows, once: its label, its means by metric and by `METRIC.PART` as `Assessment.metrics` has them, and the run that holds them."""

    version: str
    values: Mapping[str, float]
    run_id: str


@dataclass(frozen=True)
class Assessment:
    """`version` and `champion` are labels. `others`: who answered the same questions; `against`: per one of them, the comparison overall and then per part."""

    version: str
    champion: str | None
    rules: PromotionRules
    own: Evaluation
    others: Mapping[str, Evaluation]
    against: Mapping[str, Sequence[Comparison]]
    decision: Decision
    dataset_digest: str = ""
    parity: Parity | None = None
    """None where nothing was replayed."""
    eval_digest: str = ""
    """Of the held-out rows, if all of them were asked."""
    recorded: Recorded | None = None
    """What stands for the champion that was not asked."""
    run_id: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        sides = {self.version: self.own, **{self._name(side): answers for side, answers in self.others.items()}}
        return {
            "version": self.version,
            "champion": self.champion,
            "metric": self.rules.metric,
            "judge": self.judge,
            "on_record": self.recorded.run_id if self.recorded else None,
            "examples": len(self.own.answers),
            "dataset_digest": self.dataset_digest,
            "scores": {side: figures(answers) for side, answers in sides.items()},
            "parts": {part: {side: part_mean(answers, part, self.rules.metric) for side, answers in sides.items()} for part in self.own.parts},
            "against": {self._name(side): [comparison.as_dict() for comparison in found] for side, found in self.against.items()},
            "parity": self.parity.as_dict() if self.parity else None,
            "decision": self.decision.as_dict(),
            "mlflow_run_id": self.run_id,
        }

    @property
    def judge(self) -> str | None:
        """The model that graded the answers; None if none did."""
        return self.rules.judge.model if self.rules.judge and "judge" in self.own.metrics else None

    @property
    def told(self) -> tuple[str, ...]:
        """The metrics that people are told: the rules', and the judge's where there are grades."""
        return tuple(dict.fromkeys([self.rules.metric, *(["judge"] if self.judge else [])]))

    def _name(self, side: str) -> str:
        return self.champion or side if side == CHAMPION else side

    def metrics(self) -> dict[str, float]:
        """For MLflow: the version's figures, its parts, and its gain over the others."""
        found = {key: float(value) for key, value in figures(self.own).items() if isinstance(value, int | float)}
        found |= {self.rules.metric: self.own.mean(self.rules.metric)}  # as it is: others are held against it
        found |= {f"{self.rules.metric}.{_key(part)}": part_mean(self.own, part, self.rules.metric) for part in self.own.parts}
        for side, comparisons in self.against.items():
            overall, name = comparisons[0], _key(side)
            found |= {f"gain_over_{name}": overall.gain, f"gain_over_{name}.low": overall.low, f"gain_over_{name}.high": overall.high}
        return found

    def table(self) -> str:
        """Every answer, as JSON Lines: the row, what was wanted, and per side its text, the metric, a judge's grade and its seconds."""
        value = METRICS[self.rules.metric]
        sides = {"version": self.own, **self.others}
        lines = []
        for index, answer in enumerate(self.own.answers):
            given = {
                side: {"text": each.text, self.rules.metric: value(each), **grade(each), "seconds": round(each.seconds, 3), "model": each.model}
                for side, answers in sides.items()
                for each in [answers.answers[index]]
            }
            example = answer.example
            lines.append(
                json.dumps(
                    {"row": example.row, "parts": answer.parts, "question": example.prompt[-1]["content"], "wanted": example.answer, **given},
                    ensure_ascii=False,
                )
            )
        return "\n".join(lines) + "\n"

    def lines(self) -> list[str]:
        """For a terminal."""
        metric = self.rules.metric
        found = [f"{self.version} on {len(self.own.answers)} held-out rows ({metric}{self._graded()}; seconds an answer, {_seconds(self.own)})"]
        for side, answers in {self.version: self.own, **{self._name(side): answers for side, answers in self.others.items()}}.items():
            parts = ", ".join(f"{part} {part_mean(answers, part, metric):.1%}" for part in answers.parts)
            judged = f", judge {answers.mean('judge'):.1%}" if self.judge and metric != "judge" else ""
            found.append(f"{side:>20}: {answers.mean(metric):.1%} ({parts}){judged}")
        by_record = f" on record (run {self.recorded.run_id})" if self.recorded else ""
        found += [f"against {self._name(side)}{by_record if side == CHAMPION else ''}: {comparisons[0]}" for side, comparisons in self.against.items()]
        found += [f"parity: {self.parity.verdict}, {self.parity.reason}"] if self.parity else []
        return [*found, f"decision: {self.decision.text}"]

    def _graded(self) -> str:
        return f"; graded by {self.judge}" if self.judge else ""

    def markdown(self) -> str:
        """For Prefect: the decision, the scores per part, and what got worst against the champion, with pictures."""
        metric = self.rules.metric
        sides = {self.version: self.own, **{self._name(side): answers for side, answers in self.others.items()}}
        rows = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
        rows += [f"| **{each}** | " + " | ".join(f"{answers.mean(each):.1%}" for answers in sides.values()) + " |" for each in self.told]
        rows += [f"| {part} | " + " | ".join(f"{part_mean(answers, part, metric):.1%}" for answers in sides.values()) + " |" for part in self.own.parts]
        text = [
            f"**{self.decision.verdict}** {self.version}{html.escape(self._graded())}",
            *(f"- {html.escape(str(reason))}" for reason in self.decision.reasons),
            "",
            *rows,
        ]
        if champion := self.others.get(CHAMPION):
            text += ["", f"### Worst against {self.champion}"]
            text += [_regression(self.version, ours, str(self.champion), theirs) for ours, theirs in worst(self.own, champion, metric, SHOWN_REGRESSIONS)] or [
                "none"
            ]
        return "\n".join(text)


def assess(
    version: str,
    own: Evaluation,
    champion: tuple[str, Evaluation] | None,
    others: Mapping[str, Evaluation],
    rules: PromotionRules,
    *,
    same_digest: bool = False,
    dataset_digest: str = "",
    parity: Parity | None = None,
    eval_digest: str = "",
    recorded: Recorded | None = None,
) -> Assessment:
    """Compares and decides. `champion`: its label and its answers to the same examples; `same_digest`: it has the very same weights.

    `recorded` stands for a champion that cannot be asked the same way: as good as that is enough.
    """
    sides = {**({CHAMPION: champion[1]} if champion else {}), **others}
    against = {side: compare(own, answers, rules.metric, rules.confidence) for side, answers in sides.items()}
    label = recorded.version if recorded else champion[0] if champion else None
    if recorded:
        against[CHAMPION] = against_record(own, recorded, rules)
    evidence = Evidence(
        examples=len(own.answers),
        mean=own.mean(rules.metric),
        p95_seconds=own.seconds(95),
        champion=label,
        against_champion=against.get(CHAMPION),
        same_digest=same_digest,
        faithful_fault=parity_fault(parity, rules) if parity else None,
        on_record=recorded is not None,
    )
    return Assessment(version, label, rules, own, sides, against, decide(evidence, rules), dataset_digest, parity, eval_digest, recorded)


def against_record(own: Evaluation, recorded: Recorded, rules: PromotionRules) -> list[Comparison]:
    """As `compare`, against the means that are on record, the rules' metric among them."""
    levels = {"": recorded.values[rules.metric]}
    levels |= {part: recorded.values[key] for part in own.parts if (key := f"{rules.metric}.{_key(part)}") in recorded.values}
    return [against_level(own, level, rules.metric, rules.confidence, part) for part, level in levels.items()]


def parity_fault(parity: Parity, rules: PromotionRules) -> str | None:
    """Why the version cannot count as served as trained; None if it can, or if nothing speaks against it and the rules ask for no proof."""
    unknown = parity.verdict in ("no-reference", "not-compared")
    return None if parity.faithful or (unknown and not rules.require_parity) else parity.reason


def figures(answers: Evaluation) -> dict[str, Any]:
    """Every metric that is known, the rates and the seconds of one evaluation."""
    means = {metric: round(answers.mean(metric), 4) for metric in answers.metrics}
    rates = {"empty_rate": round(answers.empty_rate, 4), "refusal_rate": round(answers.refusal_rate, 4)}
    return {**means, **rates, "p50_seconds": round(answers.seconds(50), 3), "p95_seconds": round(answers.seconds(95), 3), "answered_by": list(answers.models)}


def part_mean(answers: Evaluation, part: str, metric: str) -> float:
    indices = answers.indices(part)
    value = METRICS[metric]
    return sum(value(answers.answers[index]) for index in indices) / len(indices) if indices else math.nan


def grade(answer: Answer) -> dict[str, float]:
    """The judge's grade as a field, if there is one."""
    return {} if answer.grade is None else {"judge": answer.grade}


def _seconds(answers: Evaluation) -> str:
    return f"p50 {answers.seconds(50):.2f}, p95 {answers.seconds(95):.2f}"


def _key(part: str) -> str:
    """A name that MLflow takes for a metric."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "-" for letter in part)


def _regression(version: str, ours: Answer, champion: str, theirs: Answer) -> str:
    pictures = "".join(f"<img src='{_thumbnail(image)}' alt='{html.escape(image.name)}'/> " for image in ours.example.images)
    said = [f"- {name}: <code>{_inline(answer.text)}</code>" for name, answer in ((version, ours), (champion, theirs))]
    return "\n".join(
        [f"\nrow {ours.example.row}: {_inline(ours.example.prompt[-1]['content'])}", pictures, *said, f"- wanted: <code>{_inline(ours.example.answer)}</code>"]
    )


def _inline(text: str) -> str:
    return html.escape(" ".join(text.split())[:500])


def _thumbnail(image: Path) -> str:
    from PIL import Image

    with Image.open(image) as opened:
        if max(opened.size) <= SHOWN_PIXELS:
            return data_url(image)
        small = opened.convert("RGB")
        small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
