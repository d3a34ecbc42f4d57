"""people's answers -> drift -> what has changed -> trained -> through the gate -> recorded. `tuneserve retrain RECIPE` runs it, and a schedule (flows/schedule.py).

Each stage finds in the registry what is done already, so a run that was killed is seen through by the next one.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.flow_engine import FlowRunTimeoutError
from prefect.tasks import Task

from flows import at_work
from flows.approve import approve
from flows.evaluate import answers_of, graded, replica_of
from flows.finetune import Finetuned, finetune
from flows.promote import Outcome, promote
from flows.schedule import stand_for_missed_runs
from pipeline import approval, basemodel, lineage, registry, trial
from pipeline.approval import next_for, open_requests
from pipeline.comparison import against_level
from pipeline.decision import Reason
from pipeline.errors import ProcessFailed, RegistryError, ServingError
from pipeline.feedback_rows import rows_since
from pipeline.fleet import addresses_of, open_fleet
from pipeline.history import history
from pipeline.lineage import code_lineage
from pipeline.lock import model_lock
from pipeline.preflight import checked_rows, refuse_misfit
from pipeline.process import locked
from pipeline.progress import progress
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, ServingRecipe, load_recipe
from pipeline.registry import Registry, Version
from pipeline.retraining import DRIFT_UNKNOWN, DRIFTED, changes, drift, due, gate_digest, gate_step, lineage_now, promoted
from pipeline.switch import user_at_host
from pipeline.version import DECIDED_TAG, RETRAINED_TAG

logger = logging.getLogger(__name__)
TRAINING_LOCK = "retrain.lock"
"""Held by the one scheduled training of this project's host, in .tuneserve/runs."""
RETRIES, RETRY_SECONDS = 3, 20
"""Of the steps that only read; the others are seen through by the next run."""
MAX_TAG_CHARACTERS = 2000


@dataclass(frozen=True)
class Replicas:
    """Which replicas a promotion is about, and which one is asked the held-out questions."""

    addresses: list[str] | None
    evaluate_on: str | None = None
    unreachable_fails: bool = False


@dataclass(frozen=True)
class Compared:
    """`reasons`: what has changed since the model's newest version; `version`: the one that these inputs have already, None if one is to be trained."""

    reasons: tuple[Reason, ...]
    version: Version | None
    dataset_digest: str


@dataclass(frozen=True)
class Retrained:
    """What a run came to. `trained`: it made the version. `decided`: what was decided about it, and why. `answered`: what became of requests for approval.

    `drift`: how the champion of before did on rows approved since its promotion, None if the recipe does not ask.
    """

    version: Version
    trained: bool
    reasons: tuple[Reason, ...]
    decided: Reason
    outcome: Outcome | None = None
    answered: tuple[str, ...] = ()
    drift: Reason | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def did_nothing(self) -> bool:
        return not (self.trained or self.outcome or self.answered)

    def as_dict(self) -> dict[str, Any]:
        promoted, request = (self.outcome.promotion, self.outcome.request) if self.outcome else (None, None)
        return {
            "name": self.version.name,
            "version": int(self.version.version),
            "digest": self.version.digest,
            "mlflow_run_id": self.version.run_id,
            "trained": self.trained,
            "changes": [reason.as_dict() for reason in self.reasons],
            "promoted": promoted is not None,
            "previous": promoted.previous if promoted else None,
            "approval_expires": request.expires if request else None,
            "decision": self.decided.as_dict(),
            "answered": list(self.answered),
            "drift": self.drift.as_dict() if self.drift else None,
            "nothing_to_do": self.did_nothing,
            "seconds": round(self.seconds, 1),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = list(self.answered)
        found += [f"drift: {self.drift}"] if self.drift else []
        trained = (
            "; ".join(str(reason) for reason in self.reasons if reason != self.drift) or "rows, base, template and recipe are those that it was trained from"
        )
        found.append(f"{'trained' if self.trained else 'nothing to train:'} {self.version.label}{': ' if self.trained else ', '}{trained}")
        found.append(f"{'nothing to promote' if self.outcome is None else self.version.label}: {self.decided}")
        return found

    def markdown(self) -> str:
        """For Prefect."""
        what = "nothing to do" if self.did_nothing else self.decided.code
        return "\n".join([f"**{what}** {self.version.label}", *(f"- {line}" for line in self.lines())])


def _is_away(task_run_task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failure is MLflow's: what is wrong with a recipe or its rows stays wrong."""
    return isinstance(state.result(raise_on_failure=False), RegistryError)


READING: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_SECONDS,
    "retry_condition_fn": _is_away,
}
"""Of a task that changes nothing."""


@flow(name="retrain", flow_run_name="retrain {recipe_path}", persist_result=False)
def retrain(
    recipe_path: str,
    *,
    force: bool = False,
    serving: str | None = None,
    replicas: list[str] | None = None,
    evaluate_on: str | None = None,
    watch_seconds: float | None = None,
    training_seconds: float | None = None,
) -> Retrained:
    """Trains the recipe if something has changed, or by force, and takes its version through the gate if that was not done yet; else says why there is nothing to do.

    Paths are relative to the project. `serving`, a serving recipe, and `replicas`, addresses, as `tuneserve promote` has them. `watch_seconds`: how long what was
    promoted is watched; None: not. `training_seconds`: a training that takes longer is ended, and the next run goes on from its last checkpoint.
    Raises ServingError if what was promoted was taken back.
    """
    with at_work() as project:
        began = time.monotonic()
        stand_for_missed_runs()
        path = project.resolve(Path(recipe_path))
        recipe = load_recipe(path, FinetuneRecipe)
        asked = replicas_of(project, serving, replicas, evaluate_on)
        registered = Registry(registry.tracking_uri())
        answered = act_on_answers(registered, recipe, path, asked, project, watch_seconds)
        drifted = look_for_drift(registered, recipe, asked, project)
        compared = compare(registered, recipe, path, project, force, drifted)
        done = train(recipe, path, compared, registered, force, project, training_seconds)
        decision, outcome = pass_gate(registered, done.version, compared, recipe, path, asked, watch_seconds)
        return record(registered, Retrained(done.version, done.trained, compared.reasons, decision, outcome, answered, drifted, time.monotonic() - began))


def replicas_of(project: Project, serving: str | None, urls: Sequence[str] | None, evaluate_on: str | None) -> Replicas:
    recipe = load_recipe(project.resolve(Path(serving)), ServingRecipe) if serving else None
    asked = evaluate_on or (recipe.evaluation_replica if recipe else None)
    return Replicas(addresses_of(project, recipe, urls or ()), asked, recipe is not None and recipe.unreachable_replicas == "fail")


def act_on_answers(
    registered: Registry, recipe: FinetuneRecipe, path: Path, replicas: Replicas, project: Project, watch_seconds: float | None
) -> tuple[str, ...]:
    """Sees every open request of the model through that was answered, by command or by hand, or whose time is over; says what became of each."""
    said = []
    for version, asked in open_requests(registered, recipe.name):
        champion = registered.champion_number(recipe.name)
        step, reason = next_for(asked, champion, version.version, time.time(), manual=recipe.promotion.approval == "manual")
        if step == "wait":
            continue
        if step == "promote":
            by = asked.answered_by if asked.state == approval.APPROVED else asked.request.by
            outcome = approve(
                recipe.name,
                version.version,
                asked.request,
                by,
                reason.message,
                replicas.addresses,
                recipe_path=str(path),
                watch_seconds=watch_seconds,
                unreachable_fails=replicas.unreachable_fails,
            )
            refuse_taken_back(outcome)
            said.append(f"{version.label} is promoted: {reason}")
            continue
        action: Literal["rejected", "kept"] = "rejected" if step == "decline" else "kept"
        why = asked.request.grounds(asked.answered_by if step == "decline" else user_at_host(), reason.message, code_lineage(project.root)["git_commit"])
        approval.close(registered, version, model_lock(project, "promote", recipe.name), action, why)
        said.append(f"{version.label} is {action}: {reason}")
    return tuple(said)


@task(**READING, task_run_name="drift of {recipe.name}")
def look_for_drift(registered: Registry, recipe: FinetuneRecipe, replicas: Replicas, project: Project) -> Reason | None:
    """Asks the champion the rows that were approved since its promotion, which it cannot have been trained on. That it cannot be told fails no run; None if the recipe does not ask."""
    rules, promotion = recipe.drift, recipe.promotion
    champion = registered.champion(recipe.name) if rules else None
    if rules is None or champion is None:
        return None
    before = promoted(history(registered, recipe.name), (champion.version, champion.digest), promotion.metric)
    if before is None:
        return Reason(DRIFT_UNKNOWN, f"how {champion.label} did at its promotion is not on record: it was promoted by force, by hand or by another metric")
    fresh, file = rows_since(project.resolve(rules.rows), project, before.at), str(rules.rows)
    if len(fresh) < rules.minimum_rows:
        return Reason(
            DRIFT_UNKNOWN,
            f"{len(fresh)} rows of {file} were approved since {champion.label} was promoted; {rules.minimum_rows} are needed (drift.minimum_rows)",
        )
    try:
        with open_fleet(project, replicas.addresses) as fleet, trial.evaluation_fleet(project, fleet, replicas.evaluate_on, recipe.name) as asked:
            answers = answers_of(replica_of(asked, recipe.name)[0].url, champion.label, fresh, file)
        if promotion.metric == "judge" and promotion.judge:
            answers = graded({champion.label: answers}, promotion.judge, file)[champion.label]
    except ServingError as error:
        return Reason(DRIFT_UNKNOWN, f"{champion.label} could not be asked ({str(error).partition(chr(10))[0]})")
    return drift(champion.label, against_level(answers, before.value, promotion.metric, promotion.confidence), rules)


@task(**READING, task_run_name="what has changed for {recipe.name}")
def compare(registered: Registry, recipe: FinetuneRecipe, path: Path, project: Project, force: bool, drifted: Reason | None = None) -> Compared:
    """Changes nothing in the registry. Drift is a reason to train, but never the same inputs again, which would make the same adapter."""
    rows = checked_rows(path, recipe, project)
    with progress("base model") as report:
        base = basemodel.resolve_base_model(recipe.base_model, project, report)
    refuse_misfit(path, recipe, base)
    inputs = lineage.inputs_of(recipe, base, rows)
    if force:
        return Compared((Reason("forced", "asked for by --force"),), None, rows.digest)
    worse = (drifted,) if drifted and drifted.code == DRIFTED else ()
    if same := registered.trained(recipe.name, inputs.digest):
        return Compared(worse, same, rows.digest)
    newest = registered.newest(recipe.name)
    now = lineage_now(registry.flat(recipe.model_dump(mode="json")), lineage.lineage_of(recipe, inputs, project.root))
    found = (*changes(registered.lineage(newest) if newest else None, now, newest.label if newest else ""), *worse)
    return Compared(found, None if due(found) else newest, rows.digest)


def train(
    recipe: FinetuneRecipe, path: Path, compared: Compared, registered: Registry, force: bool, project: Project, training_seconds: float | None
) -> Finetuned:
    """The version that `compared` found or asks for. One training of this project's host at a time; `training_seconds` do not count the wait for the one before."""
    if compared.version:
        registered.close(compared.version.run_id)  # open still if its run was killed right after it had registered
        return Finetuned(compared.version, trained=False)
    with locked(project.runs / TRAINING_LOCK, lambda: print("waiting for another retraining on this host", file=sys.stderr, flush=True)):
        try:
            done = finetune.with_options(timeout_seconds=training_seconds)(str(path), force)
        except FlowRunTimeoutError as error:
            hours = (training_seconds or 0) / 3600
            raise ProcessFailed(
                f"training {recipe.name} was ended after {hours:g} h; the next run goes on from its last checkpoint; give it longer: tuneserve schedule --timeout"
            ) from error
    registered.tag_version(done.version, {RETRAINED_TAG: "; ".join(map(str, compared.reasons))[:MAX_TAG_CHARACTERS]})
    return done


def pass_gate(
    registered: Registry, version: Version, compared: Compared, recipe: FinetuneRecipe, path: Path, replicas: Replicas, watch_seconds: float | None
) -> tuple[Reason, Outcome | None]:
    """What was decided about the version; the outcome is None where it is the champion, or was decided about before on the same grounds."""
    champion = registered.champion(version.name)
    gate = gate_digest(version.digest, champion.digest if champion else None, compared.dataset_digest, recipe.promotion)
    entries = history(registered, version.name)
    asked = any(version == each for each, _ in open_requests(registered, version.name))
    step, reason = gate_step((version.version, version.digest), champion.version if champion else None, entries, gate, asked=asked)
    if step == "nothing":
        return reason, None
    outcome = promote(
        version.name,
        version.version,
        replicas.addresses,
        watch_seconds=watch_seconds,
        unreachable_fails=replicas.unreachable_fails,
        recipe_path=str(path),
        evaluate_on=replicas.evaluate_on,
        ask=recipe.promotion.approval == "manual",
    )
    return decided(version, outcome), outcome


def decided(version: Version, outcome: Outcome) -> Reason:
    """What an outcome says, in one line."""
    text = outcome.assessment.decision.text if outcome.assessment else "its promotion was interrupted, and is seen through"
    if outcome.request:
        return Reason("asks-for-approval", f"{text}; asks for approval until {outcome.request.until}: tuneserve approve {version.label}")
    if outcome.promotion is None:
        return Reason("kept-out", text)
    return Reason("promoted", "; ".join([text, *(each.text for each in outcome.watched)]))


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="record {found.decided.code}")
def record(registered: Registry, found: Retrained) -> Retrained:
    """Keeps what was compared and decided: on the version, where something was done about it, and as an artifact of the run. Raises as `refuse_taken_back`."""
    about = {"model": found.version.name, "version": found.version.version, "trained": found.trained}
    logger.info("retrained", extra=about | {"decision": found.decided.code, "reason": found.decided.message})
    create_markdown_artifact(found.markdown(), key="retrain", description=f"{found.version.label}: {found.decided.code}")
    if found.outcome:
        registered.tag_version(found.version, {DECIDED_TAG: str(found.decided)[:MAX_TAG_CHARACTERS]})
        refuse_taken_back(found.outcome)
    return found


def refuse_taken_back(outcome: Outcome) -> None:
    """Raises ServingError if the watch took back what had been promoted, or someone moved the alias meanwhile: whoever watches the schedule should know."""
    if outcome.watched and (last := outcome.watched[-1]).ended in ("breach", "moved"):
        raise ServingError(last.text)
