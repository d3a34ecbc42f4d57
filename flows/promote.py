"""version -> alias -> live on every replica, and back. `tuneserve promote NAME[/VERSION]` and `tuneserve rollback NAME` run it."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from pipeline import promotion, registry
from pipeline.fleet import open_fleet
from pipeline.project import find_project
from pipeline.promotion import Promotion
from pipeline.registry import Registry

move_alias = task(cache_policy=NO_CACHE, persist_result=False, name="move_alias")(promotion.promote)
start_canary = task(cache_policy=NO_CACHE, persist_result=False, name="start_canary")(promotion.start_canary)


@flow(name="promote", flow_run_name="promote {name}/{version}", persist_result=False)
def promote(
    name: str,
    version: str | None,
    replicas: list[str] | None = None,
    *,
    canary_percent: float | None = None,
    unreachable_fails: bool = False,
    wait: bool = True,
) -> Promotion:
    """Makes a version (None: the newest) the champion, or with a percentage the candidate. `replicas`: their addresses, as in a serving recipe; None: those that run here."""
    project = find_project()
    registered = Registry(registry.tracking_uri())
    chosen = registered.version(name, version)
    lock = promotion.lock_file(project, name)
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:  # the token is read there: a flow's parameters are stored
        if canary_percent is not None:
            return start_canary(registered, chosen, canary_percent, fleet, lock)
        return move_alias(registered, chosen, fleet if wait else None, lock)


@flow(name="rollback", flow_run_name="rollback {name}", persist_result=False)
def rollback(name: str, to: str | None = None, replicas: list[str] | None = None, *, unreachable_fails: bool = False, wait: bool = True) -> Promotion:
    """Makes the champion before the one of now, or version `to`, champion again."""
    project = find_project()
    registered = Registry(registry.tracking_uri())
    target = promotion.rollback_target(registered, name, to)
    with open_fleet(project, replicas, unreachable_fails=unreachable_fails) as fleet:
        return move_alias(registered, target, fleet if wait else None, promotion.lock_file(project, name), rolls_back=True)
