"""Deployments of the retrain flow on the user's Prefect server: one per recipe, one run at a time, no storm of missed runs. `tuneserve schedule` runs it.

A run whose process is gone is found by its silence: runs send heartbeats, and an automation of the server, shared by all our schedules, marks as crashed what sends none any
more. That frees its place, as the end of the lease does that the server holds for it.

Prefect 3.7 keeps a schedule's `max_scheduled_runs` and reads it nowhere, and it has no catch-up setting: runs are planned ahead, and those whose time passed while
no worker was there are all late, and all due. So the first that runs stands for the others (`stand_for_missed_runs`).
"""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from prefect.states import Cancelled
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from pipeline.errors import Fault, InvalidInput, ServingError
from pipeline.journal import without_credentials
from pipeline.project import Project
from pipeline.schedule import TAG, Schedule, Scheduled

ENTRYPOINT = "flows.retrain.retrain"
"""A module's path, so that a worker runs what is installed beside it, from whatever folder."""
STRATEGIES = {"cancel-new": ConcurrencyLimitStrategy.CANCEL_NEW, "enqueue": ConcurrencyLimitStrategy.ENQUEUE}
GRACE_SECONDS = 300
"""How long a run may take from being taken to running (importing MLflow and Prefect on a busy host), or be silent, before another may have its place; the length of
the lease that Prefect renews for a run."""
HEARTBEAT_SECONDS = 30
"""Prefect takes no less. A server may be away for nine of them without a run that lives being taken for dead."""
ZOMBIES = "tuneserve: a run that is silent has crashed"
"""The automation's name."""
FORGETFUL = "prefect.server.concurrency.lease_storage.memory"
"""Where a Prefect server keeps leases if it is not told otherwise: one that is killed knows of no place any more that is taken, and so frees none."""


def deploy(schedule: Schedule, flow: Flow[..., Any], project: Project) -> Scheduled:
    """Makes or changes the deployment; runs that were planned by its schedule of before are gone. Raises InvalidInput if its name is another recipe's."""
    with _server() as client:
        flow_id = client.create_flow_from_name(flow.name)
        found = _find(client, flow.name, schedule.name)
        if found and (found.parameters.get("recipe_path"), _folder(found)) != (schedule.recipe, str(project.root)):
            raise InvalidInput(
                [
                    Fault(
                        "--name", "", f"{schedule.name} is the schedule of {found.parameters.get('recipe_path')} in {_folder(found)}; give another: --name NAME"
                    )
                ]
            )
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=schedule.pool, type="process", base_job_template=ProcessWorker.get_default_base_job_template()))
        if (kind := client.read_work_pool(schedule.pool).type) != "process":
            raise InvalidInput([Fault("--pool", "", f"{schedule.pool} is a work pool of type {kind}; name one of type process, or a new one")])
        environment = {key: value for key, value in project.environment().items() if not key.startswith("PREFECT_LOGGING")}  # a worker shows what its runs log
        _watch_for_zombies(client)
        client.create_deployment(
            flow_id=flow_id,
            name=schedule.name,
            description=f"tuneserve retrain {schedule.recipe}",
            entrypoint=ENTRYPOINT,
            work_pool_name=schedule.pool,
            schedules=[DeploymentScheduleCreate(schedule=_timing(schedule), slug=schedule.name)],
            concurrency_limit=1,
            concurrency_options=ConcurrencyOptions(collision_strategy=STRATEGIES[schedule.overlap], grace_period_seconds=GRACE_SECONDS),
            parameters=schedule.parameters,
            parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
            enforce_parameter_schema=True,
            job_variables={"working_dir": str(project.root), "env": environment | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}},
            tags=[TAG],
            paused=False,
        )
        return _scheduled(client, _named(client, flow.name, schedule.name))


def scheduled() -> list[Scheduled]:
    """Every schedule of ours on the server, by name."""
    with _server() as client:
        return sorted((_scheduled(client, each) for each in _deployments(client)), key=lambda each: each.name)


def pause(flow_name: str, name: str) -> Scheduled:
    """No run starts until `resume`; one that runs goes on."""
    with _server() as client:
        client.pause_deployment(_named(client, flow_name, name).id)
        return _scheduled(client, _named(client, flow_name, name))


def resume(flow_name: str, name: str) -> Scheduled:
    with _server() as client:
        client.resume_deployment(_named(client, flow_name, name).id)
        return _scheduled(client, _named(client, flow_name, name))


def remove(flow_name: str, name: str) -> None:
    """Takes the deployment away, and the runs that it had planned; one that runs goes on. The last one takes the automation along."""
    with _server() as client:
        client.delete_deployment(_named(client, flow_name, name).id)
        if not _deployments(client):
            for found in client.read_automations_by_name(ZOMBIES):
                client.delete_automation(found.id)


def forgets_leases() -> bool:
    """Whether the server, if it is killed, forgets which places are taken; False if it does not say."""
    with _server() as client, contextlib.suppress(httpx.HTTPStatusError, ValueError, KeyError, TypeError):
        return bool(client.request("GET", "/admin/settings").raise_for_status().json()["server"]["concurrency"]["lease_storage"] == FORGETFUL)
    return False


def stand_for_missed_runs() -> None:
    """Cancels what the schedule of the run that calls this had planned for before now and nobody ran: one look at how things stand makes up for all."""
    deployment = runtime.deployment.id
    if not deployment:
        return
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:  # what is left over here costs a run that finds nothing to do
        now = datetime.now(UTC)
        for run in _runs(client, deployment, FlowRunSort.EXPECTED_START_TIME_ASC, planned=True, before=now):
            if run.auto_scheduled and str(run.id) != str(runtime.flow_run.id):
                client.set_flow_run_state(run.id, Cancelled(message=f"missed; {runtime.flow_run.name} stands for it"))


@contextlib.contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    """The Prefect server of PREFECT_API_URL. Raises ServingError if it does not answer, or refuses."""
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPStatusError as error:
        raise ServingError(f"Prefect refuses: {without_credentials(str(error)).splitlines()[0]}; look at the server's log") from error
    except httpx.HTTPError as error:
        raise ServingError(f"no Prefect server answers at PREFECT_API_URL ({type(error).__name__}); start it, or correct the URL") from error


def _watch_for_zombies(client: SyncPrefectClient) -> None:
    """Makes the automation, or makes it what it should be. Its signs of life are any event of a run of ours, from when a worker takes it."""
    taken = {f"prefect.flow-run.{name}" for name in ("Pending", "Submitting", "InfrastructurePending", "heartbeat")}
    trigger = EventTrigger(
        after=taken,
        expect={"prefect.flow-run.*"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=GRACE_SECONDS),
    )
    crash = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", force=False, message=f"silent for {GRACE_SECONDS} s: its process or its host is gone")
    wanted = AutomationCore(name=ZOMBIES, description="Made by tuneserve schedule; goes with the last schedule.", trigger=trigger, actions=[crash])
    found = client.read_automations_by_name(ZOMBIES)
    if found:
        client.update_automation(found[0].id, wanted)
    else:
        client.create_automation(wanted)
    for each in found[1:]:  # two commands made it at the same time
        client.delete_automation(each.id)


def _deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    return client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])))


def _timing(schedule: Schedule) -> CronSchedule | IntervalSchedule:
    try:
        if schedule.cron:
            return CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
        return IntervalSchedule(interval=timedelta(seconds=schedule.interval_seconds or 0))
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidInput(
            [Fault("--cron", "", f'{schedule.cron!r} cannot be read ({why}); minute hour day month weekday, for example "0 3 * * 1"')]
        ) from error


def _find(client: SyncPrefectClient, flow_name: str, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(f"{flow_name}/{name}")
    except ObjectNotFound:
        return None


def _named(client: SyncPrefectClient, flow_name: str, name: str) -> DeploymentResponse:
    if found := _find(client, flow_name, name):
        return found
    raise InvalidInput([Fault(name, "", "is not scheduled; see what is: tuneserve schedule --list")])


def _folder(deployment: DeploymentResponse) -> str | None:
    folder = deployment.job_variables.get("working_dir")
    return str(folder) if folder else None


def _scheduled(client: SyncPrefectClient, deployment: DeploymentResponse) -> Scheduled:
    timing = deployment.schedules[0].schedule if deployment.schedules else None
    if isinstance(timing, CronSchedule):
        when = f"cron {timing.cron} ({timing.timezone or 'UTC'})"
    elif isinstance(timing, IntervalSchedule):
        when = f"every {timing.interval.total_seconds():g} s"
    else:
        when = "by hand"
    options = deployment.concurrency_options
    overlap = next((name for name, strategy in STRATEGIES.items() if options and options.collision_strategy == strategy), "enqueue")
    coming = _runs(client, deployment.id, FlowRunSort.EXPECTED_START_TIME_ASC, planned=True, limit=1)
    last = _runs(client, deployment.id, FlowRunSort.START_TIME_DESC, planned=False, limit=1)
    pool = deployment.work_pool_name or "none"
    workers = [each for each in client.read_workers_for_work_pool(pool) if each.status == WorkerStatus.ONLINE] if deployment.work_pool_name else []
    return Scheduled(
        deployment.name,
        str(deployment.parameters.get("recipe_path")),
        when,
        overlap,
        pool,
        bool(deployment.paused),
        len(workers),
        next((_iso(run.expected_start_time) for run in coming), None),
        next((_iso(run.start_time or run.expected_start_time) for run in last), None),
        next((run.state_name for run in last), None),
    )


def _runs(
    client: SyncPrefectClient, deployment: Any, order: FlowRunSort, *, planned: bool, before: datetime | None = None, limit: int | None = None
) -> list[FlowRun]:
    """Runs that are planned, until `before` if given, or those that are not: running or ended."""
    kinds = FlowRunFilterStateType(any_=[StateType.SCHEDULED]) if planned else FlowRunFilterStateType(not_any_=[StateType.SCHEDULED])
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=kinds),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=before) if before else None,  # type: ignore[arg-type]
        ),
        sort=order,
        limit=limit,
    )


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat(timespec="seconds") if moment else None
