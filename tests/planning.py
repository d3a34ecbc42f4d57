"""GLM-4.5V's true dimensions as data of the tests' own, and recipes to plan with."""

import copy
from typing import Any

from pipeline.parameters import Architecture, read_architecture
from pipeline.recipe import FinetuneRecipe, ServingRecipe

# fmt: off
GLM_4_5V: dict[str, Any] = {
    "model_type": "glm4v_moe", "tie_word_embeddings": False,
    "text_config": {
        "model_type": "glm4v_moe_text", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 10944,
        "max_position_embeddings": 65536, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 96,
        "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
    },
    "vision_config": {
        "model_type": "glm4v_moe_vision", "attention_bias": False, "depth": 24, "hidden_size": 1536, "image_size": 336, "in_channels": 3, "intermediate_size": 10944,
        "num_heads": 12, "out_hidden_size": 4096, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}
# fmt: on
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
ALL_SERVED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts")


def glm(layers: int = 46) -> Architecture:
    """GLM-4.5V, or its first layers."""
    config = copy.deepcopy(GLM_4_5V)
    config["text_config"]["num_hidden_layers"] = layers
    return read_architecture(config, "test")


def finetune(quantization: str | None = None, lora: dict[str, Any] | None = None, method: str = "sft", **training: Any) -> FinetuneRecipe:
    files = {"train": "t.jsonl", "eval": "e.jsonl"}
    values = {"name": "shop", "base_model": "m", "dataset": files, "lora": lora or {}, "quantization": quantization, "method": method, "training": training}
    return FinetuneRecipe.model_validate(values)


def serving(lora: dict[str, Any] | None = None, **fields: Any) -> ServingRecipe:
    """As the measured servers: 8192 tokens a request and a step, CUDA graphs to 64, vLLM's own share of the GPU."""
    measured = {"max_model_len_tokens": 8192, "max_num_batched_tokens": 8192, "max_num_seqs": 32, "gpu_memory_utilization": 0.92}
    return ServingRecipe.model_validate({"name": "s", "base_model": "m", "follow": ("shop",), "lora": lora or {}, **measured, **fields})
