"""The routed experts in 4 bits: what transformers and bitsandbytes make of them while loading, and that the model computes with their dequantized values."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from transformers import BitsAndBytesConfig, Glm4vMoeForConditionalGeneration

from pipeline import tinyglm
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.swift_expert_nf4 import EXPERT_WEIGHTS, ExpertQuantizer

pytestmark = pytest.mark.contract
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=["mlp.gate", "model.visual", "lm_head"],
)
"""As ms-swift makes it for our arguments."""
NAMES = [f"model.language_model.layers.{layer}.mlp.experts.{name}" for layer in (1, 2, 3) for name in EXPERT_WEIGHTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    processor = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    tinyglm.save(tinyglm.make_model(tinyglm.make_config(processor.tokenizer)), processor, folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return Glm4vMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return load(folder)


@pytest.fixture
def quantized(folder: Path) -> Any:
    return load(folder, quantization_config=NF4, device_map="cpu")


def packed(model: Any, name: str) -> torch.nn.Parameter:
    path, _, parameter = name.rpartition(".")
    return model.get_parameter(f"{path}.parametrizations.{parameter}.original")


def value(model: Any, name: str) -> torch.Tensor:
    path, _, parameter = name.rpartition(".")
    return getattr(model.get_submodule(path), parameter)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_what_bitsandbytes_makes_of_the_checkpoint(plain: Any, quantized: Any, name: str) -> None:
    weight = value(plain, name)
    held = packed(quantized, name)
    assert held.dtype == torch.uint8 and held.numel() * 2 == weight.numel() and not held.requires_grad
    wanted = dequantize_4bit(*quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4"))
    assert torch.equal(value(quantized, name), wanted)
    assert 0 < (wanted - weight).abs().max() < 0.2 * weight.abs().max()


def test_nothing_else_changes_and_no_expert_is_forgotten(plain: Any, quantized: Any) -> None:
    with_three = {name for name, parameter in plain.named_parameters() if parameter.dim() == 3}
    assert with_three == set(NAMES)
    whole = dict(plain.named_parameters())
    for name, parameter in quantized.named_parameters():
        linear = isinstance(quantized.get_submodule(name.rpartition(".")[0]), Linear4bit) and name.endswith("weight")
        assert linear or ".parametrizations." in name or torch.equal(parameter, whole[name]), name
    assert quantized.is_loaded_in_4bit, "what Trainer, accelerate and peft look at"


def test_the_state_dict_names_parameters_as_the_model_does(quantized: Any) -> None:
    """DeepSpeed leaves frozen parameters out of its checkpoints by these names."""
    assert {name for name, _ in quantized.named_parameters()} <= quantized.state_dict().keys()


def test_one_expert_weight_stands_unquantized_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    quantize = ExpertQuantizer.quantize

    def spy(self: ExpertQuantizer, name: str, weight: torch.Tensor) -> torch.nn.Parameter:
        assert not [earlier for earlier in seen if earlier() is not None]
        assert weight.dim() == 3
        seen.append(weakref.ref(weight))
        return quantize(self, name, weight)

    monkeypatch.setattr(ExpertQuantizer, "quantize", spy)
    load(folder, quantization_config=NF4, device_map="cpu")
    assert len(seen) == len(NAMES)


def test_transformers_sets_half_a_byte_aside_for_each_element(plain: Any) -> None:
    quantizer = ExpertQuantizer(NF4, pre_quantized=False)
    assert [name for name, parameter in plain.named_parameters() if quantizer.param_element_size(plain, name, parameter) == 0.5] == NAMES


def dequantized(plain: Any, quantized: Any) -> Any:
    """The unquantized model with the quantized one's values."""
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
        for name in NAMES:
            value(plain, name).copy_(value(quantized, name))
    return plain


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for two rows of tokens, and the gradient of a number made of them with respect to the input."""
    torch.manual_seed(3)
    embedded = torch.randn(2, 24, model.config.text_config.hidden_size, requires_grad=True)
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (logits * torch.randn(logits.shape)).sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients_are_those_of_the_dequantized_weights(folder: Path, quantized: Any, experts: str, checkpointing: bool) -> None:
    reference = dequantized(load(folder), quantized)
    for model in (reference, quantized):
        model.set_experts_implementation(experts)
        model.requires_grad_(requires_grad=False)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for found, wanted in zip(run(quantized), run(reference), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@contextmanager
def watched() -> Iterator[list[int]]:
    """For each dequantization the number of those before it whose result still stands."""
    standing: list[int] = []
    results: list[weakref.ref[torch.Tensor]] = []
    dequantize = Bnb4bitParametrization.forward

    def spy(self: Bnb4bitParametrization, weight: torch.Tensor) -> torch.Tensor:
        standing.append(sum(result() is not None for result in results))
        result = dequantize(self, weight)
        results.append(weakref.ref(result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bnb4bitParametrization, "forward", spy)
        yield standing


def test_with_gradient_checkpointing_one_layers_experts_stand_dequantized_at_a_time(quantized: Any) -> None:
    quantized.requires_grad_(requires_grad=False)
    with watched() as standing:
        run(quantized)
    assert len(standing) == len(NAMES), "each once: grouped_mm is transformers' choice, and reads each once"
    assert max(standing) == len(NAMES) - 1, "all of them, for the backward pass"
    quantized.train()
    quantized.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with watched() as standing:
        run(quantized)
    assert len(standing) == 2 * len(NAMES) and max(standing) <= 1
