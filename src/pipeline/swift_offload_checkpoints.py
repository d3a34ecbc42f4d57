"""Loaded by ms-swift where a recipe offloads checkpoints (`external_plugins`): what gradient checkpointing keeps, each layer's input, waits in host memory.

Of GLM-4.5V that is 46 x 4,096 bf16 numbers a token, 11.5 GiB of a row of 32,768. Copies are made from and to pinned memory on the stream that computes, so that memory
is used again only when they are done; measured on one H100, they take 2 to 6 % of a step. Within a layer, and of all that is no layer, nothing changes. It relies on reentrant
checkpointing, which saves its inputs for the backward pass as any function does and runs the layer again without these hooks; ms-swift uses that with one process.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

LEAST_NUMBERS = 2**20
"""Smaller tensors (masks, positions) stay: nothing is gained by moving them."""
PINNED = torch.cuda.is_available()


def to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if tensor.numel() < LEAST_NUMBERS or not tensor.is_floating_point():
        return tensor
    held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=PINNED)
    held.copy_(tensor, non_blocking=True)
    return tensor.device, held


def to_device(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)


plain_call: Callable[..., Any] = GradientCheckpointingLayer.__call__


@wraps(plain_call)
def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not (self.gradient_checkpointing and self.training):
        return plain_call(self, *args, **kwargs)
    with saved_tensors_hooks(to_host, to_device):
        return plain_call(self, *args, **kwargs)


GradientCheckpointingLayer.__call__ = call
