"""On an NVIDIA GPU, has vLLM 0.32 work out on the host which token has which adapter; its own way does it on the GPU, and waits three times for what it finds. `register` does it.

Each step whose tokens differ from the last one's, as with every new prompt, has vLLM go through all tokens in Python, sort and count them by some forty small GPU kernels, and wait for the GPU
to have done the step before, which it otherwise prepares ahead of. Requests without an adapter wait too. Here NumPy does the same, two copies bring it to the GPU, and nothing waits.

Private parts of vLLM replaced here, nowhere else: `PunicaWrapperGPU.update_metadata`, by what fills the same buffers, its own and those of its two LoRAKernelMeta, and also
marks rows without an adapter where no row has one, and rows that a step has no tokens for, which gpu_lora.py goes by. Entry point
`tuneserve_lora_indices` of the group vllm.general_plugins, which vLLM runs in each of its processes if $VLLM_PLUGINS names it, as `tuneserve serve` has it; without an NVIDIA GPU it does nothing.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

NO_SLOT = -1
Slots = NDArray[np.int64]


def register() -> None:
    """Patches vLLM in this process if it runs on an NVIDIA GPU; does nothing elsewhere."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        install()


def install() -> None:
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    PunicaWrapperGPU.update_metadata = update_metadata


def slots_of(adapters: Sequence[int], slot_adapters: Sequence[int | None]) -> Slots:
    """The slot of each of `adapters` (numbers; 0: none), by what is in each slot; NO_SLOT for none. Raises KeyError for an adapter without a slot."""
    known = sorted((adapter, slot) for slot, adapter in enumerate(slot_adapters) if adapter is not None)
    numbers, slots = np.array([(0, NO_SLOT), *known], np.int64).T
    asked = np.asarray(adapters, np.int64)
    places = np.minimum(numbers.searchsorted(asked), len(numbers) - 1)
    if missing := set(asked[numbers[places] != asked].tolist()):
        raise KeyError(f"adapters {sorted(missing)} are in no slot")
    found: Slots = slots[places]
    return found


def groups_of(slots: Slots, rows: int, most: int) -> list[NDArray[np.int32]]:
    """As LoRAKernelMeta has it for kernels: each row's slot; rows sorted by slot; each slot in use, and NO_SLOT, with its number of rows; and where its rows begin among the sorted.

    The first is of all `rows` that there is room for, as a step may be run with more than it has; the last three are padded to `most` groups. Where no row has an adapter there are no groups
    and no sorted rows.
    """
    each = np.full(rows, NO_SLOT, np.int32)
    each[: len(slots)] = slots
    ids, counts, starts = np.full(most, NO_SLOT, np.int32), np.zeros(most, np.int32), np.zeros(most + 1, np.int32)
    numbers = np.bincount(slots - NO_SLOT)
    if not numbers[1:].any():
        return [each, np.empty(0, np.int32), ids, counts, starts]
    present = numbers.nonzero()[0]
    ids[: len(present)], counts[: len(present)], starts[1 : 1 + len(present)] = present + NO_SLOT, numbers[present], numbers[present].cumsum()
    return [each, slots.astype(np.int16).argsort(kind="stable").astype(np.int32), ids, counts, starts]


def update_metadata(wrapper: Any, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **_: Any) -> None:
    """In place of PunicaWrapperGPU's: the adapters of a step's tokens and of the answers that it draws, for all layers."""
    wrapper.is_prefill = mapping.is_prefill
    tokens, answers = slots_of(mapping.index_mapping, lora_index_to_id), slots_of(mapping.prompt_mapping, lora_index_to_id)
    padded = np.arange(len(answers)) + np.where(answers == NO_SLOT, max_loras - 1, answers) * len(answers)
    rows = [tokens, answers, padded, np.maximum(tokens, 0) * vocab_size]
    buffers = [wrapper._token_lora_indices, wrapper._sampler_indices, wrapper._sampler_indices_padded, wrapper._embeddings_indices]
    _send(rows, buffers)
    wrapper.indices_len[:] = map(len, rows)
    parts, places = [], []
    for meta, slots in ((wrapper.token_mapping_meta, tokens), (wrapper.prompt_mapping_meta, answers)):
        groups = groups_of(slots, meta.token_lora_mapping.numel(), meta.active_lora_ids.numel())
        parts += groups
        places += [meta.token_lora_mapping, meta.token_indices_sorted_by_lora_ids, meta.active_lora_ids, meta.num_tokens_per_lora, meta.lora_token_start_loc]
        active = int((groups[3] > 0).sum())
        meta.no_lora_flag_cpu[0] = active == 0
        at = bisect.bisect_left(meta.captured_lora_counts, active)
        meta.num_active_loras_cpu[0] = meta.captured_lora_counts[at] if active > 0 and at < len(meta.captured_lora_counts) else active
    _send(parts, places)


def _send(parts: list[NDArray[Any]], places: list[torch.Tensor]) -> None:
    """Each of `parts` to the beginning of its place, by one copy to the GPU that nobody waits for (from pinned memory, which torch keeps until it is done)."""
    whole = np.concatenate(parts)
    device = places[0].device
    staged = torch.empty(len(whole), dtype=places[0].dtype, pin_memory=device.type == "cuda")
    staged.numpy()[:] = whole
    sent = staged.to(device, non_blocking=True).split([len(part) for part in parts])
    for part, place in zip(sent, places, strict=True):
        place[..., : len(part)].copy_(part)
