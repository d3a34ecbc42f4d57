"""Training memory against every figure that was measured on a GPU, and the arithmetic of what was not."""

import pytest

from pipeline.gpus import GIB, known_gpu
from pipeline.training_memory import NF4_BYTES, adapter_parameters, training_memory
from tests.planning import ATTENTION, EXPERTS, finetune, glm

VISION = {"freeze_vit": False, "freeze_aligner": False}
FUSED = {"target_modules": (*ATTENTION, *EXPERTS)}


WHOLE = {"row_weights": True}
"""Logits as transformers makes them, not in chunks."""
OFFLOADED = {"offload_checkpoints": True}


@pytest.mark.parametrize(
    ("tokens", "how", "measured_gib", "bound_by"),
    [
        (2048, WHOLE, 61.1, "layer"),
        (8192, WHOLE, 72.0, "logits"),
        (2048, {}, 60.88, "layer"),
        (8192, {}, 65.76, "layer"),
        (16384, {}, 72.23, "layer"),
        (2048, OFFLOADED, 60.28, "layer"),
        (8192, OFFLOADED, 63.09, "layer"),
        (16384, OFFLOADED, 66.84, "layer"),
        (32768, OFFLOADED, 74.33, "layer"),
    ],
)
def test_a_qlora_step_at_full_depth_peaks_as_measured(tokens: int, how: dict[str, bool], measured_gib: float, bound_by: str) -> None:
    """One H100 80GB, experts and linears in nested NF4, attention adapters of rank 16, checkpointing, text only (docs/benchmarks.md)."""
    memory = training_memory(glm(), finetune("nf4", max_length_tokens=tokens, **how), image_tokens=0)
    assert memory.weights / GIB == pytest.approx(54.7, rel=0.001)
    assert memory.allocated / GIB == pytest.approx(measured_gib, rel=0.01)
    assert memory.bound_by == bound_by
    assert memory.total < known_gpu("h100-80gb").bytes


def test_a_qlora_step_of_16384_tokens_runs_out_of_memory_in_the_logits() -> None:
    memory = training_memory(glm(), finetune("nf4", max_length_tokens=16384, **WHOLE), image_tokens=0)
    assert memory.bound_by == "logits"
    assert memory.at_loss / 3 / GIB == pytest.approx(9.25, rel=0.001)  # the float32 tensor that could not be allocated
    assert memory.total - memory.at_loss < known_gpu("h100-80gb").bytes < memory.total


def test_weights_of_four_layers_in_nf4() -> None:
    memory = training_memory(glm(4), finetune("nf4", max_length_tokens=2048))
    assert memory.weights / GIB == pytest.approx(7.4, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "lora", "tokens", "checkpointing", "image_tokens", "measured_gib"),
    [
        (1, {}, 8192, True, 0, 18.516),
        (6, {}, 2048, True, 0, 29.906),
        (6, {}, 8192, True, 0, 40.689),
        (6, {}, 2048, False, 0, 32.877),
        (6, {}, 8192, False, 0, 52.526),
        (6, {}, 4096, True, 2048, 33.550),
        (3, VISION, 4096, True, 0, 20.304),
        (3, VISION, 4096, True, 2048, 21.225),
        (3, VISION, 4096, True, 3840, 21.981),
        (3, VISION, 4096, False, 2048, 34.719),
        (3, FUSED, 2048, True, 0, 20.597),
        (3, FUSED, 8192, True, 0, 28.271),
        (3, FUSED, 2048, False, 0, 27.782),
    ],
)
def test_lora_peaks_of_few_layers_are_as_measured(
    layers: int, lora: dict[str, object], tokens: int, checkpointing: bool, image_tokens: int, measured_gib: float
) -> None:
    """torch.cuda.max_memory_allocated in the second step; one H100, torch 2.11, transformers 5.17, bf16 base under autocast, rank 16, AdamW, micro batch 1."""
    recipe = finetune(lora=lora, max_length_tokens=tokens, gradient_checkpointing=checkpointing, **WHOLE)
    assert training_memory(glm(layers), recipe, image_tokens=image_tokens).allocated / GIB == pytest.approx(measured_gib, rel=0.04)


def test_adapters_have_the_parameters_that_peft_made() -> None:
    assert adapter_parameters(glm(6), finetune()) == 4_128_768
    assert adapter_parameters(glm(3), finetune(lora=VISION)) == 5_734_400
    assert adapter_parameters(glm(3), finetune(lora=FUSED)) == 81_231_872
    assert adapter_parameters(glm(), finetune(lora={"layers": (44, 45)})) == 2 * 688_128


def test_zero_splits_what_it_says() -> None:
    base = training_memory(glm(), finetune(processes=8))
    count = adapter_parameters(glm(), finetune())
    adapters = {
        "zero1": count * (2 + 2) + count * 12 // 8,
        "zero2": count * 2 + count * 2 // 8 + count * 12 // 8,
        "zero3": 2 * (count * 2 // 8) + count * 12 // 8,
    }
    for stage, bytes_per_gpu in adapters.items():
        memory = training_memory(glm(), finetune(processes=8, deepspeed=stage))
        assert memory.adapter == bytes_per_gpu
        assert memory.weights == (base.weights // 8 if stage == "zero3" else base.weights)
    gathered = training_memory(glm(), finetune(processes=8, deepspeed="zero3"))
    assert gathered.at_layer - base.at_layer == pytest.approx(3 * 4.4 * GIB, rel=0.01)  # whole layers


def test_zero3_of_sixteen_layers_peaks_as_measured() -> None:
    """Two H100, each 2,048 tokens with four pictures (docs/benchmarks.md)."""
    memory = training_memory(glm(16), finetune(processes=2, deepspeed="zero3", max_length_tokens=2048), answer_tokens=984, image_tokens=1024)
    assert memory.allocated / GIB == pytest.approx(48.54, rel=0.03)


def test_offload_moves_weights_and_optimizer_to_the_host() -> None:
    count = adapter_parameters(glm(), finetune())
    two, three = (training_memory(glm(), finetune(processes=4, deepspeed=stage)) for stage in ("zero2_offload", "zero3_offload"))
    assert two.host == count * 12
    assert three.host == count * 12 + glm().parameters.total * 2
    assert three.weights == 0 and "weights of the frozen base" not in three.items


def test_what_a_row_costs() -> None:
    one = training_memory(glm(), finetune(max_length_tokens=4096))
    whole = training_memory(glm(), finetune(max_length_tokens=4096, **WHOLE))
    assert whole.at_loss == 8 * one.at_loss  # 512 tokens at a time
    assert training_memory(glm(), finetune(max_length_tokens=4096, micro_batch_size=2, **WHOLE)).at_loss == 2 * whole.at_loss
    assert training_memory(glm(), finetune(max_length_tokens=4096, method="dpo")).kept == 2 * one.kept
    assert training_memory(glm(), finetune(max_length_tokens=4096, **WHOLE), answer_tokens=512).at_loss == whole.at_loss // 8
    assert training_memory(glm(), finetune(max_length_tokens=4096), image_tokens=4000) == one  # a frozen tower keeps nothing
    assert training_memory(glm(), finetune(max_length_tokens=4096, precision="float32")).weights == 2 * one.weights


def test_without_checkpointing_dequantized_experts_of_every_layer_stay() -> None:
    memory = training_memory(glm(), finetune("nf4", max_length_tokens=256, gradient_checkpointing=False))
    assert memory.kept > 45 * glm().decoder.experts_of_a_layer * 2


def test_nf4_takes_a_little_more_than_half_a_byte() -> None:
    assert pytest.approx(0.5159, abs=1e-4) == NF4_BYTES
