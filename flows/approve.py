"""a request that was approved -> alias -> live on every replica. `tuneserve approve NAME/VERSION` and `tuneserve retrain RECIPE` run it."""

from prefect import flow

from flows.promote import Outcome, grounds, move_alias, watch_champion, watch_rules
from pipeline import watch
from pipeline.approval import Request
from pipeline.fleet import open_fleet
from pipeline.lineage import code_lineage
from pipeline.lock import model_lock
from pipeline.project import find_project
from pipeline.registry import Registry, tracking_uri


@flow(name="approve", flow_run_name="approve {name}/{version}", persist_result=False)
def approve(
    name: str,
    version: str,
    request: Request,
    by: str,
    reasons: str,
    replicas: list[str] | None = None,
    *,
    recipe_path: str | None = None,
    watch_seconds: float | None = None,
    unreachable_fails: bool = False,
) -> Outcome:
    """Makes a version champion on the grounds of its request, without comparing again; one that a killed call made champion already is seen through.

    The others as in `promote`. Raises ServingError if the champion is another one than the version was compared with.
    """
    project = find_project()
    registered = Registry(tracking_uri())
    chosen = registered.version(name, version)
    lock = model_lock(project, "promote", name)
    why = request.grounds(by, reasons, code_lineage(project.root)["git_commit"])
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:
        watching = watch.begin(fleet, watch_rules(registered, chosen, recipe_path), watch_seconds) if watch_seconds else None
        there_already = registered.champion_number(name) == version
        moved = move_alias(registered, chosen, fleet, lock, grounds=why, instead_of=version if there_already else request.champion)
        watched = (watch_champion(registered, chosen, watching, lock, grounds(project, "watched")),) if watching else ()
    return Outcome(moved, watched=watched)
