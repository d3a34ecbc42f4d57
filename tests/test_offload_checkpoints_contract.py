"""Checkpoints in host memory: the same gradients, and nothing but the layers' inputs goes there. The copies to and from a GPU are measured on one (docs/benchmarks.md)."""

from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline import swift_offload_checkpoints, tinyglm
from pipeline.basemodel import TEMPLATE_FILE
from pipeline.swift_offload_checkpoints import plain_call, to_device, to_host

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    made = tinyglm.make_model(tinyglm.make_config(tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8")).tokenizer))
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    made.enable_input_require_grads()
    return made.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(20, 400, (2, 30))
    model.zero_grad()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_the_same_and_each_layers_input_is_moved(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    brought: list[torch.Tensor] = []

    def noted(tensor: torch.Tensor) -> Any:
        packed = to_host(tensor)
        moved.extend([tuple(tensor.shape)] if isinstance(packed, tuple) else [])
        return packed

    def counted(packed: Any) -> torch.Tensor:
        back = to_device(packed)
        brought.extend([back] if isinstance(packed, tuple) else [])
        return back

    hidden = model.config.text_config.hidden_size
    monkeypatch.setattr(swift_offload_checkpoints, "LEAST_NUMBERS", 2 * 30 * hidden)
    monkeypatch.setattr(swift_offload_checkpoints, "to_host", noted)
    monkeypatch.setattr(swift_offload_checkpoints, "to_device", counted)
    found = gradients(model)
    assert moved == [(2, 30, hidden)] * model.config.text_config.num_hidden_layers and len(brought) == len(moved)
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", plain_call)
    wanted = gradients(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_small_and_whole_numbers_stay() -> None:
    small, whole = torch.zeros(10), torch.zeros(2**21, dtype=torch.int64)
    assert to_host(small) is small and to_host(whole) is whole
    large = torch.randn(2**20)
    packed = to_host(large)
    assert isinstance(packed, tuple) and packed[1] is not large and torch.equal(to_device(packed), large)
