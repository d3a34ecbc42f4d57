"""When a recipe is retrained by itself: what `tuneserve schedule` was asked, checked. flows/schedule.py makes a Prefect deployment of it."""

import zoneinfo
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import Fault, InvalidInput

POOL = "tuneserve"
"""The work pool, of type process, that a worker on the training host polls."""
TAG = "tuneserve"
"""Of every deployment that `tuneserve schedule` made, and of its runs; prefect.yaml gives it too."""
TRAINING_SECONDS = 72 * 3600.0
"""What a training may take unless the schedule says otherwise; one that is ended goes on from its last checkpoint at the next run."""
Overlap = Literal["cancel-new", "enqueue"]


@dataclass(frozen=True)
class Schedule:
    """`cron` (with `timezone`) or `interval_seconds`. `overlap`: what becomes of a run that is due while one runs. `parameters` are the retrain flow's."""

    name: str
    recipe: str
    parameters: dict[str, Any]
    cron: str | None = None
    interval_seconds: int | None = None
    timezone: str = "UTC"
    overlap: Overlap = "cancel-new"
    pool: str = POOL

    @property
    def when(self) -> str:
        return f"cron {self.cron} ({self.timezone})" if self.cron else f"every {self.interval_seconds} s"


@dataclass(frozen=True)
class Scheduled:
    """A schedule as Prefect has it. Times are ISO, in UTC; None: not yet, or not any more. `workers`: how many poll its pool now."""

    name: str
    recipe: str
    when: str
    overlap: str
    pool: str
    paused: bool
    workers: int
    next_run: str | None = None
    last_run: str | None = None
    last_state: str | None = None

    def line(self) -> str:
        """For a terminal."""
        last = f"last {self.last_run} {self.last_state}" if self.last_run else "no run yet"
        coming = "paused" if self.paused else f"next {self.next_run or 'not planned yet'}"
        return f"{self.name}: {self.recipe}, {self.when}, overlap {self.overlap}; {coming}; {last}; {self.workers} worker{'' if self.workers == 1 else 's'}"


def checked_timing(cron: str | None, interval_seconds: int | None, timezone: str | None) -> str:
    """The time zone. Raises InvalidInput unless there is exactly one of cron and interval, and a zone that exists goes with cron."""
    if (cron is None) == (interval_seconds is None):
        what = "both are given" if cron else "neither is given"
        raise InvalidInput([Fault("--cron, --interval", "", f'{what}; give one: --cron "0 3 * * 1" (Mondays at 3:00) or --interval SECONDS')])
    if cron is not None and len(cron.split()) != 5:
        raise InvalidInput([Fault("--cron", "", f'{cron!r} has not five fields; minute hour day month weekday, for example "0 3 * * 1"')])
    if timezone is None:
        return "UTC"
    if cron is None:
        raise InvalidInput([Fault("--timezone", "", "goes with --cron; an interval has none")])
    try:
        return zoneinfo.ZoneInfo(timezone).key
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidInput([Fault("--timezone", "", f"{timezone!r} is no time zone; give an IANA name, for example Europe/Berlin")]) from None


FORGETS_LEASES = (
    "this Prefect server keeps in memory which run holds a schedule's place: killed, it never frees that place, and takes it from a run that lives; start it with "
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem (several servers: prefect_redis.lease_storage)"
)


def no_server(embedded_url: str | None) -> InvalidInput:
    """The error where no Prefect server is named. `embedded_url`: of the embedded server, if it runs."""
    where = f"for the embedded one: export PREFECT_API_URL={embedded_url}/api" if embedded_url else "or start the embedded one (tuneserve up) and name that"
    return InvalidInput(
        [Fault("PREFECT_API_URL", "", f"is not set, and a schedule fires only on a Prefect server that stays up; name yours (http://HOST:4200/api), {where}")]
    )
