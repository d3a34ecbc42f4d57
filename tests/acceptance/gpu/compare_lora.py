"""Our kernel for adapters (shrink_expand.py) beside vLLM's three, on the GPU that is here: GLM-4.5V's attention, rank 16, eight slots, one layer's qkv_proj or o_proj.

`python tests/acceptance/gpu/compare_lora.py`, 60 s: a JSON line for each module, number of tokens and of adapters in them, with microseconds of vLLM's, tuned as `tuneserve serve` has it, and of ours.
Ours must give what vLLM's give, but for rounding, or it ends there. With `--shapes` also the microseconds of each way to cut the work, which SHAPES there are chosen by; `--gpus 2`: of half the heads.

Times are medians of CUDA graphs that go through ADAPTER_SETS layers' weights, as a model does, so that no cache holds them.
"""

import argparse
import json
import os

import torch

from pipeline.serving import shrink_expand
from pipeline.serving.launch import LORA_KERNELS

os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(LORA_KERNELS))

from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

from tests.acceptance.gpu.kernel_timing import microseconds, same
from tests.acceptance.gpu.tune_lora import ADAPTER_SETS, RANK, SHAPES, SLOTS, Bench

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
MOST_DIFFERENCE = 2e-3
"""Of the norm of what adapters add, as the shrunk states are rounded to bfloat16 after sums in another order."""
REPEATS = 50
"""Of one launch, whose outputs must be the same bit for bit: programs that did not wait for one another would not give them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--shapes", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "of_gpus": arguments.gpus}), flush=True)
    for slices in SHAPES:
        bench = Bench(slices, arguments.gpus)
        for tokens in TOKENS:
            for adapters in sorted({1, min(SLOTS, tokens)}):
                print(json.dumps({"slices": slices, "tokens": tokens, "adapters": adapters} | compared(bench, tokens, adapters, arguments.shapes)), flush=True)


def compared(bench: Bench, tokens: int, adapters: int, shapes: bool) -> dict[str, object]:
    meta = bench.meta(tokens, adapters)
    x = torch.randn(tokens, bench.inputs, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(tokens, sum(bench.outputs), device="cuda", dtype=torch.bfloat16)
    shrunk = torch.empty(bench.slices, tokens, RANK, device="cuda", dtype=torch.float32)

    def vllms(layer: int, y: torch.Tensor = y) -> None:
        lora_shrink_op._lora_shrink(x, bench.a[layer], shrunk, *meta, 1.0)
        lora_expand_op._lora_expand(shrunk, bench.b[layer], y, *meta, add_inputs=True)

    def ours(layer: int, y: torch.Tensor = y, shape: shrink_expand.Shape | None = None) -> None:
        shrink_expand.add(y, x, bench.a[layer], bench.b[layer], *meta[1:5], shape=shape)

    theirs, *own = (torch.zeros_like(y) for _ in range(1 + REPEATS))  # onto zeros, where rounding leaves most of a change
    vllms(0, theirs)
    for each in own:
        ours(0, each)
    where = f"{bench.slices} slices, {tokens} tokens, {adapters} adapters"
    if not all(torch.equal(each, own[0]) for each in own[1:]):
        raise SystemExit(f"{where}: our kernel gives another output each time")
    if not same(own[0], theirs, MOST_DIFFERENCE):
        raise SystemExit(f"{where}: our kernel gives another output than vLLM's")
    for layer in range(ADAPTER_SETS):
        vllms(layer)
    result: dict[str, object] = {"vllm_us": round(microseconds(vllms, ADAPTER_SETS), 2), "ours_us": round(microseconds(ours, ADAPTER_SETS), 2)}
    if shapes:
        result["by_shape_us"] = [round(microseconds(lambda layer, shape=shape: ours(layer, shape=shape), ADAPTER_SETS), 2) for _, shape in shrink_expand.SHAPES]
    return result


if __name__ == "__main__":
    main()
