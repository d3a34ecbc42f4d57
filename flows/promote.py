"""version -> examined -> alias -> live on every replica -> watched, and back. `tuneserve promote NAME[/VERSION]` and `tuneserve rollback NAME` run it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.evaluate import examine, recipe_of
from pipeline import approval, promotion, registry, watch
from pipeline.approval import Request
from pipeline.assessment import Assessment, figures
from pipeline.errors import RegistryError, TuneserveError
from pipeline.fleet import Fleet, open_fleet
from pipeline.history import Grounds
from pipeline.lineage import code_lineage
from pipeline.lock import Lock, model_lock
from pipeline.project import Project, find_project
from pipeline.promotion import Promotion
from pipeline.recipe import WatchRules
from pipeline.registry import Registry, Version
from pipeline.retraining import gate_digest
from pipeline.switch import user_at_host
from pipeline.watch import Watched, Watching

move_alias = task(cache_policy=NO_CACHE, persist_result=False, name="move_alias")(promotion.promote)
ask_for_approval = task(cache_policy=NO_CACHE, persist_result=False, name="ask_for_approval")(approval.ask)
start_canary = task(cache_policy=NO_CACHE, persist_result=False, name="start_canary")(promotion.start_canary)
watch_champion = task(cache_policy=NO_CACHE, persist_result=False, task_run_name="watch {version.label}")(watch.watch_champion)
watch_canary = task(cache_policy=NO_CACHE, persist_result=False, task_run_name="watch {version.label} at {percent}%")(watch.watch_canary)


@dataclass(frozen=True)
class Outcome:
    """`promotion` is None where the version was examined and is kept out, `assessment` where it was not examined. `watched`: the watch, or that of each canary step.

    `request`: it was found better, and people were asked.
    """

    promotion: Promotion | None
    assessment: Assessment | None = None
    watched: tuple[Watched, ...] = ()
    request: Request | None = None

    @property
    def kept_out(self) -> str:
        """Why it was not promoted; '' if it was."""
        found = self.assessment
        return (
            f"{found.version} is not promoted, {found.decision.text}; every answer: run {found.run_id} in MLflow"
            if found and not self.promotion and not self.request
            else ""
        )


@flow(name="promote", flow_run_name="promote {name}/{version}", persist_result=False)
def promote(
    name: str,
    version: str | None,
    replicas: list[str] | None = None,
    *,
    canary_percents: list[float] | None = None,
    watch_seconds: float | None = None,
    unreachable_fails: bool = False,
    wait: bool = True,
    force: bool = False,
    recipe_path: str | None = None,
    evaluate_on: str | None = None,
    ask: bool = False,
) -> Outcome:
    """Makes a version (None: the newest) the champion if it is found better on the held-out rows, or by force; or with percentages the candidate, step by step.

    `replicas`: their addresses, as in a serving recipe; None: those that run here. `recipe_path`: whose rows and rules count; None: the recipe that it was trained by.
    `evaluate_on`: the replica that is asked the held-out rows; None: the first of `replicas` that can.
    `watch_seconds`: how long it is watched afterwards, or at each step; None: not, and then there is one step at most.
    `ask`: one that is found better is not promoted; that it asks to be is recorded on it, until its recipe's `promotion.approval_days` are over.
    """
    project = find_project()
    registered = Registry(registry.tracking_uri())
    chosen = registered.version(name, version)
    lock = model_lock(project, "promote", name)
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:  # the token is read there: a flow's parameters are stored
        watching = watch.begin(fleet, watch_rules(registered, chosen, recipe_path), watch_seconds) if watch_seconds else None
        if canary_percents:
            return _canary(registered, chosen, canary_percents, fleet, lock, watching)
        outcome = _champion(registered, chosen, fleet, lock, project, wait=wait, force=force, recipe_path=recipe_path, evaluate_on=evaluate_on, ask=ask)
        if watching is None or outcome.promotion is None:
            return outcome
        return replace(outcome, watched=(watch_champion(registered, chosen, watching, lock, grounds(project, "watched")),))


def _canary(registered: Registry, version: Version, percents: Sequence[float], fleet: Fleet, lock: Lock, watching: Watching | None) -> Outcome:
    """Step by step as long as each step's watch is passed; stays at the last share that it came to, unless a breach ended it."""
    watched: tuple[Watched, ...] = ()
    for percent in percents:
        started = start_canary(registered, version, percent, fleet, lock)
        if watching is None:
            break
        watched += (watch_canary(registered, version, percent, watching, lock),)
        if watched[-1].ended != "passed":
            break
    return Outcome(started, watched=watched)


def _champion(
    registered: Registry,
    version: Version,
    fleet: Fleet,
    lock: Lock,
    project: Project,
    *,
    wait: bool,
    force: bool,
    recipe_path: str | None,
    evaluate_on: str | None,
    ask: bool,
) -> Outcome:
    """Champion by force, or if it is found better, or then the one who asks to be."""
    reached = fleet if wait else None
    if force:
        return Outcome(move_alias(registered, version, reached, lock, grounds=grounds(project, "not compared with the champion", forced=True)))
    deployed = registered.deployment(version.name)
    promotion.refuse_switched_off(deployed, version)
    champion = deployed.champion
    if champion == version.version:
        return Outcome(move_alias(registered, version, reached, lock, grounds=grounds(project, "it is the champion already"), instead_of=champion))
    try:
        found = examine(registered, version, fleet, project, recipe_path=recipe_path, evaluate_on=evaluate_on)
    except TuneserveError as error:
        promotion.decline(registered, version, lock, "failed", grounds(project, str(error).partition("\n")[0]))
        raise
    compared = registered.version(version.name, champion).digest if champion else None
    gate = gate_digest(version.digest, compared, found.dataset_digest, found.rules)
    why = grounds(project, found.decision.text, scores=scores(found), evaluation_run=found.run_id, gate=gate)
    if found.decision.verdict == "promote" and ask:
        return Outcome(None, found, request=ask_for_approval(registered, version, lock, why, champion, found.rules.approval_days))
    if found.decision.verdict == "promote":
        return Outcome(move_alias(registered, version, reached, lock, grounds=why, instead_of=champion), found)
    promotion.decline(registered, version, lock, "kept" if found.decision.verdict == "keep" else "refused", why)
    return Outcome(None, found)


def watch_rules(registered: Registry, version: Version, recipe_path: str | None) -> WatchRules:
    """The recipe's `promotion.watch`; the defaults where the version has no recipe and none is named."""
    try:
        return recipe_of(registered, version, recipe_path).promotion.watch
    except RegistryError:
        return WatchRules()


@flow(name="rollback", flow_run_name="rollback {name}", persist_result=False)
def rollback(name: str, to: str | None = None, replicas: list[str] | None = None, *, unreachable_fails: bool = False, wait: bool = True) -> Promotion:
    """Makes the champion before the one of now, or version `to`, champion again."""
    project = find_project()
    registered = Registry(registry.tracking_uri())
    target = promotion.rollback_target(registered, name, to)
    lock = model_lock(project, "promote", name)
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:
        return move_alias(registered, target, fleet if wait else None, lock, grounds=grounds(project, "rolled back"), rolls_back=True)


def grounds(project: Project, reasons: str, **more: Any) -> Grounds:
    return Grounds(user_at_host(), reasons, git_commit=code_lineage(project.root)["git_commit"], **more)


def scores(found: Assessment) -> str:
    """The metric per side, as JSON."""
    metric = found.rules.metric
    return json.dumps({metric: {"version": figures(found.own)[metric], **{side: figures(answers)[metric] for side, answers in found.others.items()}}})
