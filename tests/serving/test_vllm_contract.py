"""What we use of vLLM beyond its documented interfaces. If one of these fails after an upgrade, read plugin.py, cpu_moe.py, cpu_lora.py and gpu_lora.py before anything is served."""

import asyncio
import hashlib
import inspect
import json
import queue
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.contract

vllm = pytest.importorskip("vllm")

from fastapi import FastAPI  # noqa: E402
from fastapi import Request as HttpRequest  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402
from vllm import envs  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES  # noqa: E402
from vllm.engine.protocol import EngineClient  # noqa: E402
from vllm.entrypoints.launchers.api_server import app_state  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser  # noqa: E402
from vllm.entrypoints.openai.chat_completion.api_router import router as chat_router  # noqa: E402
from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: E402
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat  # noqa: E402
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion  # noqa: E402
from vllm.entrypoints.openai.models.api_router import attach_router  # noqa: E402
from vllm.entrypoints.openai.models.protocol import BaseModelPath  # noqa: E402
from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses  # noqa: E402
from vllm.entrypoints.serve.engine.protocol import UsageInfo  # noqa: E402
from vllm.entrypoints.serve.engine.serving import BaseServing  # noqa: E402
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response  # noqa: E402
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError  # noqa: E402
from vllm.logprobs import Logprob  # noqa: E402
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # noqa: E402
from vllm.lora.ops.torch_ops import lora_ops  # noqa: E402
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op  # noqa: E402
from vllm.lora.ops.triton_ops import utils as triton_utils  # noqa: E402
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # noqa: E402
from vllm.lora.punica_wrapper import punica_cpu  # noqa: E402
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.utils import get_captured_lora_counts  # noqa: E402
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle import unquantized  # noqa: E402
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.multimodal.cache.base import MultiModalCacheMissError  # noqa: E402
from vllm.outputs import CompletionOutput, RequestOutput  # noqa: E402
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins, init_endpoint_plugins_state  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402
from vllm.v1.engine import FinishReason  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.core import EngineCoreProc  # noqa: E402
from vllm.v1.metrics import loggers  # noqa: E402
from vllm.v1.metrics.stats import RequestStateStats  # noqa: E402
from vllm.v1.worker.gpu.lora_utils import LoraState, get_num_active_loras_for_dispatch  # noqa: E402

from pipeline.errors import ServingError  # noqa: E402
from pipeline.recipe import ServingRecipe, load_recipe  # noqa: E402
from pipeline.sample import read_samples  # noqa: E402
from pipeline.serving import adapter_worker, cpu_lora, cpu_moe, hooks, plugin  # noqa: E402
from pipeline.serving.engine import ServedAdapter  # noqa: E402
from pipeline.serving.hint import new_hint  # noqa: E402
from pipeline.serving.launch import LORA_KERNELS, serve_args  # noqa: E402
from pipeline.serving.metrics import VLLM_LORA_INFO, Metrics  # noqa: E402
from pipeline.serving.routing import Route  # noqa: E402
from pipeline.serving.sampling import SAMPLED_PATH, Sampler  # noqa: E402
from pipeline.serving.settings import SamplingSettings  # noqa: E402
from pipeline.serving.traffic import Request, Traffic  # noqa: E402
from pipeline.serving.vllm_engine import PROMPT, VllmEngine  # noqa: E402
from pipeline.serving_memory import graph_sizes  # noqa: E402
from tests.conftest import ROOT  # noqa: E402


class FakeClient:
    """An EngineClient as far as OpenAIServingModels and following need one: three tokens, each adapter with log-probabilities of its own."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=2048, model="/secret/place/base")
        self.renderer = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(encode=lambda text: [1, 2, 3], decode=str))
        self.input_processor = None
        self.added: list[LoRARequest] = []
        self.fault: Exception | None = None
        self.calls: list[tuple[object, ...]] = []

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        self.calls.append(("add_lora", lora_request.lora_int_id))
        if self.fault:
            raise self.fault
        self.added.append(lora_request)
        return True

    async def list_loras(self) -> set[int]:
        return {request.lora_int_id for request in self.added}

    async def remove_lora(self, lora_id: int) -> bool:
        self.added = [request for request in self.added if request.lora_int_id != lora_id]
        return True

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method in dir(adapter_worker.AdapterWorker)
        self.calls.append((method, *args))
        looks = [call[0] for call in self.calls].count("tuneserve_adapter_is_read")
        answers = {"tuneserve_read_adapter": None, "tuneserve_forget_read": None, "tuneserve_adapter_is_read": looks % 2 == 0}
        return [answers.get(method, (4, [], [request.lora_int_id for request in self.added]))]

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None, **kwargs):
        tokens = prompt["prompt_token_ids"]
        logprob = -1.0 - (lora_request.lora_int_id % 7 + 1 if lora_request else 0)
        of_prompt = [None, *({token: Logprob(logprob)} for token in tokens[1:])]
        stats = RequestStateStats(num_generation_tokens=2, arrival_time=time.time(), first_token_ts=1.0, last_token_ts=1.5, first_token_latency=0.25)
        answer = CompletionOutput(0, "x", [5, 6], None, [{5: Logprob(logprob)}, {6: Logprob(logprob)}], finish_reason="stop")
        yield RequestOutput(request_id, None, tokens, of_prompt, [answer], True, metrics=stats, lora_request=lora_request)


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
    monkeypatch.setattr(plugin, "get_prometheus_registry", CollectorRegistry)
    app = FastAPI()
    app.state.args = Namespace(enable_lora=True, api_server_count=None)
    attach_router(app)
    attach_endpoint_plugins(app, ("generate",))
    client = FakeClient()
    app.state.openai_serving_models = serving_models(client)

    async def render_chat(request):
        return [], [{"type": "token", "prompt_token_ids": [1, 2, 3]}]

    app.state.online_renderer = SimpleNamespace(
        model_config=SimpleNamespace(dtype="torch.float32", quantization=None), renderer=client.renderer, render_chat=render_chat
    )

    async def start() -> None:
        await init_endpoint_plugins_state(client, app.state, app.state.args)

    app.router.on_startup.append(start)
    yield app
    BaseServing._maybe_get_adapters = getattr(BaseServing._maybe_get_adapters, "__wrapped__", BaseServing._maybe_get_adapters)


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
    assert args.specialize_active_lora in (None, False)  # see below: it answers wrongly
    assert args.cudagraph_capture_sizes == (graph_sizes(recipe.graph_tokens, recipe.max_num_seqs) if recipe.graph_tokens else None)
    assert args.compilation_config.cudagraph_mm_encoder is recipe.picture_graphs


def test_graphs_per_number_of_adapters_would_still_leave_one_out_beside_the_base():
    """vLLM's --specialize-active-lora chooses a graph by the adapters in a batch, whose kernels have room for as many groups of tokens; the base's tokens are a group too, and the first.
    So beside the base the last of 1, 2, 4 or 8 adapters answers as the base (seen on an H200). Once these counts agree, vLLM may have mended it; it may in another way too."""
    counts = get_captured_lora_counts(8, True)
    kernels = LoRAKernelMeta.make(8, 4, "cpu", counts)
    kernels.prepare_tensors(torch.tensor([-1, 0, -1, 0], dtype=torch.int32))
    requests = LoraState(2)
    requests.add_request("base", 0, None)
    requests.add_request("other", 1, LoRARequest("a", 1, "/a"))
    of_one_adapter = get_num_active_loras_for_dispatch(LoRAConfig(), requests, ["base", "other"], False)
    assert (of_one_adapter, of_one_adapter in counts, kernels.active_lora_ids[:2].tolist()) == (1, True, [-1, 0])
    assert kernels.num_active_loras_cpu.item() == 2 > of_one_adapter, "as many groups as the graph that is chosen has room for"
    assert get_captured_lora_counts(8, False) == [9] and kernels.meta_args(4, False)[-1].item() == 9, "without it there is room for all"


@pytest.mark.parametrize("gpu", sorted({path.name.partition("_SHRINK")[0].partition("_EXPAND")[0] for path in LORA_KERNELS.glob("*.json")}))
def test_vllm_takes_our_tuned_lora_kernels(gpu, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(LORA_KERNELS))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu.replace("_", " "))
    for op, inputs, outputs, file in (("shrink", None, False, "SHRINK"), ("expand", True, True, "EXPAND_TRUE")):
        of_slots = json.loads((LORA_KERNELS / f"{gpu}_{file}.json").read_text())["9"]
        triton_utils.load_lora_op_config.cache_clear()
        triton_utils.get_lora_op_configs.cache_clear()
        for slices, wide in (3, 4096), (1, 12288):
            for tokens, of_shape in of_slots[str(slices)].items():
                (of_k,) = of_shape.values()
                (config,) = of_k.values()
                hidden = (12288 if slices == 3 else 4096) if outputs else wide
                assert triton_utils.get_lora_op_configs(op, 9, int(tokens), hidden, 16, slices, add_inputs=inputs) == config
                assert triton_utils.get_lora_op_configs(op, 9, int(tokens), hidden // 2, 16, slices, add_inputs=inputs) == config, "over two GPUs"
                assert list(of_shape) == (["16"] if outputs else [str(wide)]) and list(of_k) == ([str(hidden)] if outputs else ["16"])
                assert config["block_k"] * config.get("split_k", 1) <= 16384 and 16 % config["block_n"] == 0 if op == "shrink" else config["block_k"] == 16


@pytest.mark.timeout(300)  # the interpreter is slow on a busy machine
def test_our_kernel_takes_the_place_of_vllms():
    """vLLM's GPU wrapper and what it says of each token's adapter are the real ones; the kernel is interpreted."""
    run = subprocess.run([sys.executable, "-m", "tests.serving.interpreted_lora", "--vllm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    cases = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(cases) > 3 and [case for case in cases if case["far"] > 1e-5] == []


def test_adapters_are_begun_before_the_base_and_ended_after_it():
    """torch.compile keeps the order, without which they would wait for the base; copies nothing; and leaves what one reader adds to the kernel of that reader."""
    run = subprocess.run([sys.executable, "-m", "tests.serving.interpreted_lora", "--order"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    calls = json.loads(run.stdout.splitlines()[-1])
    steps = [name.removeprefix("tuneserve_") for name, _ in calls]
    layer = ["lora_begin", "product", "lora_end_onto", "read", "lora_begin", "product", "lora_end", "read"]
    assert ["read" if "cpp_fused" in name else name for name in steps] == ["read", *layer * 2]
    for begin in (place for place, name in enumerate(steps) if name == "lora_begin"):
        (change, x, *_), (_, *ended), (_, read) = calls[begin][1], calls[begin + 2], calls[begin + 3]
        assert {change, x} <= set(*ended) and (change in read) == (steps[begin + 2] == "lora_end")


def test_what_our_kernel_does_not_take_goes_to_vllms_two_operators():
    meta = [
        "token_lora_mapping",
        "token_indices_sorted_by_lora_ids",
        "num_tokens_per_lora",
        "lora_token_start_loc",
        "lora_ids",
        "no_lora_flag_cpu",
        "num_active_loras",
    ]
    assert list(inspect.signature(lora_shrink_op._lora_shrink).parameters) == ["inputs", "lora_a_weights", "output_tensor", *meta, "scaling"]
    assert list(inspect.signature(lora_expand_op._lora_expand).parameters) == ["inputs", "lora_b_weights", "output_tensor", *meta, "offset_start", "add_inputs"]
    ours = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
    assert list(inspect.signature(PunicaWrapperGPU.add_lora_linear).parameters) == ours
    assert list(inspect.signature(BaseLinearLayerWithLoRA._apply_sync).parameters) == ["self", "x", "bias"]
    assert "VLLM_PLUGINS" in envs.compile_factors(), "a cached graph without our operator is not taken for one with it"


def test_recipes_offer_vllms_ways_to_quantize_while_loading():
    offered = {name for name in get_args(get_args(ServingRecipe.model_fields["quantization"].annotation)[0])}
    assert offered <= set(ONLINE_QUANT_SHORTHAND_NAMES)
    with pytest.raises(ValueError, match="no longer supports online"):  # why plain `fp8` is not offered
        Fp8Config(is_checkpoint_fp8_serialized=False)


def test_requests_look_names_up_in_the_dict_that_we_write(tmp_path):
    models = serving_models(FakeClient())
    names = hooks.NameTable(models)
    serving = SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
    for version in ("1", "2"):
        names.set("catalog", {"catalog": Route("catalog", adapter(tmp_path, version))})
        found = BaseServing._maybe_get_adapters(serving, SimpleNamespace(model="catalog"))  # without our hook: vLLM's own way
        assert models.model_name(found) == adapter(tmp_path, version).engine_name
        assert (
            asyncio.run(
                BaseServing._check_model(
                    SimpleNamespace(models=models, request_logger=None, _is_model_supported=models.is_base_model), SimpleNamespace(model="catalog")
                )
            )
            is None
        )
    assert BaseServing._maybe_get_adapters(serving, SimpleNamespace(model="glm-4.5v")) is None


def test_loading_goes_through_the_engine_clients_own_method(tmp_path):
    assert list(inspect.signature(EngineClient.add_lora).parameters) == ["self", "lora_request"]
    client = FakeClient()
    client.fault = Exception("Call to add_lora method failed: rank 64")
    with pytest.raises(ServingError, match=r"vLLM refused the adapter: .*rank 64"):
        asyncio.run(VllmEngine(client, client.generate).load(adapter(tmp_path, "1")))


def test_an_adapter_is_read_before_it_is_loaded_and_what_was_not_loaded_is_let_go(tmp_path):
    client, served = FakeClient(), adapter(tmp_path, "1")
    engine = VllmEngine(client, client.generate)
    asyncio.run(engine.load(served))
    look = ("tuneserve_adapter_is_read", served.lora_id)
    read = ("tuneserve_read_adapter", served.engine_name, served.lora_id, str(served.folder), served.fused_experts)
    assert client.calls == [read, look, look, ("add_lora", served.lora_id)]
    asyncio.run(engine.load(served))
    assert client.calls[4:] == [("add_lora", served.lora_id)]  # it is there
    asyncio.run(engine.unload(served.lora_id))
    assert client.calls[5:] == [("tuneserve_forget_read", served.lora_id)]


def test_lora_request_carries_name_number_and_folder(tmp_path):
    request = hooks.lora_request(adapter(tmp_path, "1"))
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
        assert http.get("/adapters/ready", headers=shown).json() == {"ready": True, "waits_for": {}}
        body, signed = new_hint("sesame", "catalog", "champion", "1")
        for answer in (http.get("/adapters", headers=shown), http.post("/adapters/sync", content=body, headers=signed)):
            status = answer.json()
            assert status["base_models"] == ["glm-4.5v"] and status["models"]["catalog"]["live"]["version"] == "1"
            assert "cannot be reached" in status["mlflow_error"] and status["pid"] > 0
        assert http.post("/adapters/sync", content=body, headers=signed).status_code == 401  # once
        assert http.post("/adapters/sync", content=b"x" * 100_000, headers=signed).status_code == 413


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "sesame", "Basic sesame", "Bearer \xe9"])
def test_every_adapters_route_asks_for_the_token(app, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with TestClient(app) as http:
        for method, path in (("GET", "/adapters"), ("GET", "/adapters/ready"), ("POST", "/adapters/sync"), ("POST", "/adapters/parity")):
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"]


def test_not_ready_before_vllm_made_our_state(app):
    shown = {"Authorization": "Bearer sesame"}
    http = TestClient(app)  # outside `with`, nothing is started
    for path in ("/adapters/ready", "/adapters"):
        assert http.get(path, headers=shown).status_code == 503
    body, signed = new_hint("sesame", "catalog", "champion", "1")
    assert http.post("/adapters/sync", content=body, headers=signed).status_code == 503
    assert http.post("/adapters/parity", json={}, headers=shown).status_code == 503


def test_the_parity_route_scores_an_answer_for_base_and_adapter_and_holds_the_adapter_meanwhile(app, monkeypatch):
    asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "answer_tokens": [8, 9]}
    follower = app.state.endpoint_plugins[0]
    held = []
    whole = VllmEngine.score

    async def score(engine, adapter, prompt, answer):
        lora_id = hooks.lora_request(follower._names.get("catalog").adapter).lora_int_id
        held.append(follower._traffic.may_mean(lora_id, time.monotonic()))
        return await whole(engine, adapter, prompt, answer)

    monkeypatch.setattr(VllmEngine, "score", score)
    with TestClient(app) as http:
        shown = {"Authorization": "Bearer sesame"}
        tuned = http.post("/adapters/parity", json={"model": "catalog/1", **asked}, headers=shown).json()
        base = http.post("/adapters/parity", json={"model": "glm-4.5v", **asked}, headers=shown).json()
        for unknown in ("catalog/2", "nothing"):
            assert http.post("/adapters/parity", json={"model": unknown, **asked}, headers=shown).status_code == 422
    assert held == [True, True, False, False] and not follower._traffic._open
    assert tuned["prompt_tokens"] == [1, 2, 3] and tuned["texts"] == {"1": "[1]", "2": "[2]", "3": "[3]", "8": "[8]", "9": "[9]"}
    assert tuned["digest"] == follower._names.get("catalog").adapter.digest and base["digest"] is None
    assert tuned["base"] == base["base"] == base["adapter"] == [-1.0, -1.0] and tuned["adapter"][0] < -1.0
    metrics = generate_latest(follower._metrics._registry).decode()
    assert "tuneserve_requests_total{" not in metrics, "what we ask ourselves is nobody's traffic"


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


@pytest.mark.parametrize(("redact", "ends"), [(None, False), ("nowhere.redact", True)])
def test_sampling_starts_with_the_server_or_ends_its_start(tmp_path, monkeypatch, redact, ends):
    (tmp_path / "token").write_text("sesame\n")
    sampling = {"folder": str(tmp_path / "s/a"), "share": 0.5, "keep_days": 1, "keep_images": False, "max_bytes": 10**6, "redact": redact}
    settings = {"mlflow_uri": "http://127.0.0.1:9", "models": [], "base_revision": "b", "template_digest": "t", "sampling": sampling}
    (tmp_path / "follower.json").write_text(json.dumps({**settings, "state_dir": str(tmp_path / "state"), "token_file": str(tmp_path / "token")}))
    monkeypatch.setenv("TUNESERVE_FOLLOWER", str(tmp_path / "follower.json"))
    registry = CollectorRegistry()
    monkeypatch.setattr(plugin, "get_prometheus_registry", lambda: registry)
    app = FastAPI()
    app.state.args = Namespace(enable_lora=True, api_server_count=None)
    if ends:
        with pytest.raises(ServingError, match=r"nowhere\.redact cannot be imported"):
            plugin.AdapterFollower().attach_router(app)
        return
    plugin.AdapterFollower().attach_router(app)
    assert 'tuneserve_samples_total{outcome="busy"} 0.0' in generate_latest(registry).decode()
    assert next(each for each in app.user_middleware if each.cls is hooks.Tracing).kwargs["sampler"] is not None


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


def shrunk_and_expanded(slots):
    """What one batch of two tokens of the base and three of slot 0 gets from adapters in `slots`."""
    torch.manual_seed(1)
    tokens, index, lengths = torch.randn(5, 6), torch.tensor([-1, 0]), torch.tensor([2, 3])
    a, b = torch.randn(slots, 1, 4, 6), torch.randn(slots, 1, 7, 4)
    layout = (torch.tensor([0, 2]), lengths, index, 2, 3, 5)
    buffer, out = torch.zeros(5, 4), torch.zeros(5, 7)
    punica_cpu.sgmv_shrink(tokens, a, buffer, *layout, 1.0)
    punica_cpu.sgmv_expand(buffer, b, out, *layout, True)
    return out, tokens[2:] @ a[0, 0].T @ b[0, 0].T


def test_base_tokens_beside_an_adapters_get_nothing_of_the_last_slot(monkeypatch):
    for module in (lora_ops, punica_cpu):
        monkeypatch.setattr(module, "bgmv_shrink", getattr(module.bgmv_shrink, "__wrapped__", module.bgmv_shrink))
    out, _ = shrunk_and_expanded(slots=2)
    assert out[:2].abs().max() > 0.1, "vLLM has mended it: cpu_lora.py can go"
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    for _ in range(2):
        cpu_lora.register()
        out, wanted = shrunk_and_expanded(slots=2)
        assert torch.equal(out[:2], torch.zeros(2, 7)) and torch.allclose(out[2:], wanted, atol=1e-5)
    assert punica_cpu.bgmv_shrink is lora_ops.bgmv_shrink


def chosen(serving, **request):
    return BaseServing._maybe_get_adapters(serving, SimpleNamespace(**request))


@pytest.fixture
def hooked(tmp_path):
    """A table of names whose routes every request chooses by, and what vLLM hands to the hook."""
    models = serving_models(FakeClient())
    names = hooks.NameTable(models)
    hooks.choose_adapters(names, models)
    yield names, SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
    BaseServing._maybe_get_adapters = BaseServing._maybe_get_adapters.__wrapped__


def test_every_kind_of_serving_chooses_through_the_method_that_we_replace():
    assert list(inspect.signature(BaseServing._maybe_get_adapters).parameters) == ["self", "request", "supports_default_mm_loras"]
    for kind in (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses):
        assert kind._maybe_get_adapters is BaseServing._maybe_get_adapters
        assert "self._maybe_get_adapters(request" in inspect.getsource(inspect.getmodule(kind))
        assert "self.engine_client.generate(" in inspect.getsource(inspect.getmodule(kind))
    assert "user" in ChatCompletionRequest.model_fields and "user" in CompletionRequest.model_fields


def test_requests_choose_by_our_routes(hooked, tmp_path):
    names, serving = hooked
    champion, candidate = adapter(tmp_path, "1"), adapter(tmp_path, "2")
    names.set("catalog", {"catalog": Route("catalog", champion, candidate, 0.5), "catalog/2": Route("catalog", candidate)})
    sides = {user: chosen(serving, model="catalog", user=user).lora_name for user in map(str, range(50))}
    assert set(sides.values()) == {champion.engine_name, candidate.engine_name}
    assert all(chosen(serving, model="catalog", user=user).lora_name == side for user, side in sides.items())
    assert chosen(serving, model="catalog/2").lora_name == candidate.engine_name
    assert chosen(serving, model="glm-4.5v") is None
    with pytest.raises(VLLMNotFoundError):
        chosen(serving, model="catalog/3")
    names.set("catalog", {"catalog": Route("catalog", champion, off="it is off", fallback="base")})
    assert chosen(serving, model="catalog") is None and "catalog/2" not in serving.models.lora_requests
    names.set("catalog", {"catalog": Route("catalog", champion, off="it is off")})
    with pytest.raises(GracefulHTTPError) as off:
        chosen(serving, model="catalog")
    answer = create_error_response(off.value)
    assert (answer.error.code, answer.error.message) == (403, "it is off")


def test_a_request_without_a_name_stays_on_the_side_that_it_drew(hooked, tmp_path):
    names, serving = hooked
    names.set("catalog", {"catalog": Route("catalog", adapter(tmp_path, "1"), adapter(tmp_path, "2"), 0.5)})
    drawn = set()
    for _ in range(50):
        request = Request()
        token = hooks.REQUEST.set(request)
        sides = {chosen(serving, model="catalog").lora_name for _ in range(5)}
        hooks.REQUEST.reset(token)
        assert len(sides) == 1 and request.chosen and request.served == "catalog" and request.version in ("1", "2")
        drawn |= sides
    assert len(drawn) == 2
    token = hooks.REQUEST.set(Request(key="ann"))
    assert len({chosen(serving, model="catalog").lora_name for _ in range(20)}) == 1  # by the sticky header
    hooks.REQUEST.reset(token)


@pytest.mark.parametrize(
    ("fault", "finish"), [(RuntimeError("no"), "error"), (VLLMValidationError("too long"), "invalid"), (ValueError("too long"), "invalid")]
)
def test_a_generation_that_fails_is_the_clients_fault_or_ours_as_the_answers_status_says(tmp_path, fault, finish):
    client, metrics = FakeClient(), Metrics(CollectorRegistry())

    async def broken(*args, **kwargs):
        raise fault
        yield

    client.generate = broken
    hooks.watch_generations(client, Traffic(2), metrics)
    lora = hooks.lora_request(adapter(tmp_path, "1"))
    token = hooks.REQUEST.set(Request(chosen=True, lora_id=lora.lora_int_id, served="catalog", version="1"))

    async def scenario():
        with pytest.raises(type(fault)):
            await anext(client.generate({"prompt_token_ids": [1]}, None, "id", lora_request=lora))

    asyncio.run(scenario())
    hooks.REQUEST.reset(token)
    assert f'tuneserve_requests_total{{finish="{finish}",served="catalog",version="1"}} 1.0' in generate_latest(metrics._registry).decode()


def test_generations_are_counted_and_measured_however_they_end(tmp_path):
    client, traffic, metrics = FakeClient(), Traffic(2), Metrics(CollectorRegistry())
    assert "generate" in dir(EngineClient)
    hooks.watch_generations(client, traffic, metrics)
    lora = hooks.lora_request(adapter(tmp_path, "1"))
    hooks.REQUEST.set(Request(chosen=True, lora_id=lora.lora_int_id, served="catalog", version="1"))

    def generate():
        return client.generate({"prompt_token_ids": [1, 2, 3]}, None, "id", lora_request=lora)

    async def scenario():
        outputs = [output async for output in generate()]
        assert outputs[0].finished and traffic.running(lora.lora_int_id) == 0
        never_read = generate()
        assert traffic.running(lora.lora_int_id) == 1
        del never_read
        assert traffic.running(lora.lora_int_id) == 0
        left = generate()
        await anext(left)
        await left.aclose()
        assert traffic.running(lora.lora_int_id) == 0

    asyncio.run(scenario())
    hooks.REQUEST.set(None)
    shown = generate_latest(metrics._registry).decode()
    for line in (
        'tuneserve_requests_total{finish="stop",served="catalog",version="1"} 2.0',
        'tuneserve_requests_total{finish="abort",served="catalog",version="1"} 1.0',
        'tuneserve_prompt_tokens_total{served="catalog",version="1"} 6.0',
        'tuneserve_output_tokens_total{served="catalog",version="1"} 4.0',
        'tuneserve_engine_time_to_first_token_seconds_sum{served="catalog",version="1"} 0.5',
        'tuneserve_time_per_output_token_seconds_sum{served="catalog",version="1"} 1.0',
        'tuneserve_slot_misses_total{served="catalog",version="1"} 1.0',
    ):
        assert line in shown


DROPPED = CompletionOutput(0, "", [], None, None, finish_reason="error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("drops", "status", "finish"), [(0, 200, "stop"), (1, 200, "stop"), (2, 500, "error")])
def test_what_the_engine_drops_before_a_token_is_asked_once_more(stream, drops, status, finish):
    client, metrics = FakeClient(), Metrics(CollectorRegistry())
    generate, left, bodies = client.generate, [DROPPED] * drops, []

    async def dropping(prompt, sampling_params, request_id, **kwargs):
        async for output in generate(prompt, sampling_params, request_id, **kwargs):
            yield RequestOutput(request_id, None, [1], None, [left.pop()], True) if left else output

    client.generate = dropping
    hooks.watch_generations(client, Traffic(2), metrics)
    app = FastAPI()
    hooks.install(app, Traffic(2), metrics, None)

    @app.post("/v1/chat/completions")
    async def answer(request: HttpRequest):
        bodies.append(await request.body())
        hooks.REQUEST.get().served, hooks.REQUEST.get().version = "catalog", "1"
        outputs = [output.outputs[0] async for output in client.generate({"prompt_token_ids": [1, 2]}, None, "id")]
        failed = outputs[-1].finish_reason == "error"
        if not stream:
            return JSONResponse({"error": {}} if failed else {"text": outputs[-1].text}, 500 if failed else 200)
        events = ["data: role\n\n", "data: error\n\n" if failed else f"data: {outputs[-1].text}\n\n"]
        return StreamingResponse(iter(events), 500 if failed else 200, media_type="text/event-stream")

    found = TestClient(app).post("/v1/chat/completions", content=b"a" * 100_000)
    assert found.status_code == status
    whole = "data: role\n\ndata: x\n\n" if stream else '{"text":"x"}'
    assert (found.text == whole) == (status == 200)
    assert bodies == [b"a" * 100_000] * min(drops + 1, 2)
    shown = generate_latest(metrics._registry).decode()
    assert [line for line in shown.splitlines() if line.startswith("tuneserve_requests_total{")] == [
        f'tuneserve_requests_total{{finish="{finish}",served="catalog",version="1"}} 1.0'
    ]
    assert ("tuneserve_http_errors_total{" in shown) == (status == 500)


def test_a_picture_that_the_engine_lacks_ends_its_request_without_a_token():
    engine = SimpleNamespace(output_queue=queue.Queue(), engine_index=0)
    EngineCoreProc._handle_mm_cache_miss(engine, SimpleNamespace(request_id="r", client_index=0), MultiModalCacheMissError(["h"]))
    _, outputs = engine.output_queue.get_nowait()
    dropped = outputs.outputs[0]
    assert dropped.finish_reason == FinishReason.ERROR and str(dropped.finish_reason) == "error" and dropped.new_token_ids == []
    assert "mm_processor_cache.invalidate" in inspect.getsource(AsyncLLM._run_output_handler)  # so that the second time the picture goes along


@pytest.fixture
def sampled(tmp_path, hooked):
    """A client of vLLM's kind of application whose answers, made by vLLM's own types, are sampled; what was sampled of each; and how much was."""
    names, serving = hooked
    names.set("catalog", {name: Route("catalog", adapter(tmp_path, "1")) for name in ("catalog", "catalog/1")})
    metrics = Metrics(CollectorRegistry())
    sampler = Sampler(SamplingSettings(folder=tmp_path / "s/a", share=1, keep_days=1, keep_images=True, max_bytes=10**6), metrics.sampled)
    sampler.start()
    app = FastAPI()
    hooks.install(app, Traffic(2), metrics, None, sampler)

    @app.post(SAMPLED_PATH)
    async def answer(request: ChatCompletionRequest):
        lora = BaseServing._maybe_get_adapters(serving, request)
        model = lora.lora_name if lora else request.model
        if not request.stream:
            choice = ChatCompletionResponseChoice(index=0, message=ChatMessage(role="assistant", content="Azul tote"), finish_reason="stop")
            return JSONResponse(ChatCompletionResponse(model=model, choices=[choice], usage=UsageInfo()).model_dump())

        async def events():
            for text, finish in (("Azul", None), (" tote", None), ("", "stop")):
                choice = ChatCompletionResponseStreamChoice(index=0, delta={"content": text}, finish_reason=finish)
                event = ChatCompletionStreamResponse(id="chatcmpl-1", model=model, choices=[choice])
                yield f"data: {event.model_dump_json(exclude_unset=True)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def outcomes():
        found = {each.labels["outcome"]: each.value for each in next(iter(metrics.samples.collect())).samples if each.name.endswith("_total")}
        return found

    def wait(count):
        deadline = time.monotonic() + 20
        while sum(outcomes().values()) < count:
            assert time.monotonic() < deadline, outcomes()
            time.sleep(0.01)
        return outcomes(), [each for each, _ in read_samples(tmp_path / "s")]

    return TestClient(app), wait


def test_what_vllm_answers_is_sampled_whole_and_without_what_the_request_says_beside_its_messages(sampled):
    http, wait = sampled
    turns = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}, {"type": "text", "text": "What?"}]}]
    secret = {"Authorization": "Bearer sk-secret", "X-Api-Key": "sk-secret", "Cookie": "sk-secret"}
    for model, stream in (("catalog", False), ("catalog", True), ("catalog/1", False), ("glm-4.5v", False)):
        body = {"model": model, "messages": turns, "stream": stream, "user": "sk-secret"}
        assert http.post(SAMPLED_PATH, json=body, headers=secret).status_code == 200
    assert http.post(SAMPLED_PATH, json={"model": "catalog"}, headers=secret).status_code == 422
    outcomes, samples = wait(2)
    assert outcomes == {"kept": 2.0} and len(samples) == 2
    for sample in samples:
        assert (sample.answer, sample.finish, sample.question, sample.name) == ("Azul tote", "stop", "<image>What?", "catalog")
        assert sample.answered_by.startswith("catalog/1@") and sample.answer_id.startswith("chatcmpl-") and "secret" not in sample.model_dump_json()


def test_the_sampled_path_is_where_vllm_answers_chats():
    assert SAMPLED_PATH in [route.path for route in chat_router.routes]


def test_fingerprint_asks_for_what_vllm_gives(tmp_path):
    client = FakeClient()
    engine = VllmEngine(client, client.generate)
    base, tuned = asyncio.run(engine.fingerprint(None)), asyncio.run(engine.fingerprint(adapter(tmp_path, "1")))
    assert base == (-1.0, -1.0, -1.0) and tuned != base and len(tuned) == 3 and len(PROMPT.split()) > 15
    source = inspect.getsource(AsyncLLM.generate)
    assert "lora_request" in source and "prompt_logprobs" in inspect.getsource(SamplingParams)
    assert SamplingParams(prompt_logprobs=1).skip_reading_prefix_cache  # so that a fingerprint is never of cached work


def test_vllms_own_adapter_gauge_is_the_one_that_we_clear():
    assert f'name="{VLLM_LORA_INFO}"' in inspect.getsource(loggers)
