"""The reader against MLflow's answers as 3.17 gives them, over httpx's own fake transport."""

import asyncio

import httpx
import pytest

from pipeline.adapter import ADAPTER_FILES
from pipeline.errors import RegistryError, VersionRefused
from pipeline.serving.registry_reader import RegistryReader
from pipeline.serving.wanted import RegisteredVersion, Wanted

VERSION = RegisteredVersion("catalog", "7", "mlflow-artifacts:/0/run/artifacts/adapter", "d" * 64, "base-1", "template-1")
MODEL_ANSWER = {"registered_model": {"name": "catalog", "aliases": [{"alias": "champion", "version": "7"}]}}
VERSION_ANSWER = {
    "model_version": {
        "name": "catalog",
        "version": "7",
        "source": VERSION.source,
        "tags": [
            {"key": "tuneserve.digest", "value": "d" * 64},
            {"key": "tuneserve.base_revision", "value": "base-1"},
            {"key": "tuneserve.template_digest", "value": "template-1"},
            {"key": "other", "value": "x"},
        ],
    }
}
FILES = "/api/2.0/mlflow-artifacts/artifacts"


class MLflow:
    """Answers by path; what is not in `answers` is a 404 that is not MLflow's."""

    def __init__(self, answers: dict[str, httpx.Response]) -> None:
        self.answers = answers
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answers.get(request.url.path, httpx.Response(404, text="Not Found"))

    @property
    def paths(self) -> list[str]:
        return [request.url.path for request in self.requests]


def with_version(answer: httpx.Response) -> MLflow:
    model = httpx.Response(200, json=MODEL_ANSWER)
    return MLflow({"/api/2.0/mlflow/registered-models/get": model, "/api/2.0/mlflow/registered-models/alias": answer})


def with_files(uri: str, folder: str, listed: tuple[str, ...] = ADAPTER_FILES, **more: httpx.Response) -> MLflow:
    answers = {f"{FILES}/{folder}/{name}": httpx.Response(200, content=name.encode()) for name in ADAPTER_FILES}
    listing = {"files": [{"path": name, "is_dir": False, "file_size": str(len(name))} for name in listed]}
    answers[FILES] = httpx.Response(200, json=listing)
    return MLflow({"/api/2.0/mlflow/model-versions/get-download-uri": httpx.Response(200, json={"artifact_uri": uri}), **answers, **more})


def read(mlflow) -> Wanted:
    return asyncio.run(RegistryReader("http://mlflow/", transport=httpx.MockTransport(mlflow)).read("catalog"))


def fetch(mlflow: MLflow, folder, max_bytes: int = 1000) -> None:
    asyncio.run(RegistryReader("http://mlflow", max_bytes, httpx.MockTransport(mlflow)).fetch(VERSION, folder))


def test_what_is_wanted_is_a_question_for_the_model_and_one_for_the_champion():
    mlflow = with_version(httpx.Response(200, json=VERSION_ANSWER))
    assert read(mlflow) == Wanted(True, champion=VERSION)
    assert [str(request.url) for request in mlflow.requests] == [
        "http://mlflow/api/2.0/mlflow/registered-models/get?name=catalog",
        "http://mlflow/api/2.0/mlflow/registered-models/alias?name=catalog&alias=champion",
    ]


def test_missing_tags_are_none():
    answer = {"model_version": {"name": "catalog", "version": 7}}
    assert read(with_version(httpx.Response(200, json=answer))).champion == RegisteredVersion("catalog", "7", "", None, None, None)


GONE = httpx.Response(404, json={"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Registered Model with name=catalog not found"})


def test_no_model_is_said():
    routes = ("/api/2.0/mlflow/registered-models/get", "/api/2.0/mlflow/registered-models/alias")
    assert read(MLflow(dict.fromkeys(routes, GONE))) == Wanted(exists=False)


NO_ALIAS = httpx.Response(400, json={"error_code": "INVALID_PARAMETER_VALUE", "message": "Registered model alias champion not found."})


@pytest.mark.parametrize("answer", [GONE, NO_ALIAS])
def test_without_the_alias_there_is_no_champion(answer):
    assert read(with_version(answer)) == Wanted(True)


def test_each_other_alias_is_a_question_for_its_version():
    mlflow = with_version(httpx.Response(200, json=VERSION_ANSWER))
    aliases = [{"alias": alias, "version": number} for alias, number in (("champion", "7"), ("candidate", "8"), ("audit", "9"), ("holidays", "9"))]
    mlflow.answers["/api/2.0/mlflow/registered-models/get"] = httpx.Response(200, json={"registered_model": {"name": "catalog", "aliases": aliases}})
    mlflow.answers["/api/2.0/mlflow/model-versions/get"] = httpx.Response(200, json={"model_version": {"name": "catalog", "version": "8"}})
    found = read(mlflow)
    assert (found.champion, found.candidate and found.candidate.version) == (VERSION, "8")
    assert [request.url.params["version"] for request in mlflow.requests[2:]] == ["8", "9"]


def test_models_with_a_tag_are_read_page_by_page():
    def mlflow(request: httpx.Request) -> httpx.Response:
        assert request.url.params["filter"] == "tags.`team` = 'shop'"
        last = request.url.params.get("page_token") == "2"
        return httpx.Response(200, json={"registered_models": [{"name": "b" if last else "a"}], **({} if last else {"next_page_token": "2"})})

    reader = RegistryReader("http://mlflow", transport=httpx.MockTransport(mlflow))
    assert asyncio.run(reader.tagged("team", "shop")) == ["a", "b"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(404, text="<html>"), "answered 404 without JSON.*check mlflow_uri"),
        (httpx.Response(403, text="<html>"), "answered 403 without JSON.*check mlflow_uri"),
        (httpx.Response(403, text="Invalid Host header - possible DNS rebinding attack detected"), "add it to its MLFLOW_SERVER_ALLOWED_HOSTS"),
        (httpx.Response(200, json=[1]), "MLflow answered 200"),
        (httpx.Response(200, json={"model_version": {}}), "not an MLflow answer"),
        (httpx.Response(200, json={"model_version": {"name": "catalog", "version": "7", "tags": [1]}}), "not an MLflow answer"),
        (httpx.Response(400, json={"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid name"}), "INVALID_PARAMETER_VALUE Invalid name"),
        (httpx.Response(500, json={"error_code": "INTERNAL_ERROR", "message": "database is locked"}), "500 INTERNAL_ERROR database is locked"),
        (httpx.Response(401, json={}), "set MLFLOW_TRACKING_TOKEN"),
    ],
)
def test_every_other_answer_is_an_error_with_a_remedy(answer, says):
    with pytest.raises(RegistryError, match=says):
        read(with_version(answer))


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("gone")])
def test_mlflow_away_is_a_registry_error(error):
    def away(request):
        raise error

    with pytest.raises(RegistryError, match="cannot be reached"):
        read(away)


def test_silence_ends_after_the_time_limit(monkeypatch):
    monkeypatch.setattr("pipeline.serving.registry_reader.ANSWER_SECONDS", 0.05)

    async def silent(request):
        await asyncio.sleep(60)

    with pytest.raises(RegistryError, match="did not answer within"):
        read(silent)


@pytest.mark.parametrize(
    ("environment", "header"),
    [
        ({}, None),
        ({"MLFLOW_TRACKING_TOKEN": "t"}, "Bearer t"),
        ({"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"}, "Basic dTpw"),
        ({"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p", "MLFLOW_TRACKING_TOKEN": "t"}, "Basic dTpw"),
        ({"MLFLOW_TRACKING_USERNAME": "u"}, None),
    ],
)
def test_credentials_come_from_the_environment(monkeypatch, environment, header):
    for name in ("TOKEN", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mlflow = with_version(httpx.Response(200, json=VERSION_ANSWER))
    read(mlflow)
    assert mlflow.requests[0].headers.get("Authorization") == header


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "file:///mlruns"])
def test_only_a_server_can_be_followed(uri):
    with pytest.raises(RegistryError, match="mlflow server"):
        RegistryReader(uri)


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("mlflow-artifacts:/0/run/artifacts/adapter", "0/run/artifacts/adapter"),
        ("mlflow-artifacts://elsewhere:5000/0/run/artifacts/adapter", "0/run/artifacts/adapter"),
        ("http://elsewhere/api/2.0/mlflow-artifacts/artifacts/0/run/artifacts/adapter", "0/run/artifacts/adapter"),
        ("mlflow-artifacts:/0/a b/adapter/", "0/a b/adapter"),
    ],
)
def test_fetch_asks_mlflow_itself_for_the_adapter_files_only(tmp_path, uri, folder):
    mlflow = with_files(uri, folder)
    fetch(mlflow, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in ADAPTER_FILES}
    assert mlflow.paths[1:] == [FILES] + [f"{FILES}/{folder}/{name}" for name in ADAPTER_FILES]
    assert {request.url.host for request in mlflow.requests} == {"mlflow"}


def test_fetch_resolves_a_run(tmp_path):
    run = {"run": {"info": {"artifact_uri": "mlflow-artifacts:/0/abc/artifacts"}}}
    mlflow = with_files("runs:/abc/adapter", "0/abc/artifacts/adapter", **{"/api/2.0/mlflow/runs/get": httpx.Response(200, json=run)})
    fetch(mlflow, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(ADAPTER_FILES)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://bucket/adapter", "--serve-artifacts"),
        ("/local/adapter", "--serve-artifacts"),
        ("mlflow-artifacts:/0/../../secret", "leaves the artifact root"),
        ("mlflow-artifacts:/0/elsewhere", "answered 404 for adapter_config.json"),
    ],
)
def test_fetch_says_what_is_wrong_with_the_address(tmp_path, uri, says):
    with pytest.raises((RegistryError, VersionRefused), match=says):
        fetch(with_files(uri, "0/run/artifacts/adapter"), tmp_path)


def test_fetch_stops_at_the_size_limit_over_all_files(tmp_path):
    size = sum(len(name) for name in ADAPTER_FILES)
    fetch(with_files("mlflow-artifacts:/a", "a"), tmp_path, max_bytes=size)
    (tmp_path / "again").mkdir()
    with pytest.raises(VersionRefused, match=f"larger than {size - 1} bytes"):
        fetch(with_files("mlflow-artifacts:/a", "a"), tmp_path / "again", max_bytes=size - 1)


def test_fetch_of_a_version_deleted_meanwhile(tmp_path):
    gone = httpx.Response(404, json={"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Model Version not found"})
    with pytest.raises(RegistryError, match="catalog/7: deleted from MLflow"):
        fetch(MLflow({"/api/2.0/mlflow/model-versions/get-download-uri": gone}), tmp_path)


@pytest.mark.parametrize(
    ("listed", "code"),
    [
        ((*ADAPTER_FILES, "adapter_model.bin"), "pickle"),
        (("adapter_config.json", "adapter_model.PT"), "pickle"),
        ((), "files-missing"),
        (("adapter_config.json",), "files-missing"),
    ],
)
def test_nothing_is_fetched_of_a_folder_that_is_not_in_order(tmp_path, listed, code):
    mlflow = with_files("mlflow-artifacts:/a", "a", listed)
    with pytest.raises(VersionRefused) as refused:
        fetch(mlflow, tmp_path)
    assert refused.value.code == code and list(tmp_path.iterdir()) == [] and mlflow.paths[-1] == FILES


def test_other_files_beside_are_not_fetched(tmp_path):
    fetch(with_files("mlflow-artifacts:/a", "a", (*ADAPTER_FILES, "README.md", "recipe.yaml")), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(ADAPTER_FILES)


def test_a_file_that_mlflow_will_not_give_out(tmp_path):
    mlflow = with_files("mlflow-artifacts:/a", "a", **{f"{FILES}/a/{ADAPTER_FILES[1]}": httpx.Response(400, json={"message": "Invalid path"})})
    with pytest.raises(VersionRefused) as refused:
        fetch(mlflow, tmp_path)
    assert refused.value.code == "outside-the-store"
