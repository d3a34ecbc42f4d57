"""Adapters of real PEFT for a tiny GLM-4.5V with random weights, of 2 layers: the first is dense, the second holds experts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Glm4vMoeForConditionalGeneration

from pipeline import tinyglm

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["q_proj", "gate_proj", "up_proj", "down_proj"]
KEY = "base_model.model.model.language_model.layers"
EXPERTS = 8


def make_model() -> Glm4vMoeForConditionalGeneration:
    config = tinyglm.make_config(tinyglm.make_tokenizer())
    config.text_config.num_hidden_layers = 2
    config.vision_config.depth = 1
    return tinyglm.make_model(config)


def save(model: Any, folder: Path, config: Any, dtype: torch.dtype = torch.float32, trained: bool = True, std: float = 1.0) -> Path:
    adapted = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).to(dtype)
    for name, parameter in adapted.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings)


def rename(source: Path, target: Path, new: Callable[[str], str]) -> Path:
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file({new(key): tensor for key, tensor in load_file(source / "adapter_model.safetensors").items()}, target / "adapter_model.safetensors")
    return target


def single_experts(folder: Path, count: int = EXPERTS) -> Path:
    folder.mkdir(exist_ok=True)
    sizes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    keys = [(f"{KEY}.1.mlp.experts.{number}.{name}", *size) for number in range(count) for name, size in sizes.items()]
    save_file(
        {f"{key}.lora_{part}.weight": torch.randn(shape) for key, i, o in keys for part, shape in (("A", (4, i)), ("B", (o, 4)))},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(lora(target_modules=list(sizes)).to_dict() | {"target_modules": list(sizes)}, default=str), "utf-8")
    return folder
