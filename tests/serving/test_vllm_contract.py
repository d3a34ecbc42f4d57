"""What we use of vLLM beyond its documented interfaces. If one of these fails after an upgrade, read plugin.py and cpu_moe.py before anything is served."""

import asyncio
import hashlib
import inspect
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

pytestmark = pytest.mark.contract

vllm = pytest.importorskip("vllm")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from vllm import envs  # noqa: E402
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES  # noqa: E402
from vllm.engine.protocol import EngineClient  # noqa: E402
from vllm.entrypoints.launchers.api_server import app_state  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: E402
from vllm.entrypoints.openai.models.api_router import attach_router  # noqa: E402
from vllm.entrypoints.openai.models.protocol import BaseModelPath  # noqa: E402
from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.entrypoints.serve.engine.serving import BaseServing  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle import unquantized  # noqa: E402
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins, init_endpoint_plugins_state  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.worker.gpu.lora_utils import LoraState  # noqa: E402

from pipeline.errors import ServingError  # noqa: E402
from pipeline.recipe import ServingRecipe, load_recipe  # noqa: E402
from pipeline.serving import cpu_moe, plugin  # noqa: E402
from pipeline.serving.followed_model import ServedAdapter  # noqa: E402
from pipeline.serving.launch import serve_args  # noqa: E402
from tests.conftest import ROOT  # noqa: E402


class FakeClient:
    """An EngineClient as far as OpenAIServingModels and loading need one."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=2048, model="/secret/place/base")
        self.renderer = self.input_processor = None
        self.added: list[LoRARequest] = []
        self.fault: Exception | None = None

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        if self.fault:
            raise self.fault
        self.added.append(lora_request)
        return True


def serving_models(client: FakeClient) -> OpenAIServingModels:
    return OpenAIServingModels(client, [BaseModelPath(name="glm-4.5v", model_path="/secret/place/base")])


def adapter(tmp_path, version: str) -> ServedAdapter:
    return ServedAdapter("catalog", version, hashlib.sha256(version.encode()).hexdigest(), tmp_path / version)


@pytest.fixture
def app(tmp_path, monkeypatch, world, new_engine):
    """vLLM's application with our plugin attached and its state made, on a disk where catalog/1 was live before; MLflow is away."""
    world.promote("1")
    asyncio.run(world.replica(new_engine()).start())
    (tmp_path / "token").write_text("sesame\n")
    settings = {"mlflow_uri": "http://127.0.0.1:9", "models": ["catalog"], "base_revision": "base-1", "template_digest": "template-1", "poll_seconds": 60}
    (tmp_path / "follower.json").write_text(json.dumps({**settings, "state_dir": str(tmp_path / "state"), "token_file": str(tmp_path / "token")}))
    monkeypatch.setenv("TUNESERVE_FOLLOWER", str(tmp_path / "follower.json"))
    monkeypatch.setenv("VLLM_PLUGINS", "tuneserve")
    app = FastAPI()
    app.state.args = Namespace(enable_lora=True, api_server_count=None)
    attach_router(app)
    attach_endpoint_plugins(app, ("generate",))
    client = FakeClient()
    app.state.openai_serving_models = serving_models(client)

    async def start() -> None:
        await init_endpoint_plugins_state(client, app.state, app.state.args)

    app.router.on_startup.append(start)
    return app


def test_this_version_is_one_that_we_tested():
    assert vllm.__version__.partition("+")[0] in plugin.TESTED_VLLM


def test_plugin_meets_vllms_protocol():
    assert isinstance(plugin.AdapterFollower(), EndpointPlugin)
    assert list(inspect.signature(EndpointPlugin.init_state).parameters) == list(inspect.signature(plugin.AdapterFollower.init_state).parameters)
    source = inspect.getsource(app_state.init_app_state)
    assert source.index("init_static_loras()") < source.index("init_endpoint_plugins_state(")


def test_server_arguments_that_we_read():
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", "m"])
    assert args.api_server_count is None and args.enable_lora in (None, False)
    assert envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING is False and envs.VLLM_SKIP_MODEL_NAME_VALIDATION is False


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/serving").glob("*.yaml")), ids=lambda path: path.stem)
def test_vllms_own_parser_takes_every_shipped_recipes_arguments(path):
    recipe = load_recipe(path, ServingRecipe)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(serve_args(recipe, Path("/base"), 8000))
    assert (args.quantization, args.enable_expert_parallel, args.tensor_parallel_size) == (
        recipe.quantization,
        recipe.expert_parallel,
        recipe.tensor_parallel_size,
    )
    assert (args.max_num_batched_tokens, args.max_num_seqs, args.max_model_len) == (
        recipe.max_num_batched_tokens,
        recipe.max_num_seqs,
        recipe.max_model_len_tokens,
    )
    assert args.enable_chunked_prefill is True and args.enable_prefix_caching is recipe.prefix_caching
    assert args.mm_processor_cache_gb == recipe.image_cache_gib and args.limit_mm_per_prompt == {"image": recipe.max_images, "video": 0}
    assert args.mm_encoder_tp_mode == ("data" if recipe.vision_data_parallel else "weights")
    assert (args.max_loras, args.max_cpu_loras, tuple(args.lora_target_modules)) == (
        recipe.lora.max_loras,
        recipe.lora.max_cpu_loras,
        recipe.lora.target_modules,
    )
    assert args.allowed_media_domains == ["none.invalid"]


def test_recipes_offer_vllms_ways_to_quantize_while_loading():
    offered = {name for name in get_args(get_args(ServingRecipe.model_fields["quantization"].annotation)[0])}
    assert offered <= set(ONLINE_QUANT_SHORTHAND_NAMES)
    with pytest.raises(ValueError, match="no longer supports online"):  # why plain `fp8` is not offered
        Fp8Config(is_checkpoint_fp8_serialized=False)


def test_requests_look_names_up_in_the_dict_that_we_write(tmp_path):
    models, client = serving_models(FakeClient()), FakeClient()
    engine = plugin.VllmEngine(client, models)
    serving = SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
    for version in ("1", "2"):
        asyncio.run(engine.load(adapter(tmp_path, version)))
        engine.point("catalog", adapter(tmp_path, version))
        found = BaseServing._maybe_get_adapters(serving, SimpleNamespace(model="catalog"))
        assert found == client.added[-1] and models.model_name(found) == adapter(tmp_path, version).engine_name
    assert BaseServing._maybe_get_adapters(serving, SimpleNamespace(model="glm-4.5v")) is None


def test_loading_goes_through_the_engine_clients_own_method(tmp_path):
    assert list(inspect.signature(EngineClient.add_lora).parameters) == ["self", "lora_request"]
    client = FakeClient()
    client.fault = Exception("Call to add_lora method failed: rank 64")
    with pytest.raises(ServingError, match=r"vLLM refused the adapter: .*rank 64"):
        asyncio.run(plugin.VllmEngine(client, serving_models(client)).load(adapter(tmp_path, "1")))


def test_lora_request_carries_name_number_and_folder(tmp_path):
    request = plugin.lora_request(adapter(tmp_path, "1"))
    assert (request.lora_name, request.lora_int_id, request.lora_path) == (
        f"catalog/1@{adapter(tmp_path, '1').digest[:8]}",
        request.adapter_id,
        str(tmp_path / "1"),
    )
    assert not request.load_inplace  # it would reload from disk whenever the adapter is in a batch


def test_largest_adapter_number_fits_both_model_runners(tmp_path):
    state = LoraState(2)
    assert state.lora_ids.dtype == np.int32  # the reason for 31 bits; with int64 here they could become 63
    state.add_request("r", 0, LoRARequest("x", 2**31 - 1, str(tmp_path)))
    assert state.make_lora_inputs(["r"], np.array([0]), np.array([1]))[0] == (2**31 - 1,)
    with pytest.raises(OverflowError):
        state.add_request("r", 0, LoRARequest("x", 2**31, str(tmp_path)))


def test_our_routes_replace_and_join_vllms(app):
    with TestClient(app) as http:
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card["root"].partition("@")[0], card["parent"]) for card in cards] == [
            ("glm-4.5v", "glm-4.5v", None),
            ("catalog", "catalog/1", "glm-4.5v"),
            ("catalog/1", "catalog/1", "glm-4.5v"),
        ]
        assert "/secret" not in json.dumps(cards) and str(app.state.endpoint_plugins[0].settings.state_dir) not in json.dumps(cards)
        assert all(card["object"] == "model" and isinstance(card["created"], int) and card["owned_by"] for card in cards)
        shown = {"Authorization": "Bearer sesame"}
        assert http.get("/adapters/ready", headers=shown).json() == {"ready": True}
        for method, path in (("GET", "/adapters"), ("POST", "/adapters/sync")):
            status = http.request(method, path, headers=shown).json()
            assert status["base_models"] == ["glm-4.5v"] and status["models"]["catalog"]["live"]["version"] == "1"
            assert "cannot be reached" in status["mlflow_error"] and status["pid"] > 0


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "sesame", "Basic sesame", "Bearer \xe9"])
def test_every_adapters_route_asks_for_the_token(app, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with TestClient(app) as http:
        for method, path in (("GET", "/adapters"), ("GET", "/adapters/ready"), ("POST", "/adapters/sync")):
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


def test_not_ready_before_vllm_made_our_state(app):
    shown = {"Authorization": "Bearer sesame"}
    http = TestClient(app)  # outside `with`, nothing is started
    for method, path in (("GET", "/adapters/ready"), ("GET", "/adapters"), ("POST", "/adapters/sync")):
        assert http.request(method, path, headers=shown).status_code == 503


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"version": "0.33.0"}, "tested with 0.32.0 only"),
        ({"version": "dev"}, "tested with 0.32.0 only"),
        ({"lora_enabled": False}, "--enable-lora"),
        ({"api_server_count": 2}, "--api-server-count"),
        ({"runtime_updates": True}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({"skips_names": True}, "VLLM_SKIP_MODEL_NAME_VALIDATION"),
    ],
)
def test_server_that_may_not_follow_is_refused(changed, says):
    fine = {"version": "0.32.0+cpu", "lora_enabled": True, "api_server_count": 1, "runtime_updates": False, "skips_names": False}
    assert plugin.refusal(**fine) is None
    assert says in plugin.refusal(**fine | changed)


def test_refusal_ends_the_servers_start(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "tuneserve")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = FastAPI()
    app.state.args = Namespace(enable_lora=True, api_server_count=None)
    with pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        attach_endpoint_plugins(app, ("generate",))


def test_faulty_settings_end_the_servers_start(tmp_path):
    for environment, says in (({}, "TUNESERVE_FOLLOWER: not set"), ({"TUNESERVE_FOLLOWER": str(tmp_path / "none")}, "not the follower's settings")):
        with pytest.raises(ServingError, match=says):
            plugin.read_settings(environment)
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ServingError, match="would be open to all"):
        plugin.read_token(tmp_path / "token")


def test_moe_backend_choice_is_where_cpu_moe_replaces_it(monkeypatch):
    assert list(inspect.signature(unquantized.select_unquantized_moe_backend).parameters) == ["moe_config"]
    assert unquantized_fused_moe_method.select_unquantized_moe_backend is unquantized.select_unquantized_moe_backend
    assert "if moe_config.is_lora_enabled" in inspect.getsource(unquantized.select_unquantized_moe_backend)
    seen = []
    for module in (unquantized, unquantized_fused_moe_method):
        monkeypatch.setattr(module, "select_unquantized_moe_backend", lambda moe_config: seen.append(moe_config.is_lora_enabled))
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    config = SimpleNamespace(lora_config=SimpleNamespace(target_modules=["qkv_proj", "o_proj"]))
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    cpu_moe.register()
    moe_config = SimpleNamespace(is_lora_enabled=True)
    unquantized_fused_moe_method.select_unquantized_moe_backend(moe_config=moe_config)
    assert seen == [False] and moe_config.is_lora_enabled
    config.lora_config.target_modules = None
    with pytest.raises(ServingError, match="--lora-target-modules qkv_proj o_proj"):
        unquantized.select_unquantized_moe_backend(moe_config=moe_config)


@pytest.mark.parametrize(
    ("modules", "refused"),
    [(None, True), (["experts"], True), (["mlp.experts", "o_proj"], True), (["qkv_proj", "o_proj"], False), (["shared_experts.down_proj"], False)],
)
def test_expert_lora_on_cpu_is_refused(modules, refused):
    if refused:
        with pytest.raises(ServingError):
            cpu_moe.refuse_expert_lora(modules)
    else:
        cpu_moe.refuse_expert_lora(modules)
