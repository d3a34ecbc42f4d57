"""version -> alias -> live on every replica. `tuneserve promote NAME[/VERSION]` runs it."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from pipeline import promotion, registry
from pipeline.project import find_project
from pipeline.promotion import Promotion
from pipeline.registry import Registry
from pipeline.serving.client import Replica
from pipeline.serving.launch import adapters_token

move_alias = task(cache_policy=NO_CACHE, persist_result=False, name="move_alias")(promotion.promote)


@flow(name="promote", flow_run_name="promote {name}/{version}", persist_result=False)
def promote(name: str, version: str | None, replica_urls: list[str]) -> Promotion:
    project = find_project()
    registered = Registry(registry.tracking_uri())
    candidate = registered.version(name, version)
    token = adapters_token(project).read_text("utf-8").strip()  # read here: a flow's parameters are stored
    return move_alias(registered, candidate, [Replica(url, token) for url in replica_urls], project.services / f"promote-{name}.lock")
