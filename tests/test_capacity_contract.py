"""Parameters by module against transformers' own models, made on torch's meta device; adapters against peft's."""

import copy
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from pipeline import basemodel, parameters, tinyglm
from pipeline.capacity import TINY_CONFIG
from pipeline.parameters import Parameters, read_architecture
from pipeline.training import target_modules
from pipeline.training_memory import adapter_parameters
from tests.planning import ATTENTION, EXPERTS, GLM_4_5V, finetune

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.contract
PLACES = (
    ("visual.merger.", "merger"), ("visual.", "vision_tower"), ("embed_tokens.", "embeddings"), ("lm_head.", "lm_head"), ("norm", "norms"),
    ("self_attn.", "attention"), (".shared_expert", "shared_experts"), (".experts.", "routed_experts"), ("mlp.gate.", "router"), ("mlp.", "dense_mlp"),
)  # fmt: skip
"""The first that stands in a parameter's name says where it is counted."""


def counted(model: "torch.nn.Module") -> Parameters:
    found: Counter[str] = Counter(dict.fromkeys((place for _, place in PLACES), 0))
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))]
    for name, tensor in named:
        found[next(place for part, place in PLACES if part in name)] += tensor.numel()
    return Parameters(**found)


def on_meta(config: Any) -> "torch.nn.Module":
    import torch
    from transformers import AutoModelForCausalLM, Glm4vMoeForConditionalGeneration

    with torch.device("meta"):
        return Glm4vMoeForConditionalGeneration(config) if config.model_type == "glm4v_moe" else AutoModelForCausalLM.from_config(config)


def test_glm_4_5v_is_counted_exactly() -> None:
    from transformers import Glm4vMoeConfig

    assert asdict(counted(on_meta(Glm4vMoeConfig(**copy.deepcopy(GLM_4_5V))))) == asdict(read_architecture(GLM_4_5V, "c").parameters)


def test_the_tiny_one_is_counted_exactly_and_its_shipped_sizes_are_what_is_made() -> None:
    config = tinyglm.make_config(tinyglm.make_processor(basemodel.TEMPLATE_FILE.read_text("utf-8")).tokenizer)
    made = read_architecture(config.to_dict(), "made")
    shipped = parameters.read_config(TINY_CONFIG)
    assert (shipped.decoder, shipped.vision) == (made.decoder, made.vision)
    assert asdict(counted(on_meta(config))) == asdict(made.parameters)


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}


@pytest.mark.parametrize(
    "sizes",
    [
        {"model_type": "llama", **SMALL},
        {"model_type": "llama", **SMALL, "tie_word_embeddings": True, "head_dim": 32},
        {"model_type": "qwen2", **SMALL},
        {"model_type": "qwen3", **SMALL, "head_dim": 32},
        {"model_type": "qwen3_moe", **SMALL, **ROUTED, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
        {"model_type": "qwen2_moe", **SMALL, **ROUTED, "num_experts": 8, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
        {
            "model_type": "glm4_moe",
            **SMALL,
            **ROUTED,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
            "use_qk_norm": True,
            "n_group": 1,
        },
    ],
    ids=lambda sizes: sizes["model_type"],
)
def test_other_decoders_are_counted_exactly(sizes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**copy.deepcopy(sizes))
    assert asdict(counted(on_meta(config))) == asdict(read_architecture(config.to_dict(), "c").parameters)


@pytest.mark.parametrize(
    "lora",
    [{}, {"layers": (1, 2)}, {"target_modules": (*ATTENTION, *EXPERTS), "rank": 4}, {"freeze_vit": False, "freeze_aligner": False}],
    ids=["attention", "layers", "experts", "vision"],
)
def test_adapters_are_counted_exactly(lora: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = tinyglm.make_config(tinyglm.make_processor(basemodel.TEMPLATE_FILE.read_text("utf-8")).tokenizer)
    recipe = finetune(lora=lora)
    adapted = get_peft_model(tinyglm.make_model(config), LoraConfig(r=recipe.lora.rank, target_modules=target_modules(recipe.lora)))
    trainable = sum(tensor.numel() for tensor in adapted.parameters() if tensor.requires_grad)
    assert adapter_parameters(read_architecture(config.to_dict(), "c"), recipe) == trainable
