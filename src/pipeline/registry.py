"""The MLflow boundary: one run per training with its lineage, one model version per adapter, and the alias that is the deployment."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.adapter import ADAPTER_FILES, Adapter
from pipeline.errors import RegistryError
from pipeline.version import ARTIFACT_FOLDER, BASE_REVISION_TAG, CHAMPION, DIGEST_TAG, PREVIOUS_TAG, TAG, TEMPLATE_DIGEST_TAG

EXPERIMENT = "tuneserve"
EXTRA_FILES = ("swift_args.json", "recipe.yaml")
"""What a version holds beside the adapter itself; nothing else is ever logged."""
RETRY_SECONDS = 2.0
FLUSH_SECONDS = 30.0


@dataclass(frozen=True)
class Version:
    """A registered adapter. `digest` is its identity: MLflow gives a version's number again after a delete."""

    name: str
    version: str
    digest: str
    base_revision: str
    template_digest: str
    run_id: str

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"


class Registry:
    """The MLflow server at `uri`. Every method raises RegistryError, with what to do, when MLflow cannot do what is asked."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @contextlib.contextmanager
    def run(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> Iterator["TrainingRun"]:
        """A new run in the experiment `tuneserve`; `params` are what went in (the recipe, flat), `tags` the lineage.

        The run ends FINISHED with the block, FAILED if it raises, KILLED if it is interrupted.
        """
        with _translated(self.uri):
            experiment_id = self._experiment_id()
            run = self.client.create_run(experiment_id, run_name=name, tags={TAG + key: value for key, value in tags.items()})
            self.client.log_batch(run.info.run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
        training_run = TrainingRun(self, run.info.run_id, experiment_id)
        status = "KILLED"
        try:
            yield training_run
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            training_run.finish(status)

    def _experiment_id(self) -> str:
        if found := self.client.get_experiment_by_name(EXPERIMENT):
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(EXPERIMENT))
        except MlflowException:  # another process may have made it in between
            if found := self.client.get_experiment_by_name(EXPERIMENT):
                return str(found.experiment_id)
            raise

    def register(self, name: str, run_id: str, adapter: Adapter, extra_files: Mapping[str, str], base_revision: str, template_digest: str) -> Version:
        """Uploads the adapter's files and `extra_files` (name -> text, names from EXTRA_FILES) and makes them the next version of `name`.

        If MLflow is away longer than its client retries, the RegistryError says where the adapter is kept.
        """
        if foreign := extra_files.keys() - set(EXTRA_FILES):
            raise RegistryError(f"{', '.join(sorted(foreign))} may not be logged with a version; allowed are {', '.join(EXTRA_FILES)}")
        try:
            return self._register(name, run_id, adapter, extra_files, base_revision, template_digest)
        except RegistryError as error:
            raise RegistryError(f"{error} The adapter is trained and kept in {adapter.folder}.") from error

    def _register(self, name: str, run_id: str, adapter: Adapter, extra_files: Mapping[str, str], base_revision: str, template_digest: str) -> Version:
        with _translated(self.uri):
            for file in ADAPTER_FILES:
                self.client.log_artifact(run_id, str(adapter.folder / file), ARTIFACT_FOLDER)
            for file, text in extra_files.items():
                self.client.log_text(run_id, text, f"{ARTIFACT_FOLDER}/{file}")
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
            tags = {DIGEST_TAG: adapter.digest, BASE_REVISION_TAG: base_revision, TEMPLATE_DIGEST_TAG: template_digest}
            created = self.client.create_model_version(name, f"runs:/{run_id}/{ARTIFACT_FOLDER}", run_id, tags)
        return _version(created)

    def version(self, name: str, version: str | None = None) -> Version:
        """That version of `name`, or its newest."""
        with _translated(self.uri):
            if version is not None:
                return _version(self.client.get_model_version(name, version))
            found = self.client.search_model_versions(f"name='{name}'", max_results=1, order_by=["version_number DESC"])
        if not found:
            raise RegistryError(f"{name}: no version is registered at {self.uri}; train one first: tuneserve train RECIPE")
        return _version(found[0])

    def champion(self, name: str) -> Version | None:
        """The version under the alias `champion`, or None."""
        try:
            with _translated(self.uri):
                return _version(self.client.get_model_version_by_alias(name, CHAMPION))
        except RegistryError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and cause.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def set_champion(self, version: Version, previous: Version | None) -> None:
        """Moves the alias, and writes on the version what was champion before (MLflow keeps no history of aliases)."""
        with _translated(self.uri):
            self.client.set_model_version_tag(version.name, version.version, PREVIOUS_TAG, previous.version if previous else "none")
            self.client.set_registered_model_alias(version.name, CHAMPION, version.version)

    def unset_champion(self, name: str) -> None:
        with _translated(self.uri):
            self.client.delete_registered_model_alias(name, CHAMPION)


class TrainingRun:
    """An MLflow run that is being written. Metrics go out on a thread of their own: MLflow may be slow or away without hurting training."""

    def __init__(self, registry: Registry, run_id: str, experiment_id: str) -> None:
        self.registry, self.run_id, self.experiment_id = registry, run_id, experiment_id
        self._queue: queue.SimpleQueue[list[Metric] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="mlflow metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self.registry.uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queues the values; returns at once and never fails."""
        now_ms = int(time.time() * 1000)
        self._queue.put([Metric(key, value, now_ms, step) for key, value in values.items()])

    def _send(self) -> None:
        pending: list[Metric] = []
        open_ = True
        while open_ or pending:
            while open_ and (not pending or not self._queue.empty()):
                item = self._queue.get()
                open_ = item is not None
                pending += item or []
            if not pending:
                continue
            try:
                self.registry.client.log_batch(self.run_id, metrics=pending[:1000])
                del pending[:1000]
            except Exception as error:  # whatever is wrong with MLflow, training goes on; MLflow's own client has retried before
                print(f"MLflow takes no metrics ({type(error).__name__}); trying again", file=sys.stderr)
                time.sleep(RETRY_SECONDS)

    def tag(self, values: Mapping[str, str]) -> None:
        """Adds lineage that is known only now."""
        with _translated(self.registry.uri):
            self.registry.client.log_batch(self.run_id, tags=[RunTag(TAG + key, value) for key, value in values.items()])

    def finish(self, status: str) -> None:
        """Sends what is queued, waiting FLUSH_SECONDS at most, and closes the run; if MLflow is away, says so and leaves the run open."""
        self._queue.put(None)
        self._thread.join(FLUSH_SECONDS)
        try:
            self.registry.client.set_terminated(self.run_id, status)
        except MlflowException as error:
            print(f"MLflow at {self.registry.uri} could not close run {self.run_id} as {status}: {error.message}", file=sys.stderr)


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turns MLflow's errors into RegistryError with a remedy."""
    try:
        yield
    except MlflowException as error:
        remedy = "look there for what is registered" if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST) else "is it up?"
        raise RegistryError(f"MLflow at {uri}: {error.message}; {remedy}") from error


def _version(found: MlflowVersion) -> Version:
    def tag(name: str) -> str:
        value = found.tags.get(name)
        if not value:
            raise RegistryError(f"{found.name}/{found.version} has no tag {name}: it was not registered by tuneserve; register it with `tuneserve train`")
        return str(value)

    return Version(found.name, str(found.version), tag(DIGEST_TAG), tag(BASE_REVISION_TAG), tag(TEMPLATE_DIGEST_TAG), found.run_id or "")


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
