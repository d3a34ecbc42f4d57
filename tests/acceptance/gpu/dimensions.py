"""GLM-4.5V's true dimensions, and tensors that are made when they are read. Nothing here needs more than torch and transformers, so that it runs where only serving is measured."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS = ("gate_up_proj", "down_proj")
TEXT: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 10944, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552,
    "max_position_embeddings": 65536, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION: dict[str, Any] = {"depth": 24, "hidden_size": 1536, "num_heads": 12, "intermediate_size": 10944, "out_hidden_size": 4096}
"""GLM-4.5V's dimensions: transformers' defaults are others."""
TINY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048}
TINY |= {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": [0]}
TINY |= {"rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [2, 3, 3]}}
TINY_VISION: dict[str, Any] = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 128}


def true_config(layers: int, *, tiny: bool) -> Glm4vMoeConfig:
    text, vision = (TEXT | TINY, VISION | TINY_VISION) if tiny else (TEXT, VISION)
    names = dict(zip(("image_start_token_id", "image_token_id", "image_end_token_id"), (2040, 2041, 2042), strict=True)) if tiny else {}
    return Glm4vMoeConfig(text_config=text | {"num_hidden_layers": layers}, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16", **names)


@dataclass(frozen=True)
class Made:
    """A tensor of a checkpoint that is made whenever it is read, as transformers reads a slice of a safetensors file."""

    name: str
    shape: tuple[int, ...]

    def __getitem__(self, whole: object) -> torch.Tensor:
        if self.name.endswith("e_score_correction_bias"):
            return torch.zeros(self.shape, device=DEVICE)
        empty = torch.empty(self.shape, dtype=torch.bfloat16, device=DEVICE)
        if self.name.endswith("bias"):
            return empty.zero_()
        return empty.fill_(1) if "norm" in self.name else empty.normal_(0, 0.02)


def checkpoint_of(config: Glm4vMoeConfig) -> dict[str, Made]:
    """The tensors of a GLM-4.5V checkpoint, each expert's three matrices by themselves."""
    with torch.device("meta"):
        whole = Glm4vMoeForConditionalGeneration(config).state_dict()
    tensors: dict[str, Made] = {}
    for name, tensor in whole.items():
        path, _, parameter = name.rpartition(".")
        if parameter not in EXPERTS:
            tensors[name] = Made(name, tuple(tensor.shape))
            continue
        halves = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
        experts, rows, columns = tensor.shape
        for key in (f"{path}.{expert}.{half}.weight" for expert in range(experts) for half in halves):
            tensors[key] = Made(key, (rows // len(halves), columns))
    return tensors
