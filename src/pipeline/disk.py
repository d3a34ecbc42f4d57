"""What fills the project's disk: each thing that piles up, whether it may go, and why. What runs uses, or what cannot be made again, never goes.

Links are neither followed nor removed. A folder is renamed before it is emptied, so that whatever stops us, nothing is left half there under its name.
"""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from pipeline import process, services
from pipeline.adapter import ADAPTER_NAME
from pipeline.basemodel import TINY, TINY_DRAFTS, TINY_LOCK, tiny_name
from pipeline.project import Project
from pipeline.serving.follower import LIVE_FILE
from pipeline.serving.launch import SERVICE_PREFIX
from pipeline.serving.local_adapters import UNFINISHED
from pipeline.serving.settings import SETTINGS_VARIABLE
from pipeline.training import LEASE

BASES, CACHES, RUNS, LOGS, SERVED, SAMPLES, ARTIFACTS = CATEGORIES = ("bases", "caches", "runs", "logs", "served adapters", "samples", "registry artifacts")
logger = logging.getLogger(__name__)
GONE = ".gone-"
"""What a name starts with once its folder is being removed."""
RUN_ID = re.compile(r"[0-9a-f]{32}")
TRAINING_LOG = re.compile(r"training-([0-9a-f]{32})\.(log|log\.1|ranks|parity\.log|parity\.log\.1)")
SERVER_LOG = re.compile(r"(?P<server>.+)\.log\.1")
INPUT_DIGEST = re.compile(r"[0-9a-f]{16,}")
STRANGE = "the registry knows nothing of what lies here: it is another one, or its database was lost and made again"
DAY_SECONDS = 86400


@dataclass(frozen=True)
class Verdict:
    """What a file or folder is, and whether and why it may go; `locks` are the files that whoever might begin to use it holds.

    `no_training`: whether it may go only while no command trains.
    """

    what: str
    removable: bool
    reason: str
    locks: tuple[Path, ...] = ()
    no_training: bool = False


KEPT = Verdict("answered requests", False, "its server lets them go by their age (sampling.keep_days); delete the folder yourself once it samples no more")


@dataclass(frozen=True)
class Entry(Verdict):
    """A file or folder with its verdict. `written`: when anything in it last was, in seconds since 1970; `age_days`: since then."""

    _: KW_ONLY
    category: str
    path: Path
    size_bytes: int
    written: float
    age_days: float

    def as_dict(self, project: Project) -> dict[str, Any]:
        return {
            "category": self.category,
            "path": project.relative(self.path),
            "size_bytes": self.size_bytes,
            "age_days": round(self.age_days, 2),
            "what": self.what,
            "removable": self.removable,
            "reason": self.reason,
        }


class RegisteredVersion(Protocol):
    """A version as registry.Registered has it."""

    @property
    def label(self) -> str: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def run_ids(self) -> Collection[str]: ...


class RunTrace(Protocol):
    """What the registry knows of a run as registry.Trace has it."""

    @property
    def deleted(self) -> bool: ...
    @property
    def recipe(self) -> str: ...
    @property
    def input_digest(self) -> str: ...


class Registry(Protocol):
    """What is asked of the registry; registry.Registry is the real one."""

    def registered(self) -> Sequence[RegisteredVersion]: ...

    def trace(self, run_id: str) -> RunTrace | None: ...

    def holds_adapter(self, run_id: str) -> bool: ...


@dataclass(frozen=True)
class Known:
    """What the registry said, asked after the folders were listed. About a run that is not in `asked` it was not asked: it is younger than this."""

    asked: frozenset[str]
    labels: dict[str, str]
    """Version by run id, for every run that a version names."""
    held: frozenset[str]
    """Runs whose adapter the registry holds as a version."""
    traces: Mapping[str, RunTrace]
    """Of every run of `asked` that the registry has, deleted ones too."""
    digests: frozenset[str]
    """Of every version."""

    def recognises(self, digests: Iterable[str]) -> bool:
        """Whether the registry knows anything of what lies here: a run, or one of these adapters that servers fetched."""
        return bool(self.asked & (self.traces.keys() | self.labels.keys()) or self.digests & set(digests))


@dataclass(frozen=True)
class Limits:
    """What the user lets go: unfinished trainings and what runs without a version left from this age on, and, if so said, adapters that were never registered."""

    older_than_days: float
    unregistered: bool = False


@dataclass(frozen=True)
class Activity:
    """What runs now: vLLM servers by their recipe's name, and trainings by run id."""

    replicas: frozenset[str]
    trainings: frozenset[str]

    @property
    def text(self) -> str:
        """Who may be using what all share; '' if nobody runs."""
        running = [f"vLLM {name}" for name in sorted(self.replicas)] + [f"training {run_id}" for run_id in sorted(self.trainings)]
        return f"{', '.join(running)} may use it" if running else ""


@dataclass(frozen=True)
class Removal:
    """What `remove` did: what went, the bytes that are free now, and why the others stayed after all."""

    removed: tuple[Path, ...]
    freed_bytes: int
    left: dict[Path, str]


def run_ids(project: Project) -> frozenset[str]:
    """Every run of which a folder or artifacts lie here."""
    folders = [*_listing(project, project.runs), *_artifact_folders(project)]
    return frozenset(path.name for path in folders if RUN_ID.fullmatch(path.name))


def concerns_registry(project: Project) -> bool:
    """Whether anything lies here of which only the registry can say whether it may go."""
    return bool(run_ids(project) or any(_listing(project, folder) for folder in _served_folders(project)))


def know(registry: Registry, ids: frozenset[str]) -> Known:
    """What `registry` says of the runs `ids`, which were listed before."""
    versions = registry.registered()
    labels = {run_id: version.label for version in versions for run_id in version.run_ids}
    held = frozenset(run_id for run_id in ids & labels.keys() if registry.holds_adapter(run_id))
    traces = {run_id: trace for run_id in sorted(ids) if (trace := registry.trace(run_id))}
    return Known(ids, labels, held, traces, frozenset(version.digest for version in versions if version.digest))


def survey(project: Project, known: Known | None, *, unknown: str, artifacts_ours: bool, limits: Limits) -> list[Entry]:
    """Everything that piles up, by category, largest first. `known` is None if the registry was not asked; `unknown` then says why.

    `artifacts_ours`: the registry's files lie in this project's mlruns/.
    """
    active = activity(project)
    served = [path for folder in _served_folders(project) for path in _listing(project, folder)]
    if known and not known.recognises(path.name for path in served):
        known, unknown = None, STRANGE
    runs = list(_entries(RUNS, _listing(project, project.runs), lambda path, age_days: _judge_run(project, path, age_days, known, unknown, active, limits)))
    going = {entry.path.name for entry in runs if entry.removable}
    artifacts_known = known if artifacts_ours else None
    found = [
        *_entries(BASES, _listing(project, project.bases), lambda path, _: _judge_base(project, path, active)),
        *_entries(CACHES, _listing(project, project.state / "cache"), lambda path, _: _judge_cache(project, path, active)),
        *runs,
        *_entries(LOGS, _listing(project, project.logs), lambda path, _: _judge_log(project, path, going)),
        *_entries(SERVED, served, lambda path, _: _judge_served(project, path, known, unknown, active)),
        *_entries(SAMPLES, _listing(project, project.samples), lambda path, _: KEPT),
        *_entries(ARTIFACTS, _artifact_folders(project), lambda path, age_days: _judge_artifacts(path, age_days, artifacts_known, unknown, limits)),
    ]
    return sorted(found, key=lambda entry: (CATEGORIES.index(entry.category), -entry.size_bytes, entry.path))


def remove(project: Project, entries: Iterable[Entry]) -> Removal:
    """Removes what `survey` says may go, unless something has come to use it since."""
    removed: list[Path] = []
    left: dict[Path, str] = {}
    freed_bytes = 0
    for entry in (entry for entry in entries if entry.removable):
        try:
            with _undisturbed(project, entry) as obstacle:
                if obstacle:
                    left[entry.path] = obstacle
                    continue
                discard(entry.path)
        except OSError as error:
            left[entry.path] = str(error)
            continue
        logger.info("removed", extra={"path": project.relative(entry.path), "what": entry.what, "freed_bytes": entry.size_bytes})
        removed.append(entry.path)
        freed_bytes += entry.size_bytes
    return Removal(tuple(removed), freed_bytes, left)


def summary(project: Project, entries: Sequence[Entry], removal: Removal | None) -> str:
    """The entries for a person, category by category, and what went or could."""
    lines: list[str] = []
    for category in CATEGORIES:
        if own := [entry for entry in entries if entry.category == category]:
            lines.append(f"{category}: {_mib(own)}, of which {_mib(entry for entry in own if entry.removable)} can go")
            for entry in own:
                mark = "can go" if entry.removable else "stays "
                lines.append(f"  {mark} {_mib([entry]):>11} {entry.age_days:5.1f} d  {project.relative(entry.path)}  {entry.what}: {entry.reason}")
    total = f"{_mib(entry for entry in entries if entry.removable)} of {_mib(entries)}"
    if removal is None:
        remedy = "; free it: tuneserve gc --delete" if any(entry.removable for entry in entries) else ""
        return "\n".join([*lines, f"{total} can go{remedy}"])
    return "\n".join([*lines, f"freed {removal.freed_bytes / 2**20:.1f} MiB ({len(removal.removed)} removed)"])


def _mib(entries: Iterable[Entry]) -> str:
    return f"{sum(entry.size_bytes for entry in entries) / 2**20:.1f} MiB"


def discard(path: Path) -> None:
    """Removes a file or a folder, read-only or not; the folder's name is free at once, whatever happens then."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    path.chmod(0o700)  # renaming a folder needs write permission on it
    if not path.name.startswith(GONE):
        path = path.rename(path.with_name(f"{GONE}{path.name}-{os.getpid()}"))
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o700)
    shutil.rmtree(path)


def activity(project: Project) -> Activity:
    """What runs now. A vLLM server is known by its record or, from its first moment to its last and even if its supervisor was killed, by its environment."""
    replicas = {found.name.removeprefix(SERVICE_PREFIX) for found in services.find_services(project, SERVICE_PREFIX)}
    for found in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            settings = Path(found.environ().get(SETTINGS_VARIABLE, ""))
            if settings.parent == project.services:
                replicas.add(settings.stem.removeprefix(SERVICE_PREFIX))
    leases = {folder.name: folder / LEASE for folder in _listing(project, project.runs) if folder.is_dir()}
    trainings = {run_id for run_id, lease in leases.items() if process.is_leased(lease) or (lease.exists() and process.supervised(str(lease)))}
    return Activity(frozenset(replicas), frozenset(trainings))


def _listing(project: Project, folder: Path) -> list[Path]:
    """What lies in `folder`; if it, or a folder on the way to it from the project, is a link, that link alone."""
    way = [folder, *folder.parents][: len(folder.relative_to(project.root).parts)]
    if link := next((part for part in reversed(way) if part.is_symlink()), None):
        return [link]
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _served_folders(project: Project) -> list[Path]:
    return [replica / "adapters" for replica in _listing(project, project.state / "serving") if replica.is_dir() and not replica.is_symlink()]


def _artifact_folders(project: Project) -> list[Path]:
    """The folders <experiment>/<run id> of the embedded MLflow."""
    experiments = _listing(project, project.mlruns / "artifacts")
    return [path for experiment in experiments for path in ([experiment] if experiment.is_symlink() else _listing(project, experiment))]


def _entries(category: str, paths: Iterable[Path], judge: Callable[[Path, float], Verdict | None]) -> Iterator[Entry]:
    """An entry for each of `paths` on which `judge`, given the path and its age in days, has a verdict."""
    now = time.time()
    for path in paths:
        try:
            size_bytes, written = _measure(path)
        except FileNotFoundError:  # gone meanwhile
            continue
        age_days = max(0.0, (now - written) / DAY_SECONDS)
        if path.is_symlink():
            verdict: Verdict | None = Verdict("a link", False, "links are neither followed nor removed")
        elif path.name.startswith(GONE):
            verdict = Verdict("left by a removal that was cut short", True, "nothing knows it any more")
        else:
            verdict = judge(path, age_days)
        if verdict:
            yield Entry(**vars(verdict), category=category, path=path, size_bytes=size_bytes, written=written, age_days=age_days)


def _measure(path: Path) -> tuple[int, float]:
    """Bytes that `path` takes on disk, and when anything in it was last written."""
    stat = path.lstat()
    size_bytes, written = stat.st_blocks * 512, stat.st_mtime
    if path.is_symlink() or not path.is_dir():
        return size_bytes, written
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                stat = Path(folder, name).lstat()
                size_bytes, written = size_bytes + stat.st_blocks * 512, max(written, stat.st_mtime)
    return size_bytes, written


def _judge_base(project: Project, path: Path, active: Activity) -> Verdict | None:
    lock = (project.bases / TINY_LOCK,)
    if not path.is_dir():
        return None
    if path.match(TINY_DRAFTS):
        idle = _unlocked(lock)
        return Verdict("unfinished tiny GLM-4.5V", idle, "its making was cut short" if idle else "it is being made", lock)
    if not path.name.startswith(f"{TINY}-"):
        return Verdict("a base model of yours", False, "tuneserve did not make it")
    if path.name == tiny_name():
        return Verdict("the tiny GLM-4.5V", False, "what `tiny` means now; making it again takes minutes")
    return _if_idle(project, active, "tiny GLM-4.5V of other sources or libraries", "`tiny` means another one now", *lock)


def _judge_cache(project: Project, path: Path, active: Activity) -> Verdict:
    return _if_idle(project, active, f"cache of {path.name}", "filled again when needed")


def _if_idle(project: Project, active: Activity, what: str, reason: str, *locks: Path) -> Verdict:
    """The verdict on what any command may use: it goes only while there is none, nor a server or training that one left."""
    locks = (project.in_use, *locks)
    idle = _unlocked((*locks, *_training_locks(project)))
    return Verdict(what, idle and not active.text, active.text or (reason if idle else "a tuneserve command runs and may use it"), locks, no_training=True)


def _judge_run(project: Project, path: Path, age_days: float, known: Known | None, unknown: str, active: Activity, limits: Limits) -> Verdict | None:
    run_id = path.name
    if path.suffix == ".lock" and path.is_file():
        goes = age_days >= limits.older_than_days and _unlocked([path])
        return Verdict("the lock of a training", True, "nobody holds it", (path,)) if goes else None
    if not path.is_dir() or not RUN_ID.fullmatch(run_id):
        return None
    if run_id in active.trainings:
        return Verdict("a training", False, "it runs")
    if known is None:
        return Verdict("a training", False, unknown)
    trace, locks = known.traces.get(run_id), _run_lock(project, known, run_id)
    if run_id in known.held:
        idle = _unlocked(locks)
        return Verdict(f"what {known.labels[run_id]} was trained with", idle, "the registry holds its adapter" if idle else "a command trains it", locks)
    if run_id in known.labels:
        return Verdict(f"the training of {known.labels[run_id]}", False, "the registry names the version but holds no adapter of it: this may be the only one")
    if run_id not in known.asked:
        return Verdict("a training", False, "it began just now")
    trained = os.path.lexists(path / "adapter")
    what = "a training that ended without a version" + (", with its adapter" if trained else "")
    if trained and trace is None:
        return Verdict(what, False, "the registry has no such run: another one may, or this is what is left; remove it by hand if you want none of it")
    if trained and not limits.unregistered:
        return Verdict(what, False, "`tuneserve train` registers it without training again; --unregistered lets it go")
    if age_days < limits.older_than_days:
        return Verdict(what, False, f"`tuneserve train` may go on from it; it is kept until it is {limits.older_than_days:g} days old")
    idle = _unlocked((*locks, *_training_locks(project)))
    reason = f"untouched for {limits.older_than_days:g} days or more" if idle else "a command trains, and may go on from it"
    return Verdict(what, idle, reason, locks, no_training=True)


def _run_lock(project: Project, known: Known, run_id: str) -> tuple[Path, ...]:
    """What a command holds that trains in the run's folder; nothing for a run that none would go on with."""
    trace = known.traces.get(run_id)
    if trace is None or not ADAPTER_NAME.fullmatch(trace.recipe) or not INPUT_DIGEST.match(trace.input_digest):
        return ()
    return (project.runs / f"{trace.recipe}-{trace.input_digest[:16]}.lock",)


def _training_locks(project: Project) -> tuple[Path, ...]:
    """Of all commands that train."""
    return tuple(project.runs.glob("*.lock"))


def _judge_log(project: Project, path: Path, going: set[str]) -> Verdict | None:
    if path.name.startswith("."):
        return None
    if training := TRAINING_LOG.fullmatch(path.name):
        run_id = training[1]
        goes = run_id in going or not os.path.lexists(project.runs / run_id)
        return Verdict("a training's log", goes, "its run's folder goes or is gone" if goes else "its run's folder stays")
    if server := SERVER_LOG.fullmatch(path.name):
        return Verdict("the log of an earlier start", True, "a newer one took its place", (project.services / f"{server['server']}.start",))
    return Verdict("a log", False, "the newest of its kind")


def _judge_served(project: Project, path: Path, known: Known | None, unknown: str, active: Activity) -> Verdict | None:
    replica = path.parent.parent
    what, lock = f"adapter {path.name[:12]} fetched by {replica.name}", (project.services / f"{SERVICE_PREFIX}{replica.name}.start",)
    if replica.name in active.replicas:
        return Verdict(what, False, "the server runs: vLLM dies if a loaded adapter's folder is gone")
    if path.name.startswith(UNFINISHED):
        return Verdict(f"unfinished download of {replica.name}", True, "the server does not run", lock)
    live = replica / LIVE_FILE
    if live.is_file() and path.name in live.read_text("utf-8", "replace"):
        return Verdict(what, False, "live when the server ended: the next start serves it again, even without the registry")
    if known is None:
        return Verdict(what, False, unknown)
    if path.name in known.digests:
        return Verdict(what, False, "of a registered version")
    return Verdict(what, True, "no registered version has this digest", lock)


def _judge_artifacts(path: Path, age_days: float, known: Known | None, unknown: str, limits: Limits) -> Verdict:
    run_id = path.name
    if not RUN_ID.fullmatch(run_id):
        return Verdict("not a run's", False, "MLflow's own, or somebody else's")
    if known is None:
        return Verdict("a run's artifacts", False, unknown or "they belong to another registry than the one in MLFLOW_TRACKING_URI")
    if run_id in known.labels:
        return Verdict(f"artifacts of {known.labels[run_id]}", False, "a registered version")
    if run_id not in known.asked:
        return Verdict("a run's artifacts", False, "it began just now")
    trace = known.traces.get(run_id)
    if trace and not trace.deleted:
        return Verdict("a run's artifacts", False, "the registry has the run; delete it there first")
    what = "artifacts of a deleted run" if trace else "artifacts of a run that the registry does not have"
    if trace is None and next(path.rglob("*.safetensors"), None):
        return Verdict(what, False, "they hold an adapter, and another registry may have the run; remove them by hand if you want none of them")
    if age_days < limits.older_than_days:
        kept = "MLflow can restore the run; " if trace else ""
        return Verdict(what, False, f"{kept}they are kept until they are {limits.older_than_days:g} days old")
    return Verdict(what, True, f"untouched for {limits.older_than_days:g} days or more")


def _unlocked(locks: Iterable[Path]) -> bool:
    """Whether nobody holds any of `locks` now; makes none that is not there."""
    with contextlib.ExitStack() as stack:
        return all(stack.enter_context(process.if_unlocked(lock)) for lock in locks if lock.exists())


@contextlib.contextmanager
def _undisturbed(project: Project, entry: Entry) -> Iterator[str]:
    """Why `entry` must stay after all, or ''; until the block ends no command of ours begins to use it."""
    locks = {*entry.locks, *(_training_locks(project) if entry.no_training else ())}
    with contextlib.ExitStack() as stack:
        if not all(stack.enter_context(process.if_unlocked(lock)) for lock in sorted(locks)):
            yield "another tuneserve command works there; run this again when it has ended"
        else:
            yield _used_now(project, entry, activity(project))


def _used_now(project: Project, entry: Entry, active: Activity) -> str:
    """What is decided again with the locks held: a command may have come and gone since the list."""
    if entry.category in (BASES, CACHES):
        return active.text
    if (training := TRAINING_LOG.fullmatch(entry.path.name)) and os.path.lexists(project.runs / training[1]):
        return "its run's folder is still there"
    if entry.category == RUNS and entry.path.name in active.trainings:
        return "it is being trained"
    if entry.category == SERVED and entry.path.parent.parent.name in active.replicas:
        return "its server has been started"
    return "something was written to it since it was listed" if _measure(entry.path)[1] > entry.written else ""
