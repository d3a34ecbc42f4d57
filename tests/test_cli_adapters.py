"""`tuneserve inspect`: wrong input, versions from a small MLflow, the choice of a server, and --write. Real PEFT's adapters are in test_cli_adapters_contract.py."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import numpy
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from pipeline.adapter import ADAPTER_FILES, adapter_digest
from pipeline.basemodel import read_base_model, template_digest, tiny_name
from pipeline.cli import cli
from pipeline.version import BASE_REVISION_TAG, DIGEST_TAG, TEMPLATE_DIGEST_TAG
from tests.conftest import write_adapter
from tests.inspecting import ATTENTION_RECIPE, codes, inspect, make_base, make_home
from tests.replicas import http_server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path / "project")


def attention(home: Path) -> str:
    return str(home / "recipes/serving/attention.yaml")


def read_only(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Missing argument"),
        (["{good}", "--wrong"], "No such option"),
        (["{good}", "--experts", "4d", "--write", "{tmp}/out"], "4d"),
        (["{good}", "--experts", "2d"], "give --write"),
        (["{good}", "--serving", "{tmp}/none.yaml"], "cannot be read"),
        (["{good}", "--serving", "{tmp}/finetune.yaml"], "unknown key"),
        (["{good}", "--write", "{good}"], "is there already"),
        (["{good}", "--write", "{tmp}/no/out"], "no such folder"),
        (["{good}", "--write", "{tmp}/out"], "nothing to convert"),
        (["{good}", "--write", "{tmp}/out", "--experts", "2d"], "nothing to convert"),
        (["{tmp}/none"], "no such folder"),
        (["./none"], "no such folder"),
        ([""], "NAME/VERSION"),
        (["shop/x"], "NAME/VERSION"),
        (["shop/0"], "NAME/VERSION"),
        (["a/b/1"], "NAME/VERSION"),
        (["image"], "NAME/VERSION"),
        (["{tmp}/empty"], "is no adapter's folder"),
        (["{good}/adapter_config.json"], "is no folder"),
    ],
)
def test_wrong_input_exits_2_and_writes_nothing(args: list[str], said: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "finetune.yaml").write_text("name: r\nbase_model: base\nfollow: [a]\ntraining: {}\n", "utf-8")
    good = write_adapter(tmp_path / "good")
    before = read_only(tmp_path)
    code, answer = inspect(home, *(arg.format(tmp=tmp_path, good=good) for arg in args))
    assert code == 2 and said in answer["error"]
    assert read_only(tmp_path) == before


def test_a_good_adapter_and_what_it_is(home: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", 2.0, alpha_pattern={"q_proj": 4}, base_model_name_or_path="somewhere/base")
    code, answer = inspect(home, str(folder), "--serving", attention(home))
    assert (code, codes(answer)) == (0, [])
    group = {"layers": [0], "modules": 1, "ranks": [8], "alphas": [4], "scalings": [0.5], "parameters": 64}
    # A and B are full of 2: |A|^2 = |B|^2 = 32 * 4, and B A is full of 32, 16 of them, scaled by 1/2.
    norms = {"norm_a": 128**0.5, "norm_b": 128**0.5, "norm_update": 64.0}
    assert answer["adapter"].pop("modules") == {"self_attn.q_proj": group | {key: pytest.approx(value) for key, value in norms.items()}}
    assert answer["adapter"] == {
        "digest": adapter_digest(folder),
        "bytes": sum((folder / name).stat().st_size for name in ADAPTER_FILES),
        "layout": "plain",
        "base_model": "somewhere/base",
        "rslora": False,
        "ranks": [8],
        "scalings": [0.5],
        "tensors": 2,
        "parameters": 64,
        "dtypes": {"F32": 64},
    }
    against = answer["against"]
    assert (against["server"], against["base_known"], against["max_rank"], against["wraps_experts"]) == ("attention", False, 16, False)
    assert len(against["notes"]) == 1 and "not here" in against["notes"][0]


def test_the_base_s_shapes_and_revision_count_where_it_is_here(home: Path, tmp_path: Path) -> None:
    make_base(home / "base")
    make_base(home / "other", 2.0)
    for name, expected in (("base", []), ("other", ["wrong-base"]), ("elsewhere", []), (str(home / "base"), []), ("/", []), ("x" * 400, [])):
        folder = write_adapter(tmp_path / f"a{len(name)}", base_model_name_or_path=name)
        answer = inspect(home, str(folder), "--serving", attention(home))[1]
        assert codes(answer) == expected and answer["against"]["base_known"]


@pytest.mark.parametrize(
    ("named", "recipe", "noted"),
    [
        (None, "recipes/serving/tiny-cpu.yaml", "no --serving"),
        (f"/somewhere/.tuneserve/bases/{tiny_name()}", "recipes/serving/tiny-cpu.yaml", "no --serving"),
        ("zai-org/GLM-4.5V", "recipes/serving/big.yaml", "no --serving"),
        ("hub/base", None, "several recipes have its base (hub/base): attention.yaml, experts.yaml"),
        ("some/other", None, "no recipe here has its base (some/other)"),
    ],
)
def test_without_a_recipe_the_one_of_its_base_is_taken_or_none(named: str | None, recipe: str | None, noted: str, home: Path, tmp_path: Path) -> None:
    (home / "recipes/serving/tiny-cpu.yaml").write_text(ATTENTION_RECIPE.replace("base_model: base", "base_model: tiny"), "utf-8")
    (home / "recipes/serving/big.yaml").write_text(ATTENTION_RECIPE.replace("base_model: base", "base_model: models/GLM-4.5V"), "utf-8")
    (home / "recipes/serving/broken.yaml").write_text("name: [", "utf-8")
    folder = write_adapter(tmp_path / "a", r=32 if recipe is None else 8, base_model_name_or_path=named)
    code, answer = inspect(home, str(folder))
    assert answer["against"]["recipe"] == recipe and noted in answer["against"]["notes"][0]
    assert codes(answer) == ([] if recipe else ["rank-shape-mismatch"])  # no server's limits: rank 32 is not too large
    assert not (home / ".tuneserve").exists() and code == (0 if recipe else 1)


def test_a_nameless_adapter_is_held_against_the_usual_server_only_if_it_fits_its_base(home: Path, tmp_path: Path) -> None:
    (home / "recipes/serving/tiny-cpu.yaml").write_text(ATTENTION_RECIPE, "utf-8")
    make_base(home / "base")
    folder = write_adapter(tmp_path / "a")
    assert inspect(home, str(folder))[1]["against"]["recipe"] == "recipes/serving/tiny-cpu.yaml"
    weights = load_file(folder / ADAPTER_FILES[1])
    wider = {key: numpy.ones((8, 6), "float32") if "lora_A" in key else value for key, value in weights.items()}
    deeper = {key.replace("layers.0", "layers.7"): value for key, value in weights.items()}
    for tensors in (wider, deeper):
        save_file(tensors, folder / ADAPTER_FILES[1])
        code, answer = inspect(home, str(folder))
        assert code == 0 and answer["against"]["recipe"] is None and "does not fit that of" in answer["against"]["notes"][0]
        assert inspect(home, str(folder), "--serving", attention(home))[0] == 1


def test_a_project_without_recipes_and_a_text_report(home: Path, tmp_path: Path) -> None:
    code, answer = inspect(tmp_path, str(write_adapter(tmp_path / "a")))
    assert code == 0 and answer["against"]["server"] is None and "vLLM's rules alone" in answer["against"]["notes"][0]


class Shop:
    """As much of MLflow's REST as a version needs. `files` are the artifacts of each, `tags` its tags."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, dict[str, str]] = {}

    def add(self, number: str, folder: Path, revision: str, **tags: str | None) -> None:
        self.files[number] = {path.name: path.read_bytes() for path in folder.iterdir()}
        known = {DIGEST_TAG: adapter_digest(folder), BASE_REVISION_TAG: revision, TEMPLATE_DIGEST_TAG: template_digest()}
        self.tags[number] = {key: value for key, value in (known | tags).items() if value is not None}

    def entry(self, number: str) -> dict[str, Any]:
        tags = [{"key": key, "value": value} for key, value in self.tags[number].items()]
        return {"name": "shop", "version": number, "source": "", "run_id": f"run{number}", "tags": tags}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        parts = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path.endswith("model-versions/search"):
            newest = max(self.files) if query["filter"] == "name = 'shop'" and query["order_by"] == "version_number DESC" else None
            return 200, {"model_versions": [self.entry(newest)]} if newest else {}
        if "mlflow-artifacts" in parts.path and not query:
            number, name = unquote(parts.path).split("/")[-2:]
            return 200, self.files[number][name]
        if "mlflow-artifacts" in parts.path:
            files = self.files[query["path"]]
            return 200, {"files": [{"path": name, "file_size": len(content)} for name, content in files.items()]}
        if query.get("name") != "shop" or query["version"] not in self.files:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"}
        if parts.path.endswith("get-download-uri"):
            return 200, {"artifact_uri": f"mlflow-artifacts:/{query['version']}"}
        return 200, {"model_version": self.entry(query["version"])}


@pytest.fixture
def serve() -> Iterator[Callable[[Shop], str]]:
    with ExitStack() as stack:
        yield lambda shop: stack.enter_context(http_server(shop.answer))


def test_registered_versions(home: Path, tmp_path: Path, serve: Callable[[Shop], str]) -> None:
    revision, good, shop = read_base_model(make_base(home / "base")).revision, write_adapter(tmp_path / "a"), Shop()
    shop.add("1", good, revision)
    shop.add("2", good, "f" * 64, **{TEMPLATE_DIGEST_TAG: "e" * 64})
    shop.add("3", good, revision, **{DIGEST_TAG: "5" * 64})
    shop.add("4", good, revision, **{DIGEST_TAG: None, BASE_REVISION_TAG: None})
    shop.add("5", good, revision)
    shop.files["5"]["adapter_model.bin"] = b""
    shop.add("6", good, revision)
    del shop.files["6"][ADAPTER_FILES[1]]
    shop.add("7", write_adapter(tmp_path / "dora", use_dora=True), "f" * 64)
    mlflow = serve(shop)
    expected = {
        "1": [],
        "2": ["wrong-base", "wrong-template"],
        "3": ["digest-mismatch"],
        "4": ["no-tags"],
        "5": ["pickle"],
        "6": ["files-missing"],
        "7": ["wrong-base", "dora"],
    }
    for number, reasons in expected.items():
        code, answer = inspect(home, f"shop/{number}", "--serving", attention(home), mlflow=mlflow)
        assert (code, codes(answer)) == (1 if reasons else 0, reasons)
        assert answer["adapter"]["version"] == number and answer["adapter"]["run_id"] == f"run{number}"
        assert answer["adapter"]["digest"] == (None if number in "56" else adapter_digest(tmp_path / ("dora" if number == "7" else "a")))
    first = inspect(home, "shop/1", "--serving", attention(home), mlflow=mlflow)[1]["adapter"]
    assert (first["base_revision"], first["template_digest"], first["registered_digest"]) == (revision, template_digest(), first["digest"])
    newest = inspect(home, "shop", "--serving", attention(home), mlflow=mlflow)[1]
    assert newest["adapter"]["version"] == "7"
    for missing in ("shop/8", "toys", "toys/1"):
        code, answer = inspect(home, missing, mlflow=mlflow)
        assert code == 2 and f"{missing}: no such" in answer["error"]
    assert inspect(home, "shop/1")[0] == 1  # no MLflow there
    (tmp_path / "tight.yaml").write_text(ATTENTION_RECIPE + "lora: {max_adapter_gib: 0.0000001}\n", "utf-8")
    for adapter in ("shop/1", str(good)):
        assert codes(inspect(home, adapter, "--serving", str(tmp_path / "tight.yaml"), mlflow=mlflow)[1]) == ["too-large"]
    (tmp_path / "named.yaml").write_text(ATTENTION_RECIPE.replace("follow: [shop]", "follow: [x]\nserved_name: shop"), "utf-8")
    assert codes(inspect(home, "shop/1", "--serving", str(tmp_path / "named.yaml"), mlflow=mlflow)[1]) == ["bad-name"]


def test_a_version_is_converted_too(home: Path, tmp_path: Path, serve: Callable[[Shop], str]) -> None:
    revision, shop = read_base_model(make_base(home / "base")).revision, Shop()
    shop.add("1", text_only(tmp_path / "text"), revision)
    shop.add("2", text_only(tmp_path / "again"), revision, **{DIGEST_TAG: "5" * 64})
    mlflow = serve(shop)
    code, answer = inspect(home, "shop/1", "--serving", attention(home), "--write", str(tmp_path / "out"), mlflow=mlflow)
    assert (code, codes(answer), answer["written"]["from"]["adapter"]) == (0, [], "shop/1")
    before, after = (load_file(folder / ADAPTER_FILES[1]) for folder in (write_adapter(tmp_path / "same"), tmp_path / "out"))
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)
    assert answer["adapter"]["digest"] == adapter_digest(tmp_path / "out") != answer["written"]["from"]["digest"]
    shop.add("3", tmp_path / "text", revision)
    shop.files["3"]["optimizer.pt"] = b""
    code, answer = inspect(home, "shop/3", "--write", str(tmp_path / "out3"), mlflow=mlflow)
    assert code == 1 and answer["error"].startswith("shop/3: not converted") and not (tmp_path / "out3").exists()
    code, answer = inspect(home, "shop/2", "--write", str(tmp_path / "out2"), mlflow=mlflow)
    assert code == 1 and "digest-mismatch" in answer["error"] and "shop/2" in answer["error"] and not (tmp_path / "out2").exists()


def text_only(folder: Path) -> Path:
    write_adapter(folder)
    content = (folder / ADAPTER_FILES[1]).read_bytes()
    for part in (b"lora_A", b"lora_B"):  # the header keeps its length
        new = b"base_model.model.model.layers.0.self_attn.q_proj." + part
        old = b"base_model.model.model.language_model.layers.0.self_attn.q_proj." + part
        content = content.replace(b'"' + old + b'.weight"', b'"' + new + b'.weight"' + b" " * (len(old) - len(new)))
    (folder / ADAPTER_FILES[1]).write_bytes(content)
    return folder


def test_what_is_not_what_was_trained_is_not_converted(home: Path, tmp_path: Path) -> None:
    folder = text_only(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4}), "utf-8")
    code, answer = inspect(home, str(folder), "--write", str(tmp_path / "out"))
    assert code == 1 and "rank-shape-mismatch" in answer["error"] and not (tmp_path / "out").exists()


def test_the_text_report_shows_each_kind_and_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESERVE_PROJECT", str(tmp_path))
    folder = write_adapter(tmp_path / "a", base_model_name_or_path="\x1b[31mred", init_lora_weights="\x1b" * 99)
    strange = {f"a{number}\x1b[31m.lora_{part}.weight": numpy.ones((8, 8), "float32") for number in range(40) for part in "AB"}
    save_file(load_file(folder / ADAPTER_FILES[1]) | strange, folder / ADAPTER_FILES[1])
    with patch.dict(os.environ):
        done = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert done.exit_code == 1 and all(line.isprintable() for line in done.stdout.splitlines())
    assert "rank 8, 5,184 parameters (F32)" in done.stdout and "21 more kinds of modules" in done.stdout
    assert "cannot be served: vLLM's rules" in done.stdout and "unsupported-init: " in done.stdout and "    -> " in done.stdout


def test_where_nothing_is_registered_no_server_is_started_to_say_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, answer = inspect(home, "shop/1", mlflow=None)
    assert code == 2 and "no adapter is registered in this project" in answer["error"]
    assert sorted(path.name for path in home.iterdir()) == ["recipes"]
