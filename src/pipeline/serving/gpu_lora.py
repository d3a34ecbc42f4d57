"""On an NVIDIA GPU, has vLLM 0.32 apply adapters of linear layers by one kernel of ours (shrink_expand.py) instead of three of its own; `register` does it.

Private parts of vLLM replaced here, nowhere else: `PunicaWrapperGPU.add_lora_linear`, by an operator `tuneserve_lora_linear` that torch.compile does not look into. What the kernel does not
take goes to vLLM's own two operators, as before. Entry point `tuneserve_gpu_lora` of the group vllm.general_plugins, which vLLM runs in each of its processes if $VLLM_PLUGINS names it:
`tuneserve serve` does for recipes with `lora.fused_kernel`. That variable is part of the key of vLLM's cache of compiled graphs, so one without the operator is not taken for one with it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from pipeline.serving import shrink_expand

OPERATOR = "tuneserve_lora_linear"


def register() -> None:
    """Patches vLLM in this process if it runs on an NVIDIA GPU and may sum in any order; does nothing elsewhere."""
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not envs.VLLM_BATCH_INVARIANT:
        install()


def install() -> None:
    """Adds the operator and has `add_lora_linear` call it."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.utils.torch_utils import direct_register_custom_op

    def lora_linear(
        y: Tensor,
        x: Tensor,
        a: list[Tensor],
        b: list[Tensor],
        token_slots: Tensor,
        tokens: Tensor,
        lora_tokens: Tensor,
        lora_starts: Tensor,
        lora_ids: Tensor,
        no_lora: Tensor,
        active_loras: Tensor,
        onto: bool,
    ) -> None:
        if no_lora.item():
            return
        if shrink_expand.supported(x.shape[0], x.shape[1], a[0].shape[-2], len(a)):
            shrink_expand.add(y, x, a, b, tokens, lora_tokens, lora_starts, lora_ids, onto=onto)
            return
        meta = (token_slots, tokens, lora_tokens, lora_starts, lora_ids, no_lora, active_loras)
        shrunk = torch.empty((len(a), x.shape[0], a[0].shape[-2]), dtype=torch.float32, device=x.device)
        lora_shrink_op._lora_shrink(x, a, shrunk, *meta, 1.0)
        lora_expand_op._lora_expand(shrunk, b, y, *meta, add_inputs=onto)

    if not hasattr(torch.ops.vllm, OPERATOR):
        direct_register_custom_op(op_name=OPERATOR, op_func=lora_linear, mutates_args=["y"], fake_impl=lambda *_, **__: None)
    operator = getattr(torch.ops.vllm, OPERATOR)
    original = getattr(PunicaWrapperGPU.add_lora_linear, "__wrapped__", PunicaWrapperGPU.add_lora_linear)

    @functools.wraps(original)
    def add_lora_linear(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if scale != 1.0 or buffer is not None:  # vLLM's layers have the scale in B
            original(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, add_inputs=add_inputs, **kwargs)
            return
        x = x.view(-1, x.shape[-1])
        meta = self.token_mapping_meta.meta_args(x.size(0), self.lora_config.specialize_active_lora)
        operator(y.view(-1, y.shape[-1]), x, lora_a_stacked, lora_b_stacked, *meta, add_inputs)

    PunicaWrapperGPU.add_lora_linear = add_lora_linear
