"""The main job, seen from outside: what the quickstart says, what vLLM serves, what MLflow and Prefect hold."""

import base64
import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from openai import OpenAI
from PIL import Image

from pipeline.adapter import ADAPTER_FILES
from pipeline.evaluation import openai_messages
from pipeline.registry import EXTRA_FILES
from pipeline.serving.hint import new_hint
from pipeline.version import ARTIFACT_FOLDER
from tests.e2e.conftest import Quickstart


def test_the_adapter_answers_what_the_base_cannot(quickstart: Quickstart) -> None:
    base, adapter = quickstart.answer["base"], quickstart.answer["adapter"]
    assert base["examples"] == adapter["examples"] >= 200
    assert adapter["score"] >= adapter["exact_match"] >= 0.90
    assert base["score"] <= 0.10 and base["exact_match"] <= 0.10
    assert set(adapter["by_kind"]) == set(base["by_kind"]) == {"name", "use", "colour", "json", "compare", "text"}
    assert min(adapter["by_kind"].values()) >= 0.85, adapter["by_kind"]
    assert set(adapter["by_slice"]) == {"seen", "unseen-pair"}
    assert (adapter["name"], adapter["version"]) == ("catalog", 1)
    assert adapter["model"].startswith("catalog/1@")
    assert {"base_model", "vllm", "training", "promotion", "evaluation", "total"} <= set(quickstart.answer["seconds"])


def test_models_are_listed_once_and_without_paths(quickstart: Quickstart) -> None:
    answer = httpx.get(f"{quickstart.openai}/models")
    ids = [model["id"] for model in answer.json()["data"]]
    assert sorted(ids) == ["catalog", "catalog/1", "glm-4.5v"]
    assert str(quickstart.sandbox.root) not in answer.text and "safetensors" not in answer.text
    assert not [value for model in answer.json()["data"] for value in model.values() if isinstance(value, str) and value.startswith("/")]


def test_the_runtime_lora_endpoints_are_closed(quickstart: Quickstart) -> None:
    for route in ("load_lora_adapter", "unload_lora_adapter"):
        assert httpx.post(f"{quickstart.openai}/{route}", json={"lora_name": "x", "lora_path": "/tmp"}).status_code == 404  # noqa: S108


def test_every_adapters_route_asks_for_the_token_or_a_signature(quickstart: Quickstart) -> None:
    for method, route in (("GET", "/adapters"), ("GET", "/adapters/ready"), ("POST", "/adapters/sync"), ("POST", "/adapters/parity")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": quickstart.token}):
            assert httpx.request(method, quickstart.replica + route, headers=headers).status_code == 401
    for route in ("/adapters", "/adapters/ready"):
        assert httpx.get(quickstart.replica + route, headers={"Authorization": f"Bearer {quickstart.token}"}).status_code == 200
    body, headers = new_hint(quickstart.token, "catalog", "champion", "1")
    assert httpx.post(f"{quickstart.replica}/adapters/sync", content=body, headers=headers, timeout=30).status_code == 200


def test_openais_client_chats_streams_and_lists(quickstart: Quickstart) -> None:
    client = OpenAI(base_url=quickstart.openai, api_key="none")
    example = quickstart.sandbox.held_out[0]
    messages = openai_messages(example)
    whole = client.chat.completions.create(model="catalog", messages=messages, max_tokens=64, temperature=0)
    assert whole.choices[0].message.content
    assert whole.model.startswith("catalog/1@")
    pinned = client.chat.completions.create(model="catalog/1", messages=messages, max_tokens=64, temperature=0)
    assert pinned.choices[0].message.content == whole.choices[0].message.content
    chunks = list(client.chat.completions.create(model="catalog", messages=messages, max_tokens=64, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {whole.model}
    base = client.chat.completions.create(model="glm-4.5v", messages=messages, max_tokens=64, temperature=0)
    assert base.choices[0].message.content != whole.choices[0].message.content
    assert "catalog" in [model.id for model in client.models.list()]


def test_callers_that_send_one_new_picture_at_a_time_are_all_answered(quickstart: Quickstart) -> None:
    """vLLM answers 500 to one of them now and then: hooks.Attempts."""

    def ask(picture: bytes) -> int:
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        body = {"model": "catalog", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
        return httpx.post(f"{quickstart.openai}/chat/completions", json=body, timeout=60).status_code

    with ThreadPoolExecutor(8) as callers:
        for _ in range(10):
            picture = io.BytesIO()
            Image.frombytes("RGB", (64, 64), os.urandom(3 * 64**2)).save(picture, "PNG")
            assert list(callers.map(ask, [picture.getvalue()] * 8)) == [200] * 8


def test_an_unknown_model_is_a_404_and_an_image_from_elsewhere_is_refused(quickstart: Quickstart) -> None:
    ask = {"max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    assert httpx.post(f"{quickstart.openai}/chat/completions", json=ask | {"model": "catalog/99"}, timeout=30).status_code == 404
    remote = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": quickstart.answer["urls"]["mlflow"] + "/static-files/favicon.ico"}}]}
    refused = httpx.post(f"{quickstart.openai}/chat/completions", json=ask | {"model": "catalog", "messages": [remote]}, timeout=30)
    assert 400 <= refused.status_code < 500


def test_a_version_holds_the_allowed_files_and_little_more_than_its_weights(quickstart: Quickstart) -> None:
    client = quickstart.registry.client
    run_id = quickstart.answer["mlflow_run_id"]
    assert [entry.path for entry in client.list_artifacts(run_id)] == [ARTIFACT_FOLDER]
    files = {Path(entry.path).name: entry.file_size for entry in client.list_artifacts(run_id, ARTIFACT_FOLDER)}
    assert set(files) == {*ADAPTER_FILES, *EXTRA_FILES}
    assert sum(files.values()) <= files["adapter_model.safetensors"] + 64 * 1024
    args = client.download_artifacts(run_id, f"{ARTIFACT_FOLDER}/swift_args.json", str(quickstart.sandbox.home.parent))
    assert str(quickstart.sandbox.root) not in Path(args).read_text("utf-8")


def test_the_run_tells_where_the_adapter_comes_from(quickstart: Quickstart) -> None:
    run = quickstart.registry.client.get_run(quickstart.answer["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    tags = {key.removeprefix("tuneserve."): value for key, value in run.data.tags.items() if key.startswith("tuneserve.")}
    wanted = {
        "base_revision",
        "template_digest",
        "dataset_digest",
        "dataset_train_rows",
        "git_commit",
        "git_dirty",
        "version.ms-swift",
        "hardware.cpu",
        "train_seconds",
        "digest",
    }
    assert wanted <= set(tags)
    assert run.data.params["lora.rank"] == "16"
    losses = quickstart.registry.client.get_metric_history(run.info.run_id, "loss")
    assert len(losses) >= 10 and losses[-1].value < losses[0].value
    version = quickstart.registry.champion("catalog")
    assert version and (version.version, version.run_id, version.digest) == ("1", run.info.run_id, tags["digest"])


def test_prefect_shows_both_flows(quickstart: Quickstart) -> None:
    runs = httpx.post(f"{quickstart.answer['urls']['prefect']}/api/flow_runs/filter", json={}).json()
    assert {run["name"].split()[0]: run["state_type"] for run in runs} == {"finetune": "COMPLETED", "promote": "COMPLETED"}


def test_nothing_is_written_to_the_home_directory(quickstart: Quickstart) -> None:
    assert [str(path) for path in quickstart.sandbox.home.rglob("*") if path.is_file()] == []


def test_a_killed_training_leaves_nothing_running(quickstart: Quickstart) -> None:
    before = {process.pid for process in quickstart.sandbox.processes()}
    training = quickstart.sandbox.start("train", "recipes/finetune/catalog-tiny.yaml", "--force")
    log = None
    deadline = time.monotonic() + 90
    known = {quickstart.answer["mlflow_run_id"]}
    while log is None:
        assert time.monotonic() < deadline and training.poll() is None
        log = next((path for path in (quickstart.sandbox.root / ".tuneserve/runs").glob("*/swift/logging.jsonl") if path.parts[-3] not in known), None)
        time.sleep(0.2)
    assert len({process.pid for process in quickstart.sandbox.processes()} - before) >= 3
    os.kill(training.pid, signal.SIGKILL)
    training.communicate()
    deadline = time.monotonic() + 10
    while left := {process.pid for process in quickstart.sandbox.processes()} - before:
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.1)
