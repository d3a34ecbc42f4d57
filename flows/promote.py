"""version -> examined -> alias -> live on every replica, and back. `tuneserve promote NAME[/VERSION]` and `tuneserve rollback NAME` run it."""

import json
from dataclasses import dataclass
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.evaluate import examine
from pipeline import promotion, registry
from pipeline.assessment import Assessment, figures
from pipeline.errors import TuneserveError
from pipeline.fleet import open_fleet
from pipeline.history import Grounds
from pipeline.lineage import code_lineage
from pipeline.lock import model_lock
from pipeline.project import Project, find_project
from pipeline.promotion import Promotion
from pipeline.registry import Registry
from pipeline.switch import user_at_host

move_alias = task(cache_policy=NO_CACHE, persist_result=False, name="move_alias")(promotion.promote)
start_canary = task(cache_policy=NO_CACHE, persist_result=False, name="start_canary")(promotion.start_canary)


@dataclass(frozen=True)
class Outcome:
    """`promotion` is None where the version was examined and is kept out, `assessment` where it was not examined."""

    promotion: Promotion | None
    assessment: Assessment | None = None

    @property
    def kept_out(self) -> str:
        """Why it was not promoted; '' if it was."""
        found = self.assessment
        return f"{found.version} is not promoted, {found.decision.text}; every answer: run {found.run_id} in MLflow" if found and not self.promotion else ""


@flow(name="promote", flow_run_name="promote {name}/{version}", persist_result=False)
def promote(
    name: str,
    version: str | None,
    replicas: list[str] | None = None,
    *,
    canary_percent: float | None = None,
    unreachable_fails: bool = False,
    wait: bool = True,
    force: bool = False,
    recipe_path: str | None = None,
    evaluate_on: str | None = None,
) -> Outcome:
    """Makes a version (None: the newest) the champion if it is found better on the held-out rows, or by force; or with a percentage the candidate.

    `replicas`: their addresses, as in a serving recipe; None: those that run here. `recipe_path`: whose rows and rules count; None: the recipe that it was trained by.
    `evaluate_on`: the replica that is asked the held-out rows; None: the first of `replicas` that can.
    """
    project = find_project()
    registered = Registry(registry.tracking_uri())
    chosen = registered.version(name, version)
    lock = model_lock(project, "promote", name)
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:  # the token is read there: a flow's parameters are stored
        if canary_percent is not None:
            return Outcome(start_canary(registered, chosen, canary_percent, fleet, lock))
        reached = fleet if wait else None
        if force:
            return Outcome(move_alias(registered, chosen, reached, lock, grounds=grounds(project, "not compared with the champion", forced=True)))
        deployed = registered.deployment(name)
        promotion.refuse_switched_off(deployed, chosen)
        champion = deployed.champion
        if champion == chosen.version:
            return Outcome(move_alias(registered, chosen, reached, lock, grounds=grounds(project, "it is the champion already"), instead_of=champion))
        try:
            found = examine(registered, chosen, fleet, project, recipe_path=recipe_path, evaluate_on=evaluate_on)
        except TuneserveError as error:
            promotion.decline(registered, chosen, lock, "failed", grounds(project, str(error).partition("\n")[0]))
            raise
        why = grounds(project, found.decision.text, scores=scores(found), evaluation_run=found.run_id)
        if found.decision.verdict == "promote":
            return Outcome(move_alias(registered, chosen, reached, lock, grounds=why, instead_of=champion), found)
        promotion.decline(registered, chosen, lock, "kept" if found.decision.verdict == "keep" else "refused", why)
        return Outcome(None, found)


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
