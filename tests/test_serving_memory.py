"""Serving memory against what vLLM 0.26 said on H200s, and how the pieces are shared out."""

import pytest

from pipeline.gpus import GIB, Gpu, known_gpu
from pipeline.recipe import ServedLora
from pipeline.serving_memory import captured_sizes, graph_sizes, kv_token_bytes, parallel_faults, serving_memory, slot_bytes, step_defaults
from tests.planning import ALL_SERVED, glm, serving

H200 = known_gpu("h200-141gb")
NO_SLOTS = {"max_loras": 1, "max_rank": 1}
"""As good as the server without a LoRA engine that was measured."""


def test_fp8_on_one_h200_leaves_the_kv_cache_that_was_measured() -> None:
    """Weights are arithmetic; the KV cache is what RUNTIME_BYTES was fitted on, so that it tells only that nothing else moved."""
    memory = serving_memory(glm(), serving(NO_SLOTS, quantization="fp8_per_tensor"), H200)
    assert memory.weights / GIB == pytest.approx(101.6, rel=0.001)
    assert (memory.budget - memory.total) / GIB == pytest.approx(24.3, rel=0.01)
    assert memory.kv_tokens == pytest.approx(138_640, rel=0.01)


def test_bf16_on_two_h200_leaves_the_kv_cache_that_was_measured() -> None:
    """As above, fitted with PARALLEL_BYTES; what vLLM calls the model's memory has the adapter slots in it."""
    graphs = {"graph_tokens": 1024, "picture_graphs": True, "max_num_batched_tokens": 1024, "max_num_seqs": 64}
    memory = serving_memory(glm(), serving({"max_loras": 8}, tensor_parallel_size=2, **graphs), H200)
    assert (memory.weights + memory.adapter_slots) / GIB == pytest.approx(100.8, rel=0.001)
    assert memory.kv_tokens == pytest.approx(287_856, rel=0.01)


@pytest.mark.parametrize(("modules", "measured_gib"), [(("qkv_proj", "o_proj"), 0.06), (ALL_SERVED, 2.93)])
def test_an_adapter_slot_is_as_large_as_measured(modules: tuple[str, ...], measured_gib: float) -> None:
    assert slot_bytes(glm(), ServedLora(target_modules=modules)) / GIB == pytest.approx(measured_gib, rel=0.02)


def test_four_slots_for_experts_take_what_was_measured() -> None:
    memory = serving_memory(glm(), serving({"max_loras": 4, "target_modules": ALL_SERVED}, quantization="fp8_per_tensor"), H200)
    assert memory.adapter_slots / GIB == pytest.approx(11.7, rel=0.01)


def test_slots_over_four_gpus() -> None:
    """34 MB and 2.46 GB a slot were calculated before from vLLM's shapes; whole experts per GPU take a quarter."""
    assert slot_bytes(glm(), ServedLora(), 4) == pytest.approx(34e6, rel=0.01)
    experts = ServedLora(target_modules=("experts",))
    assert slot_bytes(glm(), experts, 4) == pytest.approx(2.46e9, rel=0.01)
    assert slot_bytes(glm(), experts, 4, expert_parallel=True) == slot_bytes(glm(), experts) // 4


def test_a_slot_is_as_large_as_the_highest_rank_however_modules_are_called() -> None:
    assert slot_bytes(glm(), ServedLora(max_rank=32)) == 2 * slot_bytes(glm(), ServedLora(max_rank=16))
    assert slot_bytes(glm(), ServedLora(target_modules=("self_attn.qkv_proj", "o_proj"))) == slot_bytes(glm(), ServedLora())


def test_kv_cache_of_a_token() -> None:
    decoder = glm().decoder
    assert [kv_token_bytes(decoder, ways) for ways in (1, 4, 8, 16)] == [188_416, 47_104, 23_552, 23_552]


def test_the_whole_vision_tower_on_each_gpu_takes_what_the_schema_says() -> None:
    shared, whole = (serving_memory(glm(), serving(tensor_parallel_size=4, vision_data_parallel=data), H200) for data in (False, True))
    assert (whole.weights - shared.weights) / GIB == pytest.approx(1.2, rel=0.05)


def test_defaults_follow_the_gpu_as_vllms_do() -> None:
    kinds = {"rtx-4090-24gb": (2048, 256), "a100-80gb": (2048, 256), "h100-80gb": (8192, 1024), "b200-180gb": (16384, 1024)}
    assert {name: step_defaults(known_gpu(name)) for name in kinds} == kinds
    recipe = serving(max_num_batched_tokens=None, max_num_seqs=None, quantization="fp8_per_tensor")
    large, small = (serving_memory(glm(), recipe, Gpu(name, 139 * GIB, "")) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
    assert large.activations > 3 * small.activations


def test_captured_sizes_are_vllms() -> None:
    assert [captured_sizes(largest) for largest in (1, 64, 256, 512)] == [1, 11, 35, 51]


def test_graphs_for_prompts_are_planned() -> None:
    assert graph_sizes(20, 64) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(96, 20) == [1, 2, 4, 8, 16, 20, 64, 96]
    assert graph_sizes(64, 64) == [1, 2, 4, *range(8, 65, 8)]
    assert graph_sizes(300, 8) == [1, 2, 4, 8, 64, 128, 192, 256, 300]
    assert graph_sizes(1024, None)[-13:] == [256, *range(320, 1025, 64)] and max(graph_sizes(1024, 2048)) == 1024


@pytest.mark.parametrize(
    ("quantization", "step_tokens", "kv_gib"), [("fp8_per_tensor", 8192, 21.97), ("fp8_per_tensor", 1024, 24.14), ("fp8_per_channel", 512, 23.86)]
)
def test_a_server_with_graphs_for_prompts_and_pictures_is_as_large_as_measured(quantization: str, step_tokens: int, kv_gib: float) -> None:
    """vLLM 0.26 on one H200, 46 layers: what was left for the KV cache. Its graphs took 1.45 GiB in the first two, 1.07 in the last."""
    settings = {"quantization": quantization, "max_num_seqs": 64, "max_num_batched_tokens": step_tokens, "gpu_memory_utilization": 0.92}
    without, planned = (
        serving_memory(glm(), serving({"max_loras": 8}, **settings, **graphs), H200)
        for graphs in ({}, {"graph_tokens": min(1024, step_tokens), "picture_graphs": True})
    )
    assert without.cuda_graphs < planned.cuda_graphs < 1.45 * GIB
    assert planned.total == pytest.approx(planned.budget - kv_gib * GIB, rel=0.015)


def test_what_cannot_be_shared_out_is_named() -> None:
    assert parallel_faults(glm(), serving(tensor_parallel_size=4)) == []
    assert "vision_data_parallel" in " ".join(parallel_faults(glm(), serving(tensor_parallel_size=8)))
    assert parallel_faults(glm(), serving(tensor_parallel_size=8, vision_data_parallel=True)) == []
    assert [fault.split(":")[0] for fault in parallel_faults(glm(), serving(tensor_parallel_size=5, vision_data_parallel=True, expert_parallel=True))] == [
        "tensor_parallel_size"
    ] * 2
