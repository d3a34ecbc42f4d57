"""On an NVIDIA GPU, has vLLM 0.32 apply adapters of linear layers by one kernel of ours (shrink_expand.py) instead of three of its own, beside the base's work; `register` does it.

What an adapter changes, x A B, needs nothing of the base's product x W, which takes far longer. So it is worked out meanwhile on a stream of its own, and added afterwards to the rows that have an
adapter: where vLLM compiles, in the kernel that reads the layer's output next, so that it is no launch of its own; or, elsewhere and where several read it (q, k and v), by a kernel that only steps with adapters have.

Private parts of vLLM replaced here, nowhere else: `BaseLinearLayerWithLoRA._apply_sync`, by operators that torch.compile does not look into (`tuneserve_lora_begin`, `..._end`, `..._end_onto`); and, for
layers that come to their output another way, `PunicaWrapperGPU.add_lora_linear` (`tuneserve_lora_linear`). What the kernel does not take goes to vLLM's own two operators, as before.
lora_indices.py is installed with it: it marks the rows that have no adapter, also where no row has one. Entry point `tuneserve_gpu_lora` of the group vllm.general_plugins,
which vLLM runs in each of its processes if $VLLM_PLUGINS names it: `tuneserve serve` does for recipes with `lora.fused_kernel`. That variable is part of the key of vLLM's cache of compiled
graphs, so one without the operators is not taken for one with them.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.serving import lora_indices, shrink_expand

SLOTS, NO_LORA = 0, 5
"""Places in LoRAKernelMeta.meta_args: each row's slot, and whether no row has an adapter."""


def register() -> None:
    """Patches vLLM in this process if it runs on an NVIDIA GPU and may sum in any order; does nothing elsewhere."""
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not envs.VLLM_BATCH_INVARIANT:
        install()


def lora_linear(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], meta: list[Tensor], onto: bool, beside: bool = False) -> None:
    """shrink_expand.add, or what vLLM does where that is not for such a step. `meta`: as LoRAKernelMeta.meta_args has it."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    _, tokens, lora_tokens, lora_starts, lora_ids, no_lora, _ = meta
    if no_lora.item():
        return
    if shrink_expand.supported(x.shape[0], x.shape[1], a[0].shape[-2], len(a)):
        shrink_expand.add(y, x, a, b, tokens, lora_tokens, lora_starts, lora_ids, onto=onto, beside=beside)
        return
    shrunk = torch.empty((len(a), x.shape[0], a[0].shape[-2]), dtype=torch.float32, device=x.device)
    lora_shrink_op._lora_shrink(x, a, shrunk, *meta, 1.0)
    lora_expand_op._lora_expand(shrunk, b, y, *meta, add_inputs=onto)


@functools.cache
def _side(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def lora_begin(change: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], meta: list[Tensor]) -> None:
    """change = x A B in the rows that have an adapter: worked out beside what follows, to be read after `lora_end`."""
    if not meta[NO_LORA].item():
        with _beside(x):
            lora_linear(change, x, a, b, meta, onto=False, beside=True)


@contextlib.contextmanager
def _beside(x: Tensor) -> Iterator[None]:
    """What is launched within runs on a stream of its own, once x is there."""
    if not x.is_cuda:
        yield
        return
    side = _side(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        yield


def lora_end(change: Tensor, x: Tensor, y: Tensor, no_lora: Tensor) -> None:
    """Has what follows wait for `lora_begin`. `y` is here so that this comes after the base's product, `x` so that its memory is not given to others before."""
    if x.is_cuda and not no_lora.item():
        torch.cuda.current_stream(x.device).wait_stream(_side(x.device))


def lora_end_onto(y: Tensor, change: Tensor, x: Tensor, token_slots: Tensor, no_lora: Tensor) -> None:
    """`lora_end`, and y += change in the rows that have an adapter."""
    lora_end(change, x, y, no_lora)
    if not no_lora.item():
        shrink_expand.add_rows(y, change, token_slots)


def install() -> None:
    """Adds the operators and has linear layers call them."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.utils.torch_utils import direct_register_custom_op

    lora_indices.install()
    operators = []
    for function, written in ((lora_linear, "y"), (lora_begin, "change"), (lora_end, "change"), (lora_end_onto, "y")):
        name = f"tuneserve_{function.__name__}"
        if not hasattr(torch.ops.vllm, name):
            direct_register_custom_op(op_name=name, op_func=function, mutates_args=[written], fake_impl=lambda *_, **__: None)
        operators.append(getattr(torch.ops.vllm, name))
    linear, begin, end, end_onto = operators
    original_linear, original_apply = _original(PunicaWrapperGPU.add_lora_linear), _original(BaseLinearLayerWithLoRA._apply_sync)

    @functools.wraps(original_linear)
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
            original_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, add_inputs=add_inputs, **kwargs)
            return
        x = x.view(-1, x.shape[-1])
        linear(y.view(-1, y.shape[-1]), x, lora_a_stacked, lora_b_stacked, _meta(self, x), add_inputs)

    @functools.wraps(original_apply)
    def apply_sync(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or self.tp_size > 1:  # over two GPUs it won nothing (docs/benchmarks.md), over more it did not run
            whole: Tensor = original_apply(self, x, bias)
            return whole
        meta = _meta(self.punica_wrapper, x)
        slots, no_lora = meta[SLOTS], meta[NO_LORA]
        change = x.new_empty(x.size(0), sum(each.shape[-2] for each in self.lora_b_stacked))
        begin(change, x, self.lora_a_stacked, self.lora_b_stacked, meta)
        y: Tensor = self.base_layer.quant_method.apply(self.base_layer, x, bias)
        if len(self.lora_b_stacked) > 1 or not torch.compiler.is_compiling():
            end_onto(y, change, x, slots, no_lora)
            return y
        end(change, x, y, no_lora)
        return y + torch.where((slots >= 0)[:, None], change, 0)

    PunicaWrapperGPU.add_lora_linear = add_lora_linear
    BaseLinearLayerWithLoRA._apply_sync = apply_sync


def _original(method: Any) -> Any:
    return getattr(method, "__wrapped__", method)


def _meta(wrapper: Any, x: Tensor) -> list[Tensor]:
    """Each row's slot, the rows sorted by it, by group: how many rows, from where, and the slot; whether no row has an adapter, and how many groups (both on the CPU)."""
    return list(wrapper.token_mapping_meta.meta_args(x.size(0), wrapper.lora_config.specialize_active_lora))
