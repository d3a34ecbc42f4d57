"""lora_indices.py fills vLLM's buffers as vLLM does, and says of each row without an adapter that it has none: also where no row has one, and of rows that a step has no tokens for."""

import numpy as np
import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from pipeline.serving import lora_indices
from pipeline.serving.lora_indices import groups_of, slots_of

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("counts", [[], [1, 2, 4, 9]], ids=["one graph", "graphs by number of adapters"])
def test_our_indices_are_vllms(counts, monkeypatch):
    """Step after step, so that what is left of the one before counts too."""
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)  # which it imports where Triton has a GPU
    monkeypatch.setattr(punica_gpu, "get_captured_lora_counts", lambda *_: counts)
    config = LoRAConfig(max_loras=8, max_cpu_loras=8)
    theirs, ours = (PunicaWrapperGPU(64, 16, "cpu", lora_config=config) for _ in range(2))
    for buffers in zip(buffers_of(theirs), buffers_of(ours), strict=True):
        for buffer in buffers:
            buffer.zero_()
    dice, slots = np.random.default_rng(1), [5, None, 7, 11, 3, None, 2, 9]
    for step in range(40):
        held = dice.permutation([0, 5, 7, 11, 3, 2, 9])[: dice.integers(1, 8)] if step % 4 else np.zeros(1, int)
        answers = dice.choice(held, dice.integers(1, 8)).astype(np.int32)
        mapping = LoRAMapping(tuple(answers.repeat(dice.integers(1, 8, len(answers)))), tuple(answers), is_prefill=True)
        PunicaWrapperGPU.update_metadata(theirs, mapping, slots, 9, 100)
        for meta, rows in ((theirs.token_mapping_meta, mapping.index_mapping), (theirs.prompt_mapping_meta, mapping.prompt_mapping)):
            meta.token_lora_mapping[len(rows) if any(rows) else 0 :] = -1
        lora_indices.update_metadata(ours, mapping, slots, 9, 100)
        assert ours.indices_len == theirs.indices_len and ours.is_prefill == theirs.is_prefill
        for one, other in zip(buffers_of(ours), buffers_of(theirs), strict=True):
            assert torch.equal(one, other)


def buffers_of(wrapper):
    own = ("_token_lora_indices", "_sampler_indices", "_sampler_indices_padded", "_embeddings_indices")
    metas = (wrapper.token_mapping_meta, wrapper.prompt_mapping_meta)
    return [*(getattr(wrapper, name) for name in own), *(value for meta in metas for value in vars(meta).values() if isinstance(value, torch.Tensor))]


def test_each_adapter_is_found_in_its_slot():
    assert slots_of((7, 0, 5, 7), [5, None, 7]).tolist() == [2, -1, 0, 2]
    assert slots_of((0, 0), [None, None]).tolist() == [-1, -1]


@pytest.mark.parametrize("adapter", [3, 6, 9])
def test_an_adapter_without_a_slot_is_an_error(adapter):
    with pytest.raises(KeyError, match=rf"adapters \[{adapter}\] are in no slot"):
        slots_of((5, adapter), [5, None, 7])


def test_rows_are_grouped_by_slot_and_stay_in_order_within_one():
    rows, order, ids, counts, starts = groups_of(np.array([2, -1, 0, 2]), 6, 5)
    assert rows.tolist() == [2, -1, 0, 2, -1, -1] and order.tolist() == [1, 2, 0, 3]
    assert (ids.tolist(), counts.tolist(), starts.tolist()) == ([-1, 0, 2, -1, -1], [1, 1, 2, 0, 0], [0, 1, 2, 4, 0, 0])


def test_without_any_adapter_there_are_no_groups():
    rows, order, ids, counts, starts = groups_of(np.array([-1, -1]), 3, 3)
    assert (rows.tolist(), len(order), ids.tolist(), counts.tolist(), starts.tolist()) == ([-1, -1, -1], 0, [-1, -1, -1], [0, 0, 0], [0, 0, 0, 0])
