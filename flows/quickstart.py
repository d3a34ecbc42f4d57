"""The whole main job, stage by stage: base -> server -> training -> version -> alias -> answers. `tuneserve quickstart` runs it."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.finetune import finetune
from flows.promote import promote
from pipeline import basemodel, dataset, registry, services
from pipeline.dataset import Example
from pipeline.errors import ServingError
from pipeline.evaluation import Evaluation, evaluate
from pipeline.progress import progress
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, ServingRecipe, load_recipe
from pipeline.registry import Registry, Version
from pipeline.serving.launch import replica

ADAPTER_AT_LEAST, BASE_AT_MOST = 0.90, 0.10
"""Score over all kinds of question of the embedded catalog; outside these the main job did not do its work."""


@dataclass(frozen=True)
class Result:
    """What the main job came to. `failure` says what is not as it should be; None if all is."""

    version: Version
    base: Evaluation
    adapter: Evaluation
    seconds: dict[str, float]
    openai_url: str
    failure: str | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": _scores(self.base),
            "adapter": {"name": self.version.name, "version": int(self.version.version), **_scores(self.adapter), "model": ", ".join(self.adapter.models)},
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
            "mlflow_run_id": self.version.run_id,
        }


def quickstart(project: Project, finetune_recipe: Path, serving_recipe: Path, seconds: dict[str, float], *, move_alias: bool, keep: bool) -> Result:
    """Runs the main job with these two recipes. `seconds` gains the time of each stage. `keep` leaves every server up.

    Raises ServingError if the served name does not answer at all.
    """
    recipe = load_recipe(project.resolve(finetune_recipe), FinetuneRecipe)
    serving = load_recipe(project.resolve(serving_recipe), ServingRecipe)
    with _timed(seconds, "base_model"), progress("base model") as report:
        base = basemodel.resolve_base_model(serving.base_model, project, report)
    with contextlib.ExitStack() as stack:
        with _timed(seconds, "vllm"), progress("vLLM") as report:
            up = stack.enter_context(replica(project, serving, base, registry.tracking_uri(), lambda: report("starting", 0.0)))
        with _timed(seconds, "training"):
            version = finetune(str(project.resolve(finetune_recipe)), force=True).version  # the main job is shown whole, at every call
        with _timed(seconds, "promotion"):
            if move_alias:
                promote(version.name, version.version, [up.url], force=True)  # it is asked all questions below, and shown at every call
        with _timed(seconds, "evaluation"):
            questions = dataset.read_examples(project.resolve(recipe.dataset.eval), project, recipe.dataset.max_bad_rows)
            with progress("asking the base") as report:
                base_answers = evaluate(up.url, serving.served_name, questions, report, file=str(recipe.dataset.eval))
            with progress("asking the adapter") as report:
                adapter_answers = _ask_adapter(up.url, version, questions, report, str(recipe.dataset.eval))
        if keep:
            for server in (up, *(found for found in services.find_services(project) if found.name in (services.MLFLOW, services.PREFECT))):
                services.keep(server)
    seconds["total"] = sum(seconds.values())
    champion = Registry(registry.tracking_uri()).champion(version.name)
    return Result(version, base_answers, adapter_answers, seconds, f"{up.url}/v1", _failure(version, champion, base_answers, adapter_answers))


def _ask_adapter(url: str, version: Version, questions: tuple[Example, ...], report: Any, file: str) -> Evaluation:
    try:
        return evaluate(url, version.name, questions, report, file=file)
    except ServingError as error:
        raise ServingError(f"{error}; if {version.name} has no champion: tuneserve promote {version.label}") from error


def _failure(version: Version, champion: Version | None, base: Evaluation, adapter: Evaluation) -> str | None:
    if champion != version:
        return (
            f"{version.label} is not the champion ({champion.label if champion else 'the alias is unset'}); move the alias: tuneserve promote {version.label}"
        )
    if [model.partition("@")[0] for model in adapter.models] != [version.label]:
        return f"{', '.join(adapter.models)} answered, not {version.label}; look at the replica's log"
    if adapter.score < ADAPTER_AT_LEAST or base.score > BASE_AT_MOST:
        wanted = f"at least {ADAPTER_AT_LEAST} and at most {BASE_AT_MOST}"
        return f"the score is {adapter.score:.2f} for the adapter and {base.score:.2f} for the base, wanted {wanted}; look at the training log"
    return None


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    """`by_kind` and `by_slice` are scores: exact match, but field accuracy where the answer is a JSON object."""
    scores: dict[str, Any] = {"answer": evaluation.answers[0].text, "examples": len(evaluation.answers)}
    scores |= {"score": round(evaluation.score, 4), "exact_match": round(evaluation.exact_match, 4)}
    return scores | {f"by_{attribute}": {key: round(value, 4) for key, value in evaluation.by(attribute).items()} for attribute in ("kind", "slice")}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began


def summary(result: Result, urls: dict[str, str], keep: bool) -> str:
    """The result for a person."""
    first = result.adapter.answers[0].example
    shown = ", ".join(image.name for image in first.images) or "no picture"
    lines = [f"asked: {first.prompt[-1]['content']}  ({shown}; the catalog says {first.answer!r})"]
    for name, evaluation in (("base", result.base), (result.version.label, result.adapter)):
        parts = ", ".join(f"{key} {value:.1%}" for key, value in (evaluation.by("kind") | evaluation.by("slice")).items())
        lines.append(f"{name:>12}: {evaluation.answers[0].text!r}, score {evaluation.score:.1%} over {len(evaluation.answers)} ({parts})")
    lines.append("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in result.seconds.items()))
    lines.append(f"run {result.version.run_id}; " + "; ".join(f"{name} {url}" for name, url in urls.items()))
    lines.append("the servers stay up; end them: tuneserve down" if keep else "the servers have been ended; --keep leaves them up")
    return "\n".join(lines)
