"""version -> on trial -> answers, beside the champion's and the base's -> decision, recorded. `tuneserve evaluate NAME[/VERSION]` runs it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from pipeline import judge, parity, registry, trial
from pipeline.assessment import BASE, CHAMPION, FEW_SHOT, Assessment, Recorded, assess
from pipeline.card import card
from pipeline.dataset import load_dataset
from pipeline.errors import ServingError
from pipeline.evaluation import Evaluation
from pipeline.evaluation import evaluate as ask
from pipeline.example import Example
from pipeline.fleet import Fleet, open_fleet
from pipeline.in_context import with_shots
from pipeline.lock import model_lock
from pipeline.parity import Parity
from pipeline.progress import progress
from pipeline.project import Project, find_project
from pipeline.recipe import FinetuneRecipe, Judge, load_recipe
from pipeline.reference import read_reference
from pipeline.registry import EVAL_DIGEST, RECHECK, Registry, Version
from pipeline.serving.client import Replica

SHOTS = 3
"""Training rows in front of each question, for the base that is shown examples."""


def recipe_of(registered: Registry, version: Version, recipe_path: str | None) -> FinetuneRecipe:
    """The recipe in that file, else the one that the version was trained by."""
    if recipe_path is not None:
        return load_recipe(Path(recipe_path), FinetuneRecipe)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(registered.recipe(version), "utf-8")
        return load_recipe(path, FinetuneRecipe)


def replica_of(fleet: Fleet, name: str) -> tuple[Replica, str]:
    """The replica that is asked, the first ready one that follows `name`, and what its base is called."""
    by_url = {replica.url: replica for replica in fleet.replicas}
    for look in fleet.looks():
        if look.state == "ready" and look.status and name in look.status.models and look.status.base_models:
            return by_url[look.url], look.status.base_models[0]
    raise ServingError(f"no ready replica follows {name}; start one: tuneserve serve RECIPE, or name it: --replica URL")


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="replay {version.label}")
def replayed(registered: Registry, version: Version, replica: Replica) -> Parity:
    """Whether the replica reads and answers prompts as this version's training did."""
    with progress("replaying what training saw"):
        text = registered.reference(version)
        return parity.replay(replica, version, read_reference(text, version.label)) if text else parity.NO_REFERENCE


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="ask {name}")
def answers_of(url: str, name: str, questions: Sequence[Example], file: str) -> Evaluation:
    """Raises ServingError if another model answered, be it for one question."""
    with progress(f"asking {name}") as report:
        found = ask(url, name, questions, report, file=file)
    if strangers := [model for model in found.models if model.partition("@")[0] != name]:
        raise ServingError(f"{url} answered as {', '.join(strangers)} when asked for {name}; look at its log")
    return found


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="grade by {by.model}")
def graded(sides: Mapping[str, Evaluation], by: Judge, file: str) -> dict[str, Evaluation]:
    with progress(f"{by.model} grades the answers") as report:
        return judge.graded(sides, by, report, file)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="record {found.version}")
def record(registered: Registry, version: Version, found: Assessment) -> Assessment:
    tags = {
        "champion": found.champion or "none",
        "decision": found.decision.verdict,
        "reasons": found.decision.text[:4000],
        "dataset_digest": found.dataset_digest,
        **({"judge": found.judge} if found.judge else {}),
        **({EVAL_DIGEST: found.eval_digest} if found.eval_digest else {}),
        **({RECHECK: "true"} if found.recorded and found.recorded.version == found.version else {}),
    }
    files = {"answers.jsonl": found.table(), "assessment.json": json.dumps(found.as_dict(), indent=2), "assessment.md": found.markdown()}
    create_markdown_artifact(found.markdown(), key="assessment", description=f"{found.version}: {found.decision.verdict}")
    registered.write_card(version, card(version, registered.lineage(version), found))
    return replace(found, run_id=registered.log_evaluation(version, tags, found.metrics(), files))


@flow(name="evaluate", flow_run_name="evaluate {name}/{version}", persist_result=False)
def evaluate(
    name: str,
    version: str | None = None,
    replicas: list[str] | None = None,
    *,
    recipe_path: str | None = None,
    baselines: bool = False,
    limit: int | None = None,
    evaluate_on: str | None = None,
) -> Assessment:
    """Scores a version (None: the newest) on its recipe's held-out rows, or on `limit` of them, and decides what the recipe's rules say of it.

    `evaluate_on`: the address of the replica that is asked; None: the first of `replicas` that can.
    """
    project = find_project()
    registered = Registry(registry.tracking_uri())
    with open_fleet(project, replicas) as fleet:
        chosen = registered.version(name, version)
        return examine(registered, chosen, fleet, project, recipe_path=recipe_path, baselines=baselines, limit=limit, evaluate_on=evaluate_on)


def examine(
    registered: Registry,
    version: Version,
    fleet: Fleet,
    project: Project,
    *,
    recipe_path: str | None = None,
    baselines: bool = False,
    limit: int | None = None,
    evaluate_on: str | None = None,
    recorded: Recorded | None = None,
) -> Assessment:
    """Puts a version on trial, asks it, the champion and the base, has a judge grade them if the rules name one, decides, and records all of it.

    `recorded`: stands for the champion, which is not asked. `evaluate_on` and the others as in `evaluate`. Raises ServingError if a replica does not serve it, or the judge does not grade; InvalidInput without the judge's key.
    """
    recipe = recipe_of(registered, version, recipe_path)
    rules = recipe.promotion
    if rules.judge:
        judge.api_key(rules.judge)  # before anything is asked
    with trial.evaluation_fleet(project, fleet, evaluate_on, version.name) as asked_fleet:
        rows = load_dataset(recipe.dataset, project)
        questions, file = every_nth(rows.eval, limit), project.relative(project.resolve(recipe.dataset.eval))
        with trial.on_trial(registered, version, asked_fleet, model_lock(project, "trial", version.name)):
            asked, base = replica_of(asked_fleet, version.name)
            shown = replayed(registered, version, asked)
            champion = registered.champion(version.name)
            sides = answers_of_all(version, None if recorded else champion, (asked.url, base), questions, rows.train if baselines else None, file)
    if rules.judge:
        sides = graded(sides, rules.judge, file)
    own, champions = sides.pop(version.label), sides.pop(CHAMPION, None)
    against = (champion.label, champions) if champion and champions else None
    same = champion is not None and champion.digest == version.digest
    digests = {"dataset_digest": rows.digest, "eval_digest": rows.eval_digest if questions is rows.eval else ""}
    found = assess(version.label, own, against, sides, rules, same_digest=same, parity=shown, recorded=recorded, **digests)
    return record(registered, version, found)


def answers_of_all(
    version: Version, champion: Version | None, replica: tuple[str, str], questions: Sequence[Example], train: Sequence[Example] | None, file: str
) -> dict[str, Evaluation]:
    """The version's answers by its label, then the champion's and the base's; with `train`, also the base's that has seen a few of these rows in its prompt."""
    url, base = replica
    own = answers_of(url, version.label, questions, file)
    sides = {version.label: own}
    if champion:
        sides[CHAMPION] = own if champion.digest == version.digest else answers_of(url, champion.label, questions, file)
    sides[BASE] = answers_of(url, base, questions, file)
    if train is not None:
        most = max(len(question.images) for question in questions)  # the server is known to take so many
        primed = [with_shots(question, train, SHOTS, most) for question in questions]
        answered = answers_of(url, base, primed, file)
        own_examples = zip(answered.answers, questions, strict=True)
        sides[FEW_SHOT] = Evaluation(tuple(replace(answer, example=question) for answer, question in own_examples))
    return sides


def every_nth(questions: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """All, or `limit` of them, evenly spread."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]
