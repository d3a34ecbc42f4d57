"""live adapters of an old base -> trained on the new one, or looked at again -> each through the gate -> all aliases, or none. `tuneserve rebase RECIPE...` runs it.

Each stage finds in the registry what is done already, so a rebase that was killed is seen through by the next one.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.evaluate import examine, replica_of
from flows.finetune import finetune
from flows.promote import grounds, move_alias, scores
from flows.retrain import TRAINING_LOCK
from pipeline import basemodel, lineage, promotion, registry
from pipeline.assessment import Recorded
from pipeline.dataset import Dataset
from pipeline.errors import Fault, InvalidInput, RegistryError, ServingError, TuneserveError
from pipeline.fleet import Fleet, open_fleet
from pipeline.history import Grounds, history
from pipeline.lock import model_lock
from pipeline.preflight import checked_rows, refuse_misfit
from pipeline.process import locked
from pipeline.progress import progress
from pipeline.project import Project, find_project
from pipeline.promotion import Promotion
from pipeline.rebasing import Binding, Need, Passed, bound, gate_of, libraries_of, need, read_passed
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.registry import Registry, Version
from pipeline.retraining import gate_digest
from pipeline.version import REBASE_TAG

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A model of the batch: its recipe, the digest of its rows, its champion, what that needs, and its record on these rows (None where nothing is to be done).

    `interrupted`: the champion is on the new base already, by a promotion that was killed before it was seen through.
    """

    path: Path
    recipe: FinetuneRecipe
    dataset_digest: str
    champion: Version
    need: Need
    recorded: Recorded | None = None
    interrupted: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a member. `version`: the one that is to be champion, as far as it is there; `fault`: why it is not through; `promotion` is None where no alias moved."""

    member: Member
    version: Version
    trained: bool = False
    passed: Passed | None = None
    fault: str = ""
    promotion: Promotion | None = None

    @property
    def through(self) -> bool:
        return self.member.need.step == "nothing" or self.passed is not None

    @property
    def moves(self) -> bool:
        return self.through and (self.member.need.step == "re-train" or self.member.interrupted)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.member.recipe.name,
            "champion": int(self.member.champion.version),
            "need": self.member.need.step,
            "reasons": [reason.as_dict() for reason in self.member.need.reasons],
            "version": int(self.version.version),
            "trained": self.trained,
            "through": self.through,
            "gate": self.passed.reasons if self.passed else None,
            "evaluation_run": self.passed.evaluation_run if self.passed else None,
            "fault": self.fault or None,
            "moved": self.promotion is not None,
        }

    def line(self) -> str:
        champion, why = self.member.champion.label, "; ".join(map(str, self.member.need.reasons))
        if self.fault:
            return f"{champion}: {self.member.need.step}, {why}: not through: {self.fault}"
        if self.member.need.step == "nothing":
            return f"{champion}: is on this base{', and its promotion is seen through' if self.promotion else ', nothing to do'}"
        came_to = self.passed.reasons if self.passed else "not looked at"
        if self.member.need.step == "re-check":
            return f"{champion}: re-checked, {why}: {came_to}"
        new = f"{'trained' if self.trained else 'was trained before:'} {self.version.label}"
        return f"{champion}: {new}, {why}: {came_to}{'; it is champion' if self.promotion else ''}"


@dataclass(frozen=True)
class Rebased:
    """What a run came to: all results, or, if one is not through, no alias moved."""

    results: tuple[Result, ...]
    now: Binding
    seconds: float = field(default=0.0, compare=False)

    @property
    def kept_back(self) -> str:
        """Why no alias moved; '' if all are through."""
        failed = [f"{each.member.champion.label}: {each.fault}" for each in self.results if each.fault]
        left = [each.version.label for each in self.results if each.moves]
        kept = f"; passed, and kept for the next run: {', '.join(left)}" if left else ""
        return f"{len(failed)} of {len(self.results)} are not through, so no alias is moved: {'; '.join(failed)}{kept}" if failed else ""

    def as_dict(self) -> dict[str, Any]:
        moved = [each.version.label for each in self.results if each.promotion]
        return {"now": self.now.as_dict(), "batch": [each.as_dict() for each in self.results], "moved": moved, "seconds": round(self.seconds, 1)}

    def lines(self) -> list[str]:
        """For a terminal."""
        return [f"now: {self.now}", *(each.line() for each in self.results)]


@flow(name="rebase", flow_run_name="rebase", persist_result=False)
def rebase(recipe_paths: list[str], replicas: list[str] | None = None, *, evaluate_on: str | None = None, unreachable_fails: bool = False) -> Rebased:
    """Brings every champion of the recipes' models onto the base that they name, as one batch: aliases move when all are through, each back if one fails.

    `replicas`: those of the new base, or stack, as `promote` has them; every model that they follow must be in the batch, or need nothing. That one is not through is
    in the result. Raises InvalidInput if the recipes do not name one base, ServingError if the batch cannot be begun, or an alias does not move.
    """
    began = time.monotonic()
    project = find_project()
    registered = Registry(registry.tracking_uri())
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:
        members, now = gather(registered, [Path(path) for path in recipe_paths], project)
        refuse_left_behind(registered, members, now, fleet)
        results = [brought_through(registered, member, now, fleet, project, evaluate_on) for member in members]
        if not any(each.fault for each in results):
            results = move_all(registered, results, fleet, project)
        return record(Rebased(tuple(results), now, time.monotonic() - began))


def gather(registered: Registry, paths: Sequence[Path], project: Project) -> tuple[list[Member], Binding]:
    """The batch, and what it is to be bound to. Changes nothing."""
    recipes = [(path, load_recipe(path, FinetuneRecipe)) for path in paths]
    names = [recipe.name for _, recipe in recipes]
    if faults := [
        Fault(str(path), "name", f"{recipe.name} is named by two recipes; give one of them") for path, recipe in recipes if names.count(recipe.name) > 1
    ]:
        raise InvalidInput(faults)
    rows = [checked_rows(path, recipe, project) for path, recipe in recipes]
    bases = []
    for path, recipe in recipes:
        with progress("base model") as report:
            bases.append(basemodel.resolve_base_model(recipe.base_model, project, report))
        refuse_misfit(path, recipe, bases[-1])
    if others := [path for (path, _), base in zip(recipes, bases, strict=True) if base.revision != bases[0].revision]:
        raise InvalidInput(
            [Fault(str(path), "base_model", f"is another base than that of {paths[0]}; a fleet serves one: give the others by themselves") for path in others]
        )
    now = Binding(bases[0].revision, basemodel.template_digest(), libraries_of(lineage.versions()))
    return [member_of(registered, path, recipe, given, now) for (path, recipe), given in zip(recipes, rows, strict=True)], now


def member_of(registered: Registry, path: Path, recipe: FinetuneRecipe, rows: Dataset, now: Binding) -> Member:
    name = recipe.name
    champion = registered.champion(name)
    if champion is None:
        raise ServingError(f"{name} has no champion, so nothing of it is live; leave {path} out, and train it: tuneserve retrain {path}")
    found = need(binding_of(registered, champion), now)
    if found.step == "nothing":
        newest = next(iter(history(registered, name)), None)
        return Member(path, recipe, rows.digest, champion, found, interrupted=bool(newest and newest.open))
    promotion.refuse_switched_off(registered.deployment(name), champion)
    run_id, values = registered.evaluated(champion, rows.eval_digest) or ("", {})
    metric = recipe.promotion.metric
    if metric not in values or not any(key.startswith(f"{metric}.") for key in values):  # its parts are there where it was the rules' metric then
        raise ServingError(
            f"{champion.label}: its {metric} on all rows of {recipe.dataset.eval} is not on record, and the new base's servers cannot be asked for it; "
            f"evaluate it where it is served: tuneserve evaluate {champion.label} --recipe {path} --replica URL"
        )
    return Member(path, recipe, rows.digest, champion, found, Recorded(champion.label, values, run_id))


def binding_of(registered: Registry, version: Version) -> Binding:
    return bound(version.base_revision, version.template_digest, registered.lineage(version), read_passed(registered.tags(version).get(REBASE_TAG)))


def refuse_left_behind(registered: Registry, members: Sequence[Member], now: Binding, fleet: Fleet) -> None:
    """Raises ServingError if the replicas are not those of the new base, or follow what would be left behind on the old one."""
    by_name = {member.recipe.name: member for member in members}
    for name in by_name:
        replica_of(fleet, name)
    faults = []
    for look in fleet.looks():
        for name, model in sorted(look.status.models.items()) if look.status else []:
            member = by_name.get(name)
            if member and member.need.step == "re-train" and model.live and model.live.key == (member.champion.version, member.champion.digest):
                faults.append(f"{look.url} serves {member.champion.label}, so it is a replica of the old base; name those of the new one")
            elif member is None and (left := left_behind(registered, name, now)):
                faults.append(f"{look.url} follows {name} too, {left}; give its recipe as well, or take it out of `follow:` there")
    if faults:
        raise ServingError("; ".join(faults))


def left_behind(registered: Registry, name: str, now: Binding) -> str:
    """Why a model that is not in the batch would be left behind; '' if it needs nothing, or nothing of it is live."""
    try:
        champion = registered.champion(name)
        found = need(binding_of(registered, champion), now) if champion else Need("nothing")
    except RegistryError as error:
        return f"of which it is not known what it is bound to ({str(error).partition(chr(10))[0]})"
    return f"whose champion {champion.label} needs a {found.step}" if champion and found.step != "nothing" else ""


def brought_through(registered: Registry, member: Member, now: Binding, fleet: Fleet, project: Project, evaluate_on: str | None) -> Result:
    """Trained where that is needed, and through the gate; why not, if not, so that one run tells all that is wrong."""
    if member.need.step == "nothing":
        return Result(member, member.champion)
    result = Result(member, member.champion)
    try:
        if member.need.step == "re-train":
            result = train(member, project)
        return replace(result, passed=pass_gate(registered, member, result.version, now, fleet, project, evaluate_on))
    except TuneserveError as error:
        return replace(result, fault=str(error).partition("\n")[0])


def train(member: Member, project: Project) -> Result:
    """One training of this project's host at a time, a scheduled one included."""
    with locked(project.runs / TRAINING_LOCK, lambda: print("waiting for another retraining on this host", file=sys.stderr, flush=True)):
        done = finetune(str(member.path))
    return Result(member, done.version, done.trained)


def pass_gate(registered: Registry, member: Member, version: Version, now: Binding, fleet: Fleet, project: Project, evaluate_on: str | None) -> Passed:
    """Asked once for the same adapters, rows, rules and libraries, if it passed. Raises ServingError if it does not; what came of it is in the history, too."""
    recipe, champion = member.recipe, member.champion
    gate = gate_of(gate_digest(version.digest, champion.digest, member.dataset_digest, recipe.promotion), now.libraries)
    before = read_passed(registered.tags(version).get(REBASE_TAG))
    if before and before.gate == gate:
        return before
    lock = model_lock(project, "promote", version.name)
    try:
        found = examine(registered, version, fleet, project, recipe_path=str(member.path), evaluate_on=evaluate_on, recorded=member.recorded)
    except TuneserveError as error:
        promotion.decline(registered, version, lock, "failed", grounds(project, f"rebase: {str(error).partition(chr(10))[0]}"))
        raise
    why = grounds(project, f"rebase: {found.decision.text}", scores=scores(found), evaluation_run=found.run_id, gate=gate)
    if found.decision.verdict != "promote":
        promotion.decline(registered, version, lock, "refused", why)
        raise ServingError(f"{version.label}: {found.decision.text}; every answer: run {found.run_id} in MLflow")
    passed = Passed(gate, found.decision.text, why.scores, found.run_id, now.libraries)
    registered.tag_version(version, {REBASE_TAG: passed.as_json()})
    if version == champion:
        promotion.decline(registered, version, lock, "kept", why)
    return passed


def move_all(registered: Registry, results: Sequence[Result], fleet: Fleet, project: Project) -> list[Result]:
    """One alias after the other, each live on every ready replica before the next. If one does not move, those that did go back."""
    moved: list[Result] = []
    for each in results:
        try:
            moved.append(replace(each, promotion=move(registered, each, fleet, project)) if each.moves else each)
        except BaseException as error:
            said = move_back(registered, [done for done in moved if done.promotion], project, str(error).partition("\n")[0] or type(error).__name__)
            if not isinstance(error, TuneserveError):
                print(said, file=sys.stderr, flush=True)
                raise
            raise ServingError(f"{each.version.label} could not be made champion: {error} {said}") from error
    return moved


def move(registered: Registry, result: Result, fleet: Fleet, project: Project) -> Promotion:
    member, passed = result.member, result.passed
    why = grounds(project, "rebase: its interrupted promotion is seen through")
    if passed:
        why = grounds(project, f"rebase: {passed.reasons}", scores=passed.scores, evaluation_run=passed.evaluation_run, gate=passed.gate)
    done: Promotion = move_alias(
        registered, result.version, fleet, model_lock(project, "promote", result.version.name), grounds=why, instead_of=member.champion.version
    )
    return done


def move_back(registered: Registry, moved: Sequence[Result], project: Project, because: str) -> str:
    """Makes the champions of before champions again, the last first; what became of it. No replica is waited for: those of the old base have not let go of them, those of the new cannot serve them."""
    back, stuck = [], []
    for each in reversed([done for done in moved if done.version != done.member.champion]):
        champion = each.member.champion
        why: Grounds = grounds(project, f"rebase taken back: {because}")
        lock = model_lock(project, "promote", champion.name)
        try:
            promotion.promote(registered, champion, None, lock, grounds=why, rolls_back=True, instead_of=each.version.version)
            back.append(champion.label)
        except TuneserveError as error:
            stuck.append(f"{champion.label} is not champion again ({str(error).partition(chr(10))[0]}): tuneserve rollback {champion.name} --no-wait")
    logger.warning("rebase taken back", extra={"back": back, "stuck": len(stuck)})
    return "; ".join([*([f"champion again: {', '.join(back)}"] if back else []), *stuck]) or "No other alias had moved."


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="record the rebase")
def record(found: Rebased) -> Rebased:
    logger.info("rebased", extra={"models": [each.member.recipe.name for each in found.results], "through": not found.kept_back})
    create_markdown_artifact("\n".join(f"- {line}" for line in found.lines()), key="rebase", description=found.kept_back[:200] or "all are through")
    return found
