"""Loaded by ms-swift where several processes train with ZeRO-3 (`external_plugins`): a base of 214 GB neither stands in the memory of each process, nor whole on each GPU.

Reading. transformers reads a checkpoint into the host memory of every process, fuses the experts there into tensors of its own, and then takes from the first process's
copy alone what it splits over all: 200 GiB a process of GLM-4.5V, 1.6 TiB on a host of eight GPUs. Here the others get tensors without content, but for small ones:
buffers (the routers' correction biases) every process takes from its own copy.

Training. DeepSpeed 0.19.8 (since its pull request 8148) keeps frozen weights that a checkpointed layer gathers anew in the backward pass until the backward pass of the module that was
last at work before it is over; for GLM-4.5V that is the model, so that all its layers stand gathered on every GPU at the end (measured on two H100: 34 GiB of 5 layers where 10 were each GPU's
share). It must, for checkpointing without reentry, whose recomputed tensors refer to these weights. ms-swift checkpoints with reentry under DeepSpeed, where each module's own hook
gathers them again; so they are let go as before.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from safetensors import safe_open
from transformers import modeling_utils

MOST_NUMBERS = 2**20
"""Of a tensor that every process reads."""

plain_load: Callable[..., dict[str, Any]] = modeling_utils.load_state_dict


@wraps(plain_load)
def load_state_dict(checkpoint_file: Any, map_location: Any = "cpu", *args: Any, **kwargs: Any) -> dict[str, Any]:
    if (
        not (torch.distributed.is_initialized() and torch.distributed.get_rank())
        or str(map_location) == "meta"
        or not str(checkpoint_file).endswith(".safetensors")
    ):
        return plain_load(checkpoint_file, map_location, *args, **kwargs)
    found = plain_load(checkpoint_file, "meta", *args, **kwargs)
    with safe_open(checkpoint_file, framework="pt") as file:
        return {name: file.get_tensor(name).to(map_location) if tensor.numel() <= MOST_NUMBERS else tensor for name, tensor in found.items()}


modeling_utils.load_state_dict = load_state_dict


def keep_nothing(sub_module: Any, param: Any) -> None:
    """In place of what would keep `param` gathered until the backward pass of `sub_module` is over."""


partitioned_param_coordinator.update_recompute_parameters = keep_nothing
