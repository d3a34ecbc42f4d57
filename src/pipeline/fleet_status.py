"""The registry against the replicas: what each serves of what is wanted, and what is wrong. Pure; `tuneserve status` shows it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.fleet import Look
from pipeline.serving.client import ReplicaStatus, ServedModel, ServedVersion
from pipeline.serving.wanted import RegisteredVersion, Wanted
from pipeline.version import DISABLED_TAG

NOTHING_YET = ("model-missing", "no-champion")
"""What a replica says of a model that was not promoted yet. It is as the registry wants it, but where a version is served whose alias is gone."""


@dataclass(frozen=True)
class Problem:
    """A sentence for a person; `fails`: with it, what is asked for is not true."""

    text: str
    fails: bool = True


@dataclass(frozen=True)
class ModelReport:
    """One model on one replica. `verified`: what is live was proven there and has the registry's digest. `lagging`: it is not as the registry wants it."""

    served: ServedModel
    verified: bool
    lagging: bool

    def as_dict(self) -> dict[str, Any]:
        said = self.served.model_dump(mode="json", include={"wanted", "live", "candidate", "error", "code", "refused", "disabled"})
        return said | {"verified": self.verified, "lagging": self.lagging}


@dataclass(frozen=True)
class ReplicaReport:
    look: Look
    models: Mapping[str, ModelReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        own = {"last_sync_age_seconds", "mlflow_error", "state_error", "slots", "cache"}
        said = self.look.status.model_dump(mode="json", include=own) if self.look.status else {}
        models = {name: report.as_dict() for name, report in self.models.items()}
        return {"url": self.look.url, "state": self.look.state, "why": self.look.why, **said, "models": models}


@dataclass(frozen=True)
class FleetStatus:
    """`registry` is what MLflow says of each model, or why it cannot be read of it; `registry_error` why MLflow cannot be read at all."""

    names: tuple[str, ...]
    registry: Mapping[str, Wanted | str]
    registry_error: str | None
    replicas: tuple[ReplicaReport, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(problem.fails for problem in self.problems)

    @property
    def lags(self) -> bool:
        """Whether a replica is behind, which it may be for a second after every change."""
        return any(model.lagging for replica in self.replicas for model in replica.models.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "registry": {name: self._registry_entry(name) for name in self.names},
            "registry_error": self.registry_error,
            "replicas": [replica.as_dict() for replica in self.replicas],
            "problems": [problem.text for problem in self.problems],
        }

    def _registry_entry(self, name: str) -> dict[str, Any]:
        wanted = self.registry.get(name, self.registry_error)
        if not isinstance(wanted, Wanted):
            return {"champion": None, "candidate": None, "disabled": None, "error": wanted}
        champion, candidate = (_entry(version) for version in (wanted.champion, wanted.candidate))
        candidate = candidate and {**candidate, "percent": wanted.percent}
        return {"champion": champion, "candidate": candidate, "disabled": _switched_off(wanted), "error": _registry_fault(name, wanted)}


def compare(
    names: Sequence[str],
    registry: Mapping[str, Wanted | str],
    registry_error: str | None,
    looks: Sequence[Look],
    *,
    required: Iterable[str] = (),
    expected: bool = False,
    unreachable_fails: bool = False,
) -> FleetStatus:
    """What is so, and what is wrong. `required`: models that every replica must follow; `expected`: there should be a ready replica."""
    required = frozenset(required)
    known = {name: wanted for name, wanted in registry.items() if isinstance(wanted, Wanted)}
    replicas = tuple(_replica_report(each, names, known) for each in looks)
    followed = {name for replica in replicas for name in replica.models}
    problems = [Problem(registry_error)] if registry_error else []
    problems += [Problem(why) for why in dict.fromkeys(wanted for wanted in registry.values() if isinstance(wanted, str))]
    problems += [
        Problem(fault, fails=known[name].exists or name not in followed) for name in names if name in known and (fault := _registry_fault(name, known[name]))
    ]
    for replica in replicas:
        if replica.look.state != "ready":
            problems.append(Problem(replica.look.why, fails=unreachable_fails or replica.look.state == "refuses-us"))
        problems += _replica_problems(replica, known, required)
    problems += _missing(names, replicas, required, expected=expected)
    return FleetStatus(tuple(names), registry, registry_error, replicas, tuple(problems))


def _missing(names: Sequence[str], replicas: Sequence[ReplicaReport], required: frozenset[str], *, expected: bool) -> Iterator[Problem]:
    """What is wrong with the replicas as a whole."""
    ready = [replica for replica in replicas if replica.look.state == "ready"]
    if not ready and (expected or replicas):
        yield Problem("no replica is ready; start one: tuneserve serve RECIPE")
    elif not replicas:
        yield Problem("no replica runs in this project; name those that run elsewhere: --serving RECIPE with `replicas:`, or --replica URL", fails=False)
    else:
        followed = {name for replica in ready for name in replica.models} | required
        yield from (Problem(f"no ready replica follows {name}; add it to `follow:` in a serving recipe") for name in names if name not in followed)


def _replica_report(seen: Look, names: Sequence[str], registry: Mapping[str, Wanted]) -> ReplicaReport:
    served = seen.status.models if seen.status else {}
    return ReplicaReport(seen, {name: _model_report(served[name], registry.get(name)) for name in names if name in served})


def _model_report(served: ServedModel, wanted: Wanted | None) -> ModelReport:
    entry = served.entry(served.live) if served.live else None
    proven = entry is not None and entry.verified is not None and entry.fault is None
    if wanted is None:  # MLflow is not read: what the replica itself wants is the measure
        lagging = served.wanted is not None and (served.live is None or served.live.key != served.wanted.key)
        return ModelReport(served, proven and not lagging, lagging)
    right = _is(served.live, wanted.champion)
    lagging = (wanted.champion is not None and not right) or _wants_another(served, wanted) or _canary_lags(served, wanted) or _switch_lags(served, wanted)
    return ModelReport(served, proven and right, lagging)


def _is(served: ServedVersion | None, wanted: RegisteredVersion | None) -> bool:
    return served is not None and wanted is not None and served.key == (wanted.version, wanted.digest)


def _wants_another(served: ServedModel, wanted: Wanted) -> bool:
    """Whether the replica has not read the registry's last word on the champion; what it says is wrong may be of the word before."""
    return (served.wanted.key if served.wanted else None) != ((wanted.champion.version, wanted.champion.digest) if wanted.champion else None)


def _canary_lags(served: ServedModel, wanted: Wanted) -> bool:
    live, candidate = served.live_candidate, wanted.candidate
    if candidate is None or (wanted.champion and candidate.key == wanted.champion.key):  # the champion itself needs no canary
        return candidate is None and live is not None
    return not (_is(live, candidate) and live is not None and math.isclose(live.percent or 0.0, wanted.percent, abs_tol=1e-6))


def _switch_lags(served: ServedModel, wanted: Wanted) -> bool:
    if (served.off.model is not None) != (wanted.model_off() is not None):
        return True
    versions = [version for version in (wanted.champion, wanted.candidate) if version is not None]
    return any((version.version in served.off.versions) != (wanted.version_off(*version.key) is not None) for version in versions)


def _replica_problems(replica: ReplicaReport, registry: Mapping[str, Wanted], required: frozenset[str]) -> Iterator[Problem]:
    """What is wrong with a replica that answers; what is said of one that is not ready does not fail."""
    status, url = replica.look.status, replica.look.url
    if status is None:
        return
    ready = replica.look.state == "ready"
    yield from (Problem(f"{url} does not follow {name}; add it to `follow:` in its serving recipe", ready) for name in sorted(required - replica.models.keys()))
    for name, report in replica.models.items():
        yield from _model_problems(f"{url}: {name}", report, registry.get(name), ready)
    yield from _server_problems(url, status, ready)


def _model_problems(where: str, report: ModelReport, wanted: Wanted | None, ready: bool) -> Iterator[Problem]:
    served = report.served
    current = {key for version in (served.wanted, served.candidate and served.candidate.wanted) if version for key in [version.key]}
    current |= {(version.version, version.digest) for version in (wanted.champion, wanted.candidate) if version} if wanted else set()
    reasons = [served.error] if served.error else []
    reasons += [f"{refusal.message} ({refusal.code})" for refusal in served.refused if (refusal.version, refusal.digest) in current]
    reason = "; ".join(dict.fromkeys(reasons))
    if report.lagging:
        yield Problem(f"{where} lags: live {_said(served.live)}, wanted {_wanted_text(served, wanted)}" + (f": {reason}" if reason else ""), ready)
    elif reason:
        nothing_yet = served.live is None and served.code in NOTHING_YET
        yield Problem(f"{where}: {reason}", ready and not nothing_yet)
    for refusal in served.refused:
        if (refusal.version, refusal.digest) not in current:
            yield Problem(f"{where}/{refusal.version} is refused: {refusal.message} ({refusal.code})", fails=False)
    yield from (Problem(f"{where}/{version.version}: {version.fault}", ready) for version in served.versions if version.fault)


def _server_problems(url: str, status: ReplicaStatus, ready: bool) -> Iterator[Problem]:
    if status.mlflow_error:
        yield Problem(f"{url} cannot read MLflow and keeps what it serves: {status.mlflow_error}", ready)
    if status.state_error:
        yield Problem(f"{url} cannot keep its state on disk: {status.state_error}", ready)
    if status.slots.waits:
        yield Problem(
            f"{url}: {status.slots.waits} requests waited for one of its {status.slots.max_loras} adapter slots; raise lora.max_loras in the serving recipe",
            fails=False,
        )


def _registry_fault(name: str, wanted: Wanted) -> str | None:
    return wanted.complaint if wanted.exists else f"{name}: MLflow has no registered model of that name; look there for what is registered"


def _entry(version: RegisteredVersion | None) -> dict[str, Any] | None:
    return {"version": version.version, "digest": version.digest} if version else None


def _switched_off(wanted: Wanted) -> dict[str, Any] | None:
    """In the shape in which a replica says it."""
    versions = {tag.removeprefix(f"{DISABLED_TAG}.").partition(".")[0]: asdict(record) for tag, record in wanted.off.items() if tag != DISABLED_TAG}
    model = wanted.model_off()
    return {"model": asdict(model) if model is not None else None, "versions": versions} if wanted.off else None


def _said(version: ServedVersion | None) -> str:
    return (version.version + (f" at {version.percent:g} %" if version.percent is not None else "")) if version else "none"


def _wanted_text(served: ServedModel, wanted: Wanted | None) -> str:
    if wanted is None:
        return _said(served.wanted)
    text = wanted.champion.version if wanted.champion else "none"
    text += f" (it wants {_said(served.wanted)})" if _wants_another(served, wanted) else ""
    if wanted.candidate or served.live_candidate:
        candidate = f"{wanted.candidate.version} at {wanted.percent:g} %" if wanted.candidate else "none"
        text += f", candidate {candidate} (live {_said(served.live_candidate)})"
    return text + (" (switched on or off meanwhile)" if _switch_lags(served, wanted) else "")
