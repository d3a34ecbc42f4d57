"""The registry against MLflow's real store (SQLite in a file, no server), and metrics while MLflow is away."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from pipeline import disk
from pipeline.adapter import read_adapter
from pipeline.approval import Approval, Request, read_approval
from pipeline.errors import RegistryError
from pipeline.history import history
from pipeline.project import Project
from pipeline.registry import EVAL_DIGEST, RECHECK, Deployment, Registry, Trace, TrainingRun, Version, flat
from pipeline.switch import Disabled
from pipeline.version import APPROVAL_ANSWER_TAG, APPROVAL_REQUEST_TAG, APPROVAL_TAG, ARTIFACT_FOLDER, DISABLED_TAG, TRIAL, disabled_tag
from tests.conftest import write_adapter

EXTRA = {"recipe.yaml": "name: shop\n", "swift_args.json": "{}"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_store, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Registry(f"sqlite:///{folder}/mlflow.db")


def register(registry: Registry, folder: Path, name: str) -> Version:
    with registry.run(name, {"lora.rank": 8}, {"dataset_digest": "d", "recipe": name, "input_digest": "i"}) as run:
        run.log_metrics(1, {"loss": 2.0})
        run.log_metrics(2, {"loss": 1.0})
        run.tag({"train_seconds": "1.0"})
        return registry.register(name, run.run_id, read_adapter(write_adapter(folder)), EXTRA, "base", "template", "i")


def test_a_run_becomes_a_version_with_its_lineage_and_only_allowed_files(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "shop")
    assert (version.label, version.base_revision, version.template_digest) == ("shop/1", "base", "template")
    assert version.digest == read_adapter(tmp_path / "a").digest
    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lora.rank": "8"}
    assert {"tuneserve.dataset_digest", "tuneserve.train_seconds"} <= set(run.data.tags)
    assert [point.value for point in registry.client.get_metric_history(version.run_id, "loss")] == [2.0, 1.0]
    names = {Path(entry.path).name for entry in registry.client.list_artifacts(version.run_id, ARTIFACT_FOLDER)}
    assert names == {"adapter_config.json", "adapter_model.safetensors", *EXTRA}
    with pytest.raises(RegistryError, match=r"optimizer\.pt may not be logged"):
        registry.register("shop", version.run_id, read_adapter(tmp_path / "a"), {"optimizer.pt": ""}, "base", "template", "i")


def test_a_reference_lies_beside_the_adapter_and_is_no_part_of_it(registry: Registry, tmp_path: Path) -> None:
    without = register(registry, tmp_path / "a", "faithful")
    with registry.run("faithful", {}, {}) as run:
        adapter = read_adapter(tmp_path / "a")
        version = registry.register("faithful", run.run_id, adapter, EXTRA | {"parity.json": '{"a": "\u00e9"}'}, "base", "template", "i")
    assert registry.reference(version) == '{"a": "\u00e9"}' and registry.reference(without) is None
    assert version.digest == without.digest == adapter.digest


def test_the_alias_moves_and_its_past_is_written_down(registry: Registry, tmp_path: Path) -> None:
    first, second = register(registry, tmp_path / "a", "toys"), register(registry, tmp_path / "b", "toys")
    assert registry.champion("toys") is None and registry.champion_number("toys") is None
    registry.move_champion("toys", first.version)
    registry.move_champion("toys", second.version)
    registry.record_previous(second, first.version)
    assert registry.champion("toys") == second and registry.champion_number("toys") == "2"
    assert registry.client.get_model_version("toys", "2").tags["tuneserve.previous_champion"] == "1"
    assert registry.version("toys") == second
    assert registry.version("toys", "1") == first
    registry.move_champion("toys", None)
    assert registry.champion("toys") is None


def test_a_canary_is_an_alias_and_a_share_on_its_version(registry: Registry, tmp_path: Path) -> None:
    first, second = register(registry, tmp_path / "a", "bags"), register(registry, tmp_path / "b", "bags")
    assert registry.deployment("bags") == Deployment("bags", None, None, {})
    registry.move_champion("bags", first.version)
    registry.write_share("bags", second.version, "2.5")
    registry.move_candidate("bags", second.version)
    assert registry.deployment("bags") == Deployment("bags", "1", "2", {})
    assert registry.version("bags", "2").canary_percent == "2.5" and registry.version("bags", "2") == second
    assert registry.client.get_model_version("bags", "2").tags["tuneserve.canary_percent"] == "2.5"
    for _ in range(2):  # what is gone already may be taken away again
        registry.move_candidate("bags", None)
        registry.write_share("bags", second.version, None)
    assert registry.deployment("bags").candidate is None and registry.version("bags", "2").canary_percent is None
    registry.record_previous(first, None)
    registry.record_previous(second, "1")
    assert [registry.version("bags", number).previous for number in ("1", "2")] == ["none", "1"]


def test_a_trial_is_an_alias_that_goes_again(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "trial")
    registry.put_on_trial("trial", version.version)
    assert registry.client.get_registered_model("trial").aliases == {TRIAL: int(version.version)}
    assert registry.deployment("trial") == Deployment("trial", None, None, {})
    registry.put_on_trial("trial", None)
    registry.put_on_trial("trial", None)  # a trial that failed before it began takes it away too
    assert registry.client.get_registered_model("trial").aliases == {}


def test_an_evaluation_is_a_run_of_its_own(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "scored")
    assert registry.recipe(version) == EXTRA["recipe.yaml"]
    metrics = {"score": 0.5, "score.images=1": math.nan, **{f"part.{number}": 1.0 for number in range(250)}}
    run_id = registry.log_evaluation(version, {"decision": "keep"}, metrics, {"answers.jsonl": "{}\n"})
    run = registry.client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "evaluate scored/1")
    assert run.data.tags["tuneserve.evaluated"] == "scored/1" and run.data.tags["tuneserve.decision"] == "keep"
    assert run.data.metrics["score"] == 0.5 and len(run.data.metrics) == 251
    assert [entry.path for entry in registry.client.list_artifacts(run_id)] == ["answers.jsonl"]
    assert registry.unfinished("scored", "i") == [] and registry.trained("scored", "i") == version


def test_what_a_version_came_to_on_these_rows_is_found_again(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "recorded")
    assert registry.evaluated(version, "e") is None
    first = registry.log_evaluation(version, {EVAL_DIGEST: "e"}, {"score": 0.9, "score.json": 1.0}, {})
    registry.log_evaluation(version, {EVAL_DIGEST: "e", RECHECK: "true"}, {"score": 0.1}, {})
    registry.log_evaluation(version, {EVAL_DIGEST: "others"}, {"score": 0.2}, {})
    registry.log_evaluation(version, {}, {"score": 0.3}, {})  # of some of the rows
    registry.log_evaluation(replace(version, digest="recreated"), {EVAL_DIGEST: "e"}, {"score": 0.4}, {})
    assert registry.evaluated(version, "e") == (first, {"score": 0.9, "score.json": 1.0})
    time.sleep(0.01)  # MLflow orders runs by the millisecond
    newest = registry.log_evaluation(version, {EVAL_DIGEST: "e"}, {"score": 0.8}, {})
    assert registry.evaluated(version, "e") == (newest, {"score": 0.8})


def test_every_champion_is_found_whoever_registered_it(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "live")
    registry.client.create_registered_model("by-hand")
    registry.client.create_model_version("by-hand", "s3://elsewhere")
    assert not {"live", "by-hand"} & dict(registry.live()).keys()
    registry.move_champion("live", version.version)
    registry.move_champion("by-hand", "1")
    registry.put_on_trial("live", version.version)
    assert {("live", version.version), ("by-hand", "1")} <= set(registry.live()) and registry.live() == sorted(registry.live())
    registry.client.delete_registered_model("by-hand")


def test_a_card_stands_beside_the_adapter_and_as_the_description(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "carded")
    assert registry.lineage(version)["lora.rank"] == "8" and registry.lineage(version)["dataset_digest"] == "d"
    registry.write_card(version, "# old")
    registry.write_card(version, "# card\n" + "x" * 9000)
    assert registry.client.get_model_version("carded", "1").description == ("# card\n" + "x" * 9000)[:5000]
    assert {entry.path for entry in registry.client.list_artifacts(version.run_id)} == {"adapter", "card.md"}


def test_history_is_kept_newest_first(registry: Registry) -> None:
    first = registry.open_entry("told", "promoted told/1", {"action": "promoted", "version": "1", "before": "none", "after": "none", "state": "open"})
    second = registry.open_entry("told", "kept told/2", {"action": "kept", "version": "2", "before": "1", "after": "1"})
    registry.open_entry("others", "promoted others/1", {"action": "promoted"})
    assert [entry.open for entry in history(registry, "told")] == [False, True]
    registry.close_entry(first, {"state": "closed", "after": "1", "reasons": "x" * 4000})
    found = history(registry, "told")
    assert [(entry.id, entry.action, entry.before, entry.after, entry.open) for entry in found] == [
        (second, "kept", "1", "1", False),
        (first, "promoted", None, "1", False),
    ]
    assert found[1].grounds.reasons == "x" * 4000 and found[0].at >= found[1].at > 1e9
    assert history(registry, "never") == []


def test_a_version_without_a_recipe_says_what_to_do(registry: Registry, tmp_path: Path) -> None:
    with registry.run("bare", {}, {}) as run:
        version = registry.register("bare", run.run_id, read_adapter(write_adapter(tmp_path / "a")), {}, "base", "template", "i")
    with pytest.raises(RegistryError, match="bare/1 has no recipe.yaml .*--recipe FILE"):
        registry.recipe(version)


def test_what_is_switched_off_is_on_record(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "coats")
    record, tag = Disabled('wrong prices: "€"', "me@here", "2026-01-01T00:00:00+00:00"), disabled_tag("1", version.digest)
    registry.switch_off("coats", DISABLED_TAG, record)
    registry.switch_off("coats", tag, record)
    registry.client.set_registered_model_tag("coats", f"{DISABLED_TAG}.12.abcdef01", "by hand")
    registry.client.set_registered_model_tag("coats", "tuneserve.disabled_by", "another tag")
    found = registry.deployment("coats")
    assert found.name_off == found.version_off("1", version.digest) == record and found.version_off("1", "f" * 64) is None
    assert found.switched_off[f"{DISABLED_TAG}.12.abcdef01"] == Disabled() and len(found.switched_off) == 3
    assert found.tags_of("1") == [tag]
    for _ in range(2):
        registry.switch_on("coats", [DISABLED_TAG, tag])
    assert registry.deployment("coats").tags_of("1") == [] and registry.deployment("coats").name_off is None


def test_a_model_that_is_not_registered_is_said(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="nothing.* not found; look there for what is registered"):
        registry.deployment("nothing")


def test_a_version_is_found_by_its_inputs(registry: Registry, tmp_path: Path) -> None:
    assert registry.trained("shoes", "i") is None
    register(registry, tmp_path / "a", "shoes")
    second = register(registry, tmp_path / "b", "shoes")
    assert registry.trained("shoes", "i") == second
    assert registry.trained("shoes", "other") is None
    assert registry.trained("other", "i") is None


def test_a_run_that_ended_badly_is_found_and_goes_on_as_the_same_run(registry: Registry) -> None:
    tags = {"recipe": "hats", "input_digest": "i"}
    assert registry.unfinished("hats", "i") == []
    with pytest.raises(KeyboardInterrupt), registry.run("hats", {"a": 1}, tags) as run:
        for step in (1, 5):
            run.log_metrics(step, {"loss": float(step)})
        raise KeyboardInterrupt
    assert registry.unfinished("hats", "i") == [run.run_id]
    assert registry.unfinished("hats", "other") == registry.unfinished("other", "i") == []
    with registry.run("hats", {"a": 1}, tags | {"git_commit": "new"}, resume=run.run_id) as again:
        for step in (1, 5, 10):
            again.log_metrics(step, {"loss": 100.0 + step})
    assert again.run_id == run.run_id
    history = registry.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (5, 5.0), (10, 110.0)]
    found = registry.client.get_run(run.run_id)
    assert (found.info.status, found.data.tags["tuneserve.git_commit"]) == ("FINISHED", "new")
    assert registry.unfinished("hats", "i") == []


def test_each_metric_goes_on_from_its_own_last_step(registry: Registry) -> None:
    with pytest.raises(KeyboardInterrupt), registry.run("caps", {}, {}) as run:
        run.log_metrics(5, {"loss": 1.0})
        raise KeyboardInterrupt  # before the evaluation of step 5 was logged
    with registry.run("caps", {}, {}, resume=run.run_id) as again:
        again.log_metrics(5, {"loss": 1.0})
        for _ in range(2):  # an old line of the log, then the resumed training's own
            again.log_metrics(5, {"eval_loss": 2.0})
    assert [[point.value for point in registry.client.get_metric_history(run.run_id, key)] for key in ("loss", "eval_loss")] == [[1.0], [2.0]]


def test_a_run_that_was_left_open_is_closed(registry: Registry) -> None:
    run_id = registry.client.create_run(registry._experiment_id()).info.run_id
    for _ in range(2):
        registry.close(run_id)
        assert registry.client.get_run(run_id).info.status == "FINISHED"


def test_a_version_whose_answer_was_lost_is_not_made_twice(registry: Registry, tmp_path: Path) -> None:
    with registry.run("gloves", {}, {}) as run:
        first, second = (registry.register("gloves", run.run_id, read_adapter(write_adapter(tmp_path / "a")), EXTRA, "base", "template", "i") for _ in range(2))
    assert first == second and first.version == "1"


def test_a_damaged_database_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match="cannot be read"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db").trained("shop", "i")


def test_what_is_not_registered_is_said(registry: Registry) -> None:
    assert registry.champion("nothing") is None
    with pytest.raises(RegistryError, match="tuneserve train"):
        registry.version("nothing")
    with pytest.raises(RegistryError, match="nothing"):
        registry.version("nothing", "3")


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_ends_badly_says_how(registry: Registry, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), registry.run("shop", {}, {}) as run:
        raise error
    assert registry.client.get_run(run.run_id).info.status == status


def test_a_version_that_tuneserve_did_not_register_is_refused_but_can_be_left(registry: Registry) -> None:
    registry.client.create_registered_model("foreign")
    registry.client.create_model_version("foreign", "runs:/x/adapter")
    with pytest.raises(RegistryError, match="tuneserve train"):
        registry.version("foreign", "1")
    registry.move_champion("foreign", "1")
    assert registry.champion_number("foreign") == "1"


def test_what_disk_asks_of_it(registry: Registry, tmp_path: Path) -> None:
    version = register(registry, tmp_path / "a", "kept")
    registry.client.create_registered_model("linked")
    registry.client.create_model_version("linked", f"mlflow-artifacts:/1/{'c' * 32}/artifacts/adapter")
    with registry.run("kept", {}, {"recipe": "kept", "input_digest": "i"}) as bare:
        pass
    by_label = {found.label: found for found in registry.registered()}
    assert by_label["kept/1"].digest == version.digest and by_label["kept/1"].run_ids == {version.run_id}
    assert by_label["linked/1"].digest is None and by_label["linked/1"].run_ids == {"c" * 32}
    assert registry.holds_adapter(version.run_id) and not registry.holds_adapter(bare.run_id)
    assert registry.trace(bare.run_id) == Trace(False, "kept", "i") and registry.trace("d" * 32) is None
    registry.client.delete_run(bare.run_id)
    assert registry.trace(bare.run_id) == Trace(True, "kept", "i")
    registry.client.restore_run(bare.run_id)
    assert registry.trace(bare.run_id) == Trace(False, "kept", "i")
    registry.client.delete_model_version("kept", "1")
    assert "kept/1" not in {found.label for found in registry.registered()}


def test_an_empty_database_in_the_place_of_a_lost_one_clears_no_adapter(
    registry: Registry, project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(registry, project.runs / "x", "lost")
    shutil.copy(empty_store, project.root)
    folders = [project.runs / version.run_id, project.mlruns / "artifacts" / "1" / version.run_id]
    for folder in folders:
        write_adapter(folder / "adapter")
    monkeypatch.chdir(project.root)
    limits = disk.Limits(0, unregistered=True)
    for asked, going in ((Registry(f"sqlite:///{project.root}/mlflow.db"), set()), (registry, {folders[0]})):
        known = disk.know(asked, disk.run_ids(project))
        entries = disk.survey(project, known, unknown="", artifacts_ours=True, limits=limits)
        assert {entry.path for entry in entries if entry.removable} == going


def test_what_is_registered_is_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("http://127.0.0.1:9")
    pages = {None: (["1", "2"], "more"), "more": (["3"], "")}

    class Page(list[SimpleNamespace]):
        token = ""

    def search(max_results: int, page_token: str | None) -> Page:
        numbers, token = pages[page_token]
        page = Page(SimpleNamespace(name="shop", version=number, tags={}, run_id="", source="") for number in numbers)
        page.token = token
        return page

    monkeypatch.setattr(registry.client, "search_model_versions", search)
    assert [found.label for found in registry.registered()] == ["shop/1", "shop/2", "shop/3"]


class Flaky:
    """An MLflow client whose every first call fails with `error`; what gets through is in `sent`."""

    def __init__(self, error: MlflowException) -> None:
        self.error: MlflowException | None = error
        self.sent: list[str] = []

    def _call(self, what: str) -> None:
        if error := self.error:
            self.error = None
            raise error
        self.sent.append(what)

    def log_batch(self, run_id: str, metrics: list[Metric], tags: list[RunTag]) -> None:
        self._call(f"{len(metrics)} metrics, {len(tags)} tags")

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self._call(Path(path).name)

    def log_text(self, run_id: str, text: str, path: str) -> None: ...

    def create_registered_model(self, name: str) -> None: ...

    def search_model_versions(self, filter_string: str) -> list[SimpleNamespace]:
        return []

    def create_model_version(self, name: str, source: str, run_id: str, tags: dict[str, str]) -> SimpleNamespace:
        return SimpleNamespace(name=name, version=1, tags=tags, run_id=run_id)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.sent.append(status)


def flaky_registry(monkeypatch: pytest.MonkeyPatch, error: MlflowException) -> tuple[Registry, Flaky]:
    monkeypatch.setattr("pipeline.registry.RETRY_SECONDS", 0.01)
    registry = Registry("http://127.0.0.1:9")
    client = Flaky(error)
    registry.client = client  # type: ignore[assignment]
    return registry, client


def test_metrics_and_tags_wait_for_mlflow_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, client = flaky_registry(monkeypatch, MlflowException("connection refused"))
    run = TrainingRun(registry, "run")
    for step in range(150):
        run.log_metrics(step, {"loss": 1.0})
    run.tag({"train_seconds": "1"})
    run.finish("FINISHED")
    counts = [sum(int(part.split()[0]) for part in sent.split(", ")) for sent in client.sent[:-1]]
    assert sum(counts) == 151 and client.sent[-1] == "FINISHED"


def test_metrics_that_mlflow_refuses_do_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    registry, client = flaky_registry(monkeypatch, MlflowException("bad name", INVALID_PARAMETER_VALUE))
    run = TrainingRun(registry, "run")
    for step in range(150):
        run.log_metrics(step, {"loss": 1.0})
    run.finish("FINISHED")
    assert len(client.sent) >= 2 and "MLflow refuses" in capsys.readouterr().err


def test_registration_waits_for_mlflow_and_then_says_where_the_adapter_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a"))
    registry, client = flaky_registry(monkeypatch, MlflowException("connection refused"))
    assert registry.register("shop", "run", adapter, EXTRA, "base", "template", "i").label == "shop/1"
    assert "adapter_model.safetensors" in client.sent
    registry, _ = flaky_registry(monkeypatch, MlflowException("connection refused"))
    with pytest.raises(RegistryError, match=f"connection refused.*kept in {tmp_path / 'a'}"):
        registry.register("shop", "run", adapter, EXTRA, "base", "template", "i", wait_seconds=-1)


def test_params_are_flat() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


def test_a_request_for_approval_is_tags_that_are_found_again(registry: Registry, tmp_path: Path) -> None:
    assert registry.newest("asking") is None and registry.requests("asking") == []
    first, second = register(registry, tmp_path / "a", "asking"), register(registry, tmp_path / "b", "asking")
    request = Request("me@here", 1.0, 2.0, None, "g", "better")
    for version in (second, first):
        registry.tag_version(version, {APPROVAL_TAG: "requested", APPROVAL_REQUEST_TAG: json.dumps(asdict(request)), APPROVAL_ANSWER_TAG: "none"})
    assert [(version.label, read_approval(tags)) for version, tags in registry.requests("asking")] == [
        ("asking/1", Approval("requested", request)),
        ("asking/2", Approval("requested", request)),
    ]
    registry.tag_version(second, {APPROVAL_TAG: "approved"})
    assert registry.tags(second)[APPROVAL_TAG] == "approved" and registry.newest("asking") == second
    registry.client.create_model_version("asking", "s3://elsewhere", None)
    assert registry.newest("asking") == second and len(registry.requests("asking")) == 2
