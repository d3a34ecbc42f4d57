"""vLLM 0.32 on a CPU answers the base's requests with an adapter where both are in one batch and the last adapter slot has been used; `register` mends that.

-1 stands for "no adapter" in the indices that vLLM's torch operators look weights up with, and in Python that is the last slot. Its GPU kernels skip -1.

Private part of vLLM replaced here, nowhere else: `bgmv_shrink`, x A of every token, in the module that defines it (where sgmv_shrink finds it) and in the one that
imported it by name. A token without an adapter gets zeros from it, and so nothing from what multiplies them with B. Entry point `tuneserve_cpu_lora` of the group
vllm.general_plugins, which vLLM runs in each of its processes.
"""

import functools
from typing import Any


def register() -> None:
    """Patches vLLM in this process if it runs on a CPU; does nothing elsewhere, or where it has been done."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = getattr(lora_ops.bgmv_shrink, "__wrapped__", lora_ops.bgmv_shrink)

    @functools.wraps(original)
    def bgmv_shrink(inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0)

    lora_ops.bgmv_shrink = bgmv_shrink
    punica_cpu.bgmv_shrink = bgmv_shrink
