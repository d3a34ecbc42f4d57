"""The MLflow boundary: one run per training with its lineage, one model version per adapter, and the alias that is the deployment."""

import contextlib
import logging
import math
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode
from sqlalchemy.exc import SQLAlchemyError

from pipeline.adapter import ADAPTER_FILES, Adapter
from pipeline.errors import RegistryError
from pipeline.reference import MAX_REFERENCE_BYTES, REFERENCE_FILE
from pipeline.switch import Disabled, read_disabled
from pipeline.version import (
    APPROVAL_TAG,
    ARTIFACT_FOLDER,
    BASE_REVISION_TAG,
    CANARY_TAG,
    CANDIDATE,
    CHAMPION,
    DIGEST_TAG,
    DISABLED_TAG,
    INPUT_DIGEST_TAG,
    PREVIOUS_TAG,
    RECIPE_TAG,
    TAG,
    TEMPLATE_DIGEST_TAG,
    TRIAL,
    disabled_tag,
)

logger = logging.getLogger(__name__)
EXPERIMENT, HISTORY = "tuneserve", "tuneserve-history"
EVAL_DIGEST, RECHECK = "dataset_eval_digest", "recheck"
"""Tags of an evaluation: the held-out rows that were all asked; set where a champion was looked at again on another stack."""
CARD_FILE = "card.md"
"""Beside the version's folder, not in it: it is written anew after each evaluation."""
DESCRIPTION_CHARACTERS = 5000
"""What MLflow keeps of a version's description."""
HISTORY_LENGTH = 1000
"""Entries that are read of a model's history, the newest."""
VERSIONS_LOOKED_AT = 200
"""The newest of a model, when the newest of ours, or requests for approval, are looked for."""
RECIPE_FILE = "recipe.yaml"
EXTRA_FILES = ("swift_args.json", RECIPE_FILE, REFERENCE_FILE)
"""What a version holds beside the adapter itself; nothing else is ever logged."""
AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
"""MLflow's error codes when its server cannot be reached or fails; every other one is a refusal for good."""
BATCH = 100
"""Metrics and tags in one request; MLflow takes at most 100 tags."""
RUN_ID = re.compile(r"\b[0-9a-f]{32}\b")
RETRY_SECONDS = 2.0
REGISTER_SECONDS = 600.0
"""How long a trained adapter waits for MLflow to come back."""
FLUSH_SECONDS = 30.0


def label_of(name: str, version: str | None) -> str:
    return f"{name}/{version}" if version else name


@dataclass(frozen=True)
class Version:
    """A registered adapter. `digest` is its identity: MLflow gives a version's number again after a delete.

    `previous` is the number of the champion before it, or 'none'; `canary_percent` its share as a candidate. Both are None until written, and no part of it.
    """

    name: str
    version: str
    digest: str
    base_revision: str
    template_digest: str
    run_id: str
    previous: str | None = field(default=None, compare=False)
    canary_percent: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return label_of(self.name, self.version)


@dataclass(frozen=True)
class Deployment:
    """What is set on a registered model: the numbers under its aliases, whoever registered them, and by tag what is switched off."""

    name: str
    champion: str | None
    candidate: str | None
    switched_off: Mapping[str, Disabled]

    @property
    def name_off(self) -> Disabled | None:
        return self.switched_off.get(DISABLED_TAG)

    def version_off(self, version: str, digest: str) -> Disabled | None:
        return self.switched_off.get(disabled_tag(version, digest))

    def tags_of(self, version: str) -> list[str]:
        """The tags by which that number is switched off, whatever its digest."""
        return sorted(tag for tag in self.switched_off if tag.startswith(f"{DISABLED_TAG}.{version}."))


@dataclass(frozen=True)
class Registered:
    """A version's entry as it stands, ours or not: its name/number, its tag for the adapter's digest, and every run that it names."""

    label: str
    digest: str | None
    run_ids: frozenset[str]


@dataclass(frozen=True)
class Trace:
    """What the registry knows of a run. `deleted`: MLflow can still restore it. The other two are empty for a run that is not ours."""

    deleted: bool
    recipe: str
    input_digest: str


class Registry:
    """The MLflow server at `uri`. Every method raises RegistryError, with what to do, when MLflow cannot do what is asked."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with _translated(uri):
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @contextlib.contextmanager
    def run(self, name: str, params: Mapping[str, object], tags: Mapping[str, str], resume: str | None = None) -> Iterator["TrainingRun"]:
        """A new run in the experiment `tuneserve`, or the run with the id `resume` again; `params` are what went in (the recipe, flat), `tags` the lineage.

        The run ends FINISHED with the block, FAILED if it raises, KILLED if it is interrupted.
        """
        with _translated(self.uri):
            run_tags = _tags(tags)
            if resume:
                run_id, logged_steps = resume, self._reopen(resume, run_tags)
            else:
                run_id, logged_steps = self.client.create_run(self._experiment_id(), run_name=name, tags=run_tags).info.run_id, {}
        training_run = TrainingRun(self, run_id, logged_steps)
        status = "KILLED"
        try:
            with _translated(self.uri):
                self.client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()] if not resume else [])
            yield training_run
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            training_run.finish(status)

    def _reopen(self, run_id: str, tags: Mapping[str, str]) -> dict[str, int]:
        """Sets a run that ended badly to RUNNING, with the lineage of now; returns the last step of each metric that it has."""
        self.client.update_run(run_id, "RUNNING")
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        keys = self.client.get_run(run_id).data.metrics
        return {key: max(point.step for point in self.client.get_metric_history(run_id, key)) for key in keys}

    def close(self, run_id: str) -> None:
        """Ends a run well that its command left open."""
        with _translated(self.uri):
            if run_id and self.client.get_run(run_id).info.status != "FINISHED":
                self.client.set_terminated(run_id, "FINISHED")

    def _experiment_id(self, name: str = EXPERIMENT) -> str:
        if found := self.client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name))
        except MlflowException:  # another process may have made it in between
            if found := self.client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def trained(self, name: str, input_digest: str) -> Version | None:
        """The newest version of `name` that was trained from these inputs, or None."""
        tag = f"tag.`{INPUT_DIGEST_TAG}` = '{input_digest}'"
        with _translated(self.uri):
            found = self.client.search_model_versions(f"name = '{name}' and {tag}", max_results=1, order_by=["version_number DESC"])
        return _version(found[0]) if found else None

    def unfinished(self, name: str, input_digest: str) -> list[str]:
        """Ids of the runs of recipe `name` with these inputs that did not end well, newest first."""
        tags = f"tags.`{INPUT_DIGEST_TAG}` = '{input_digest}' and tags.`{RECIPE_TAG}` = '{name}'"
        with _translated(self.uri):
            found = self.client.search_runs([self._experiment_id()], f"{tags} and attributes.status != 'FINISHED'", order_by=["attributes.start_time DESC"])
        return [run.info.run_id for run in found]

    def register(
        self,
        name: str,
        run_id: str,
        adapter: Adapter,
        extra_files: Mapping[str, str],
        base_revision: str,
        template_digest: str,
        input_digest: str,
        wait_seconds: float = REGISTER_SECONDS,
    ) -> Version:
        """Uploads the adapter's files and `extra_files` (name -> text, names from EXTRA_FILES) and makes them the next version of `name`.

        Tries again for `wait_seconds` while MLflow is away; the RegistryError in the end says where the adapter is kept.
        """
        if foreign := extra_files.keys() - set(EXTRA_FILES):
            raise RegistryError(f"{', '.join(sorted(foreign))} may not be logged with a version; allowed are {', '.join(EXTRA_FILES)}")
        tags = {DIGEST_TAG: adapter.digest, BASE_REVISION_TAG: base_revision, TEMPLATE_DIGEST_TAG: template_digest, INPUT_DIGEST_TAG: input_digest}
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                with _translated(self.uri):
                    made = _version(self._register(name, run_id, adapter, extra_files, tags))
                logger.info("version registered", extra={"model": name, "version": made.version, "digest": made.digest, "run_id": run_id})
                return made
            except RegistryError as error:
                if not _is_away(error) or time.monotonic() > deadline:
                    raise RegistryError(
                        f"{error} The adapter is trained and kept in {adapter.folder}; once MLflow is back, train again: it only registers then."
                    ) from error
                logger.warning("registry away", extra={"run_id": run_id})
                print(f"{str(error).partition(chr(10))[0]} The adapter is trained, trying again to register it", file=sys.stderr)
                time.sleep(RETRY_SECONDS)

    def _register(self, name: str, run_id: str, adapter: Adapter, extra_files: Mapping[str, str], tags: Mapping[str, str]) -> MlflowVersion:
        for file in ADAPTER_FILES:
            self.client.log_artifact(run_id, str(adapter.folder / file), ARTIFACT_FOLDER)
        for file, text in extra_files.items():
            self.client.log_text(run_id, text, f"{ARTIFACT_FOLDER}/{file}")
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        for made in self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):  # by a call whose answer was lost
            if made.tags.get(DIGEST_TAG) == adapter.digest:
                return made
        return self.client.create_model_version(name, f"runs:/{run_id}/{ARTIFACT_FOLDER}", run_id, dict(tags))

    def version(self, name: str, version: str | None = None) -> Version:
        """That version of `name`, or its newest."""
        with _translated(self.uri):
            if version is not None:
                return _version(self.client.get_model_version(name, version))
            found = self.client.search_model_versions(f"name='{name}'", max_results=1, order_by=["version_number DESC"])
        if not found:
            raise RegistryError(f"{name}: no version is registered at {self.uri}; train one first: tuneserve train RECIPE")
        return _version(found[0])

    def recipe(self, version: Version) -> str:
        """The recipe that a version was trained by, as YAML with every default. Raises RegistryError if it has none."""
        try:
            with _translated(self.uri), tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(version.run_id, f"{ARTIFACT_FOLDER}/{RECIPE_FILE}", folder)).read_text("utf-8")
        except (RegistryError, OSError) as error:
            raise RegistryError(f"{version.label} has no {RECIPE_FILE} ({str(error).splitlines()[0]}); name a recipe: --recipe FILE") from error

    def lineage(self, version: Version) -> dict[str, str]:
        """Parameters (the recipe, flat) and tags, ours without their prefix, of the run that made a version."""
        with _translated(self.uri):
            data = self.client.get_run(version.run_id).data
        return {**data.params, **{key.removeprefix(TAG): value for key, value in data.tags.items() if key.startswith(TAG)}}

    def write_card(self, version: Version, text: str) -> None:
        """Logs the version's model card beside its adapter, and shows it, cut where it is long, as the version's description."""
        with _translated(self.uri):
            self.client.log_text(version.run_id, text, CARD_FILE)
            self.client.update_model_version(version.name, version.version, text[:DESCRIPTION_CHARACTERS])

    def log_evaluation(self, version: Version, tags: Mapping[str, str], metrics: Mapping[str, float], files: Mapping[str, str]) -> str:
        """A run of its own with what an evaluation of `version` came to; returns its id. NaN is left out."""
        own = {"evaluated": version.label, "digest": version.digest}
        with _translated(self.uri):
            run_id = str(self.client.create_run(self._experiment_id(), run_name=f"evaluate {version.label}", tags=_tags(own | dict(tags))).info.run_id)
            now_ms = int(time.time() * 1000)
            finite = [Metric(key, value, now_ms, 0) for key, value in metrics.items() if math.isfinite(value)]
            for start in range(0, len(finite), BATCH):
                self.client.log_batch(run_id, metrics=finite[start : start + BATCH])
            for file, text in files.items():
                self.client.log_text(run_id, text, file)
            self.client.set_terminated(run_id, "FINISHED")
        return run_id

    def evaluated(self, version: Version, eval_digest: str) -> tuple[str, Mapping[str, float]] | None:
        """The newest evaluation of `version` on all of these held-out rows: its run's id and metrics. One that looked at it again on another stack does not count; None if there is none."""
        tags = {"evaluated": version.label, "digest": version.digest, EVAL_DIGEST: eval_digest}
        asked = " and ".join(f"tags.`{TAG}{key}` = '{value}'" for key, value in tags.items())
        with _translated(self.uri):
            found = self.client.search_runs([self._experiment_id()], asked, order_by=["attributes.start_time DESC"])
        return next(((run.info.run_id, dict(run.data.metrics)) for run in found if TAG + RECHECK not in run.data.tags), None)

    def entries(self, name: str) -> list[tuple[str, float, Mapping[str, str]]]:
        """The history of `name` (history.py), newest first: each entry's id, its unix time and its fields."""
        with _translated(self.uri):
            found = self.client.search_runs(
                [self._experiment_id(HISTORY)], f"tags.`{TAG}model` = '{name}'", order_by=["attributes.start_time DESC"], max_results=HISTORY_LENGTH
            )
        plain = [(run, {key.removeprefix(TAG): value for key, value in run.data.tags.items() if key.startswith(TAG)}) for run in found]
        return [(run.info.run_id, run.info.start_time / 1000, tags) for run, tags in plain]

    def open_entry(self, name: str, label: str, tags: Mapping[str, str]) -> str:
        """Writes an entry and returns its id."""
        with _translated(self.uri):
            run = self.client.create_run(self._experiment_id(HISTORY), run_name=label, tags=_tags({"model": name, **tags}))
        return str(run.info.run_id)

    def close_entry(self, entry: str, tags: Mapping[str, str]) -> None:
        """Writes these fields over those that it has."""
        with _translated(self.uri):
            self.client.log_batch(entry, tags=[RunTag(key, value) for key, value in _tags(tags).items()])
            self.client.set_terminated(entry, "FINISHED")

    def reference(self, version: Version) -> str | None:
        """The text of the version's parity.json, or None if it has none."""
        with _translated(self.uri):
            sizes = {entry.path.rpartition("/")[2]: entry.file_size or 0 for entry in self.client.list_artifacts(version.run_id, ARTIFACT_FOLDER)}
            if REFERENCE_FILE not in sizes:
                return None
            if sizes[REFERENCE_FILE] > MAX_REFERENCE_BYTES:
                raise RegistryError(f"{version.label}: its {REFERENCE_FILE} has {sizes[REFERENCE_FILE]} bytes and is none of ours; train the version again")
            with tempfile.TemporaryDirectory() as folder:
                found = self.client.download_artifacts(version.run_id, f"{ARTIFACT_FOLDER}/{REFERENCE_FILE}", folder)
                return Path(found).read_text("utf-8")

    def live(self) -> list[tuple[str, str]]:
        """Name and number of every champion, whoever registered it, by name."""
        found: list[tuple[str, str]] = []
        page: str | None = None
        with _translated(self.uri):
            while page != "":
                models = self.client.search_registered_models(max_results=1000, page_token=page)
                found += [(model.name, str(model.aliases[CHAMPION])) for model in models if CHAMPION in model.aliases]
                page = models.token or ""
        return sorted(found)

    def champion(self, name: str) -> Version | None:
        """The version under the alias `champion`, or None."""
        number = self.champion_number(name)
        return self.version(name, number) if number else None

    def champion_number(self, name: str) -> str | None:
        """The number of the version under the alias `champion`, whoever registered it, or None."""
        try:
            with _translated(self.uri):
                return str(self.client.get_model_version_by_alias(name, CHAMPION).version)
        except RegistryError as error:
            cause = error.__cause__
            # MLflow calls a missing alias an invalid parameter
            if isinstance(cause, MlflowException) and (cause.error_code == "RESOURCE_DOES_NOT_EXIST" or "Registered model alias" in str(cause.message)):
                return None
            raise

    def move_champion(self, name: str, version: str | None) -> None:
        """Points the alias at that version number; None takes the alias away."""
        self._move(name, CHAMPION, version)

    def put_on_trial(self, name: str, version: str | None) -> None:
        """The same for the alias of the version that is being evaluated."""
        self._move(name, TRIAL, version)

    def move_candidate(self, name: str, version: str | None) -> None:
        """The same for the canary's alias."""
        self._move(name, CANDIDATE, version)

    def _move(self, name: str, alias: str, version: str | None) -> None:
        with _translated(self.uri):
            if version is None:
                self.client.delete_registered_model_alias(name, alias)
            else:
                self.client.set_registered_model_alias(name, alias, version)

    def deployment(self, name: str) -> Deployment:
        """What is set on `name`, in one call."""
        with _translated(self.uri):
            found = self.client.get_registered_model(name)
        switched_off = {tag: read_disabled(value) for tag, value in found.tags.items() if tag == DISABLED_TAG or tag.startswith(DISABLED_TAG + ".")}
        pointed = {alias: str(number) for alias, number in found.aliases.items()}
        return Deployment(name, pointed.get(CHAMPION), pointed.get(CANDIDATE), switched_off)

    def write_share(self, name: str, version: str, percent: str | None) -> None:
        """Writes a candidate's share on its version, or takes it away."""
        with _translated(self.uri):
            if percent is None:
                self.client.delete_model_version_tag(name, version, CANARY_TAG)
            else:
                self.client.set_model_version_tag(name, version, CANARY_TAG, percent)

    def switch_off(self, name: str, tag: str, record: Disabled) -> None:
        """Writes the kill switch's record on the registered model."""
        with _translated(self.uri):
            self.client.set_registered_model_tag(name, tag, record.as_json())

    def switch_on(self, name: str, tags: Iterable[str]) -> None:
        """Takes these records away."""
        with _translated(self.uri):
            for tag in tags:
                self.client.delete_registered_model_tag(name, tag)

    def record_previous(self, version: Version, previous: str | None) -> None:
        """Writes on a version which one was champion before it: MLflow keeps no history of aliases."""
        with _translated(self.uri):
            self.client.set_model_version_tag(version.name, version.version, PREVIOUS_TAG, previous or "none")

    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Writes these tags on a version, in this order."""
        with _translated(self.uri):
            for tag, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, tag, value)

    def tags(self, version: Version) -> dict[str, str]:
        """The version's tags as they stand now."""
        with _translated(self.uri):
            return dict(self.client.get_model_version(version.name, version.version).tags)

    def requests(self, name: str) -> list[tuple[Version, dict[str, str]]]:
        """Every version of `name` that has asked for approval at some time, with its tags, the oldest first."""
        with _translated(self.uri):
            found = self.client.search_model_versions(f"name = '{name}'", max_results=VERSIONS_LOOKED_AT, order_by=["version_number DESC"])
        return [(_version(entry), dict(entry.tags)) for entry in reversed(found) if APPROVAL_TAG in entry.tags and DIGEST_TAG in entry.tags]

    def newest(self, name: str) -> Version | None:
        """The newest version of `name` that is ours; None if there is none yet."""
        with _translated(self.uri):
            found = self.client.search_model_versions(f"name = '{name}'", max_results=VERSIONS_LOOKED_AT, order_by=["version_number DESC"])
        return next((_version(entry) for entry in found if DIGEST_TAG in entry.tags), None)

    def registered(self) -> list[Registered]:
        """Every version of every model, whoever registered it."""
        found: list[Registered] = []
        page: str | None = None
        with _translated(self.uri):
            while page != "":
                versions = self.client.search_model_versions(max_results=1000, page_token=page)
                for entry in versions:
                    runs = {entry.run_id or "", *RUN_ID.findall(entry.source or "")} - {""}
                    found.append(Registered(f"{entry.name}/{entry.version}", entry.tags.get(DIGEST_TAG), frozenset(runs)))
                page = versions.token or ""
        return found

    def trace(self, run_id: str) -> Trace | None:
        """What is known of the run, a deleted one too; None if there is none."""
        try:
            with _translated(self.uri):
                run = self.client.get_run(run_id)
        except RegistryError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and cause.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return None
            raise
        tags = run.data.tags
        return Trace(str(run.info.lifecycle_stage) == LifecycleStage.DELETED, tags.get(RECIPE_TAG, ""), tags.get(INPUT_DIGEST_TAG, ""))

    def holds_adapter(self, run_id: str) -> bool:
        """Whether the run's artifacts hold an adapter, every file of it."""
        with _translated(self.uri):
            names = {entry.path.rpartition("/")[2] for entry in self.client.list_artifacts(run_id, ARTIFACT_FOLDER) if entry.file_size}
        return names >= set(ADAPTER_FILES)


class TrainingRun:
    """An MLflow run that is being written. Metrics and tags go out on a thread of their own: MLflow may be slow or away without hurting training.

    `logged_steps` is the last step of each metric that is there already: a step's value is sent once, though a resumed training makes it again.
    """

    def __init__(self, registry: Registry, run_id: str, logged_steps: Mapping[str, int] | None = None) -> None:
        self.registry, self.run_id, self._logged_steps = registry, run_id, dict(logged_steps or {})
        self._queue: queue.SimpleQueue[Metric | RunTag | None] = queue.SimpleQueue()
        self._unsent: list[Metric | RunTag] = []
        self._thread = threading.Thread(target=self._send, name="mlflow metrics", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queues the values; returns at once and never fails."""
        now_ms = int(time.time() * 1000)
        for key, value in values.items():
            if step <= self._logged_steps.get(key, -1):
                continue
            self._logged_steps[key] = step
            self._queue.put(Metric(key, value, now_ms, step))

    def tag(self, values: Mapping[str, str]) -> None:
        """Queues lineage that is known only now; as `log_metrics`."""
        for key, value in values.items():
            self._queue.put(RunTag(TAG + key, value))

    def _send(self) -> None:
        open_ = True
        while open_ or self._unsent:
            while open_ and (not self._unsent or not self._queue.empty()):
                item = self._queue.get()
                open_ = item is not None
                self._unsent += [item] if item else []
            batch = self._unsent[:BATCH]
            metrics, tags = [entry for entry in batch if isinstance(entry, Metric)], [entry for entry in batch if isinstance(entry, RunTag)]
            try:
                if batch:
                    self.registry.client.log_batch(self.run_id, metrics=metrics, tags=tags)
            except MlflowException as error:  # its own client has retried before
                if error.error_code in AWAY:
                    print(f"MLflow at {self.registry.uri} is away; training goes on, its metrics wait", file=sys.stderr)
                    time.sleep(RETRY_SECONDS)
                    continue
                print(f"MLflow refuses {len(batch)} metrics: {error.message}", file=sys.stderr)
            del self._unsent[: len(batch)]

    def finish(self, status: str) -> None:
        """Sends what is queued, waiting FLUSH_SECONDS at most, and closes the run; says what MLflow did not take."""
        self._queue.put(None)
        self._thread.join(FLUSH_SECONDS)
        if left := len(self._unsent):
            print(f"MLflow at {self.registry.uri} did not take {left} metrics of run {self.run_id}", file=sys.stderr)
        try:
            self.registry.client.set_terminated(self.run_id, status)
        except MlflowException as error:
            print(f"MLflow at {self.registry.uri} could not close run {self.run_id} as {status}: {error.message}", file=sys.stderr)


def _is_away(error: RegistryError) -> bool:
    cause = error.__cause__
    return isinstance(cause, MlflowException) and cause.error_code in AWAY


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turns MLflow's errors into RegistryError with a remedy."""
    try:
        yield
    except SQLAlchemyError as error:
        raise RegistryError(f"MLflow's database {uri} cannot be read ({str(error).splitlines()[0]}); restore it from a backup, or move it away") from error
    except MlflowException as error:
        remedy = "look there for what is registered" if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST) else "is it up?"
        raise RegistryError(f"MLflow at {uri}: {error.message}; {remedy}") from error


def _tags(values: Mapping[str, str]) -> dict[str, str]:
    return {TAG + key: value for key, value in values.items()}


def _version(found: MlflowVersion) -> Version:
    def tag(name: str) -> str:
        value = found.tags.get(name)
        if not value:
            raise RegistryError(f"{found.name}/{found.version} has no tag {name}: it was not registered by tuneserve; register it with `tuneserve train`")
        return str(value)

    identity = (found.name, str(found.version), tag(DIGEST_TAG), tag(BASE_REVISION_TAG), tag(TEMPLATE_DIGEST_TAG), found.run_id or "")
    return Version(*identity, found.tags.get(PREVIOUS_TAG), found.tags.get(CANARY_TAG))


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI. Raises RegistryError if it is not set: commands set it to the embedded server's where the user has none."""
    try:
        return os.environ["MLFLOW_TRACKING_URI"]
    except KeyError:
        raise RegistryError("MLFLOW_TRACKING_URI is not set; set it to your MLflow server, or start the embedded one: tuneserve up") from None


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested recipe values as MLflow params: {'lora.rank': 16, ...}."""
    result: dict[str, object] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result
