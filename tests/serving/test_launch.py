"""What vLLM is told for a serving recipe, and what must not be set around it."""

import stat
from pathlib import Path

import pytest

from pipeline.basemodel import TEMPLATE_FILE, BaseModel
from pipeline.errors import ServingError
from pipeline.process import GRACE_SECONDS
from pipeline.project import Project
from pipeline.recipe import ServingRecipe, load_recipe
from pipeline.serving.launch import DRAIN_SECONDS, adapters_token, replica, serve_args, serve_environment
from pipeline.serving.settings import SETTINGS_VARIABLE
from tests.conftest import ROOT

EMBEDDED = load_recipe(ROOT / "recipes/serving/tiny-cpu.yaml", ServingRecipe)


def option(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


def test_the_embedded_recipes_arguments() -> None:
    args = serve_args(EMBEDDED, Path("/base"), 8000)
    wanted = {
        "--model": "/base",
        "--served-model-name": "glm-4.5v",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--max-lora-rank": "16",
        "--max-cpu-loras": "16",
        "--lora-target-modules": "qkv_proj",
        "--chat-template": str(TEMPLATE_FILE),
        "--limit-mm-per-prompt": '{"image": 2, "video": 0}',
    }
    assert {name: option(args, name) for name in wanted} == wanted
    assert {"--enable-lora", "--enforce-eager"} <= set(args)
    assert not {"--gpu-memory-utilization", "--api-key", "--trust-remote-code"} & set(args)
    assert DRAIN_SECONDS < GRACE_SECONDS


def test_without_domains_no_image_url_is_fetched() -> None:
    assert option(serve_args(EMBEDDED, Path("/base"), 1), "--allowed-media-domains") == "none.invalid"
    open_ = EMBEDDED.model_copy(update={"allowed_media_domains": ("img.example",)})
    assert option(serve_args(open_, Path("/base"), 1), "--allowed-media-domains") == "img.example"


def test_on_gpus() -> None:
    recipe = EMBEDDED.model_copy(update={"device": "cuda", "tensor_parallel_size": 4})
    args = serve_args(recipe, Path("/base"), 1)
    assert option(args, "--tensor-parallel-size") == "4" and "--enforce-eager" not in args
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve_environment(recipe, Path("s"))


def test_the_users_own_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs,tuneserve")
    environment = serve_environment(EMBEDDED, Path("/settings"))
    assert environment["VLLM_PLUGINS"] == "tuneserve_cpu_moe,tuneserve,theirs"
    assert environment[SETTINGS_VARIABLE] == "/settings"


def test_open_doors_in_the_environment_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING.*unset it"), replica(project, EMBEDDED, BaseModel(Path("/b"), "r"), "http://m"):
        pass


def test_the_token_is_made_once_and_is_its_owners_only(project: Project) -> None:
    path = adapters_token(project)
    first = path.read_text("utf-8")
    assert adapters_token(project).read_text("utf-8") == first and len(first) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
