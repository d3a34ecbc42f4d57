"""An experiment: the first half of our kernel for adapters (x A) on a stream of its own, beside the base's product, so that only the second half ((x A) B onto y) waits for it.

`python tests/acceptance/gpu/overlapped_lora.py`, 20 s: a JSON line for each of qkv_proj and o_proj and number of tokens, with microseconds of the base's FP8 product alone, with our kernel after it, and
with its halves as here; the outputs of both must be the same. As a plugin of vLLM 0.26 or 0.32 (`register`, an entry point of vllm.general_plugins put into $VLLM_PLUGINS by hand) it serves so.
Private part of vLLM replaced: `BaseLinearLayerWithLoRA._apply_sync`.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor

from pipeline.serving import shrink_expand

TOKENS = (1, 4, 16, 64, 256, 512)
_parts: list[Tensor] = []
"""Every buffer that was ever used, the largest last: CUDA graphs go on using those that they were captured with. Layers follow one another, so one is enough for all."""


@functools.cache
def _side() -> "torch.cuda.Stream | None":
    return torch.cuda.Stream() if torch.cuda.is_available() else None


def _buffer(numbers: int, device: torch.device) -> Tensor:
    if not _parts or _parts[-1].numel() < numbers:
        _parts.append(torch.empty(numbers, dtype=torch.float32, device=device))
    return _parts[-1]


def _launch(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], tokens: Tensor, lora_tokens: Tensor, lora_starts: Tensor, lora_ids: Tensor, *, shrinks: bool
) -> None:
    """One half of shrink_expand.add."""
    count, inputs = x.shape
    slices, rank, groups, shape = len(a), a[0].shape[-2], lora_ids.numel(), shrink_expand.shape_for(x.shape[0])
    widths, padding = [each.shape[-2] for each in b], shrink_expand.MOST_SLICES - len(a)
    tiles = (count + min(groups, count) * (shape.rows - 1)) // shape.rows
    parts = _buffer(tiles * slices * shape.shares * shape.rows * rank, x.device)
    pointers = [*a, *[a[0]] * padding, *b, *[b[0]] * padding, *widths, *[0] * padding, parts, parts]  # no half counts arrivals, so any address will do
    where = (tokens, lora_ids, lora_tokens, lora_starts, x.stride(0), y.stride(0))
    shrink_expand._shrink_expand[(shape.shares, tiles)](
        *(x, y, *pointers, *where),
        **shrink_expand.constants(count, inputs, widths, rank=rank, groups=groups, shape=shape),
        SHRINKS=shrinks,
        EXPANDS=not shrinks,
        ADD=True,
        launch_pdl=False,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def _ours(x: Tensor, a: list[Tensor]) -> bool:
    return shrink_expand.supported(x.shape[0], x.shape[1], a[0].shape[-2], len(a))


def begin(x: Tensor, a: list[Tensor], b: list[Tensor], tokens: Tensor, lora_tokens: Tensor, lora_starts: Tensor, lora_ids: Tensor, no_lora: Tensor) -> Tensor:
    """Starts x A beside what follows; what it returns orders `end` after it, no more."""
    if not no_lora.item() and _ours(x, a):
        if side := _side():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _launch(x, x, a, b, tokens, lora_tokens, lora_starts, lora_ids, shrinks=True)
        else:
            _launch(x, x, a, b, tokens, lora_tokens, lora_starts, lora_ids, shrinks=True)
    return x.new_empty(1)


def end(
    begun: Tensor,
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    tokens: Tensor,
    lora_tokens: Tensor,
    lora_starts: Tensor,
    lora_ids: Tensor,
    no_lora: Tensor,
) -> None:
    """y += (x A) B. `x` is here so that nothing is put in its place before."""
    if no_lora.item():
        return
    if not _ours(x, a):
        raise RuntimeError("steps of more tokens than our kernel takes are not for this experiment: set max_num_batched_tokens to 512")
    if side := _side():
        torch.cuda.current_stream().wait_stream(side)
    _launch(y, x, a, b, tokens, lora_tokens, lora_starts, lora_ids, shrinks=False)


def register() -> None:
    """Patches vLLM in this process."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.utils.torch_utils import direct_register_custom_op

    if hasattr(torch.ops.vllm, "tuneserve_lora_begin"):
        return
    direct_register_custom_op(op_name="tuneserve_lora_begin", op_func=begin, mutates_args=[], fake_impl=lambda x, *_: x.new_empty(1))
    direct_register_custom_op(op_name="tuneserve_lora_end", op_func=end, mutates_args=["y"], fake_impl=lambda *_: None)
    original = BaseLinearLayerWithLoRA._apply_sync

    @functools.wraps(original)
    def apply_sync(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        wrapper = self.punica_wrapper
        if x.ndim != 2 or not hasattr(type(wrapper).add_lora_linear, "__wrapped__"):  # gpu_lora.py is not installed, or it is the CPU's
            result: Tensor = original(self, x, bias)
            return result
        meta = wrapper.token_mapping_meta.meta_args(x.size(0), False)[1:6]
        begun = torch.ops.vllm.tuneserve_lora_begin(x, self.lora_a_stacked, self.lora_b_stacked, *meta)
        y: Tensor = self.base_layer.quant_method.apply(self.base_layer, x, bias)
        torch.ops.vllm.tuneserve_lora_end(begun, y, x, self.lora_a_stacked, self.lora_b_stacked, *meta)
        return y

    BaseLinearLayerWithLoRA._apply_sync = apply_sync


def main() -> None:
    from vllm import _custom_ops as ops

    from tests.acceptance.gpu.kernel_timing import microseconds
    from tests.acceptance.gpu.tune_lora import ADAPTER_SETS, SHAPES, Bench

    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    for slices in SHAPES:
        bench = Bench(slices)
        outputs = sum(bench.outputs)
        weights = [torch.randn(outputs, bench.inputs, device="cuda").to(torch.float8_e4m3fn) for _ in range(ADAPTER_SETS)]
        scales = torch.full((outputs, 1), 0.01, device="cuda")
        for tokens in TOKENS:
            meta = bench.meta(tokens, 1)[1:6]
            x = torch.randn(tokens, bench.inputs, device="cuda", dtype=torch.bfloat16)

            def base(layer: int, x: Tensor = x, weights: list[Tensor] = weights, scales: Tensor = scales) -> Tensor:
                quantized, by_token = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
                y: Tensor = ops.cutlass_scaled_mm(quantized, weights[layer].t(), by_token, scales, torch.bfloat16)
                return y

            def after(layer: int, x: Tensor = x, bench: Bench = bench, meta: Any = meta, base: Any = base) -> Tensor:
                y: Tensor = base(layer)
                shrink_expand.add(y, x, bench.a[layer], bench.b[layer], *meta[:4])
                return y

            def beside(layer: int, x: Tensor = x, bench: Bench = bench, meta: Any = meta, base: Any = base) -> Tensor:
                begun = begin(x, bench.a[layer], bench.b[layer], *meta)
                y: Tensor = base(layer)
                end(begun, y, x, bench.a[layer], bench.b[layer], *meta)
                return y

            if not torch.equal(after(0), beside(0)):
                raise SystemExit(f"{slices} slices, {tokens} tokens: the halves give another output")
            found = {name: round(microseconds(way, ADAPTER_SETS), 2) for name, way in (("base_us", base), ("after_us", after), ("beside_us", beside))}
            print(json.dumps({"slices": slices, "tokens": tokens} | found), flush=True)


if __name__ == "__main__":
    main()
