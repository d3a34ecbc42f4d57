"""A process of its own whose Triton kernels are interpreted, which is decided as Triton is imported: prints how far shrink_expand.py's are off float64, a JSON object of one case a line.

`python -m tests.serving.interpreted_lora` calls the kernel; with `--vllm` vLLM's GPU wrapper with our hook (gpu_lora.py) does, on the CPU.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch

from pipeline.serving import gpu_lora, shrink_expand

CASES = (
    (1, 2, 2048, (192, 64, 64), True),
    (4, 1, 1024, (100, 28), True),
    (9, 2, 1536, (128,), False),
    (20, 3, 1024, (1024, 64), True),
    (70, 2, 512, (600, 28, 28), True),
    (400, 2, 512, (192, 64, 64), True),
)
"""Tokens of a step, slots for adapters, inputs, outputs of each slice, whether onto what is there: each way through the kernel, and each shape but that for the longest steps."""


def meta(slots_of_tokens, slots):
    """As vLLM's LoRAKernelMeta says it: tokens sorted by slot, and for each slot in use, and -1, how many and from where."""
    ids, counts = torch.unique(slots_of_tokens, sorted=True, return_counts=True)
    lora_ids, lora_tokens, lora_starts = (torch.full((slots + more,), start, dtype=torch.int32) for more, start in ((1, -1), (1, 0), (2, 0)))
    lora_ids[: len(ids)], lora_tokens[: len(ids)] = ids.int(), counts.int()
    lora_starts[1 : 1 + len(ids)] = counts.cumsum(0).int()
    return torch.sort(slots_of_tokens, stable=True)[1].int(), lora_tokens, lora_starts, lora_ids


def expected(y, x, a, b, slots_of_tokens, onto):
    result = y.double().clone()
    for token, slot in enumerate(slots_of_tokens.tolist()):
        if slot >= 0:
            change = torch.cat([x[token].double() @ each_a[slot, 0].double().T @ each_b[slot, 0].double().T for each_a, each_b in zip(a, b, strict=True)])
            result[token] = result[token] + change if onto else change
    return result


def through_vllm(y, x, a, b, slots_of_tokens, slots, onto):
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # which it imports where Triton has a GPU
    config = SimpleNamespace(max_loras=slots, specialize_active_lora=False, fully_sharded_loras=False)
    wrapper = punica_gpu.PunicaWrapperGPU(4096, 256, "cpu", lora_config=config)
    wrapper.token_mapping_meta.prepare_tensors(slots_of_tokens.int())
    wrapper.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, tuple(each.shape[-2] for each in b), **({} if onto else {"add_inputs": False}))


def main():
    vllm = "--vllm" in sys.argv
    if vllm:
        gpu_lora.install()
    for tokens, slots, inputs, widths, onto in CASES:
        torch.manual_seed(tokens)
        a, b = [torch.randn(slots, 1, 16, inputs) for _ in widths], [torch.randn(slots, 1, width, 16) for width in widths]
        x, y = torch.randn(tokens, inputs), torch.randn(tokens, sum(widths))
        slots_of_tokens = torch.randint(-1, slots, (tokens,)) if tokens > 1 else torch.tensor([1])
        wanted = expected(y, x, a, b, slots_of_tokens, onto)
        if vllm:
            through_vllm(y, x, a, b, slots_of_tokens, slots, onto)
        else:
            shrink_expand.add(y, x, a, b, *meta(slots_of_tokens, slots), onto=onto)
        far = ((y - wanted).norm() / wanted.norm()).item()
        supported = shrink_expand.supported(tokens, inputs, 16, len(widths))
        shape = [shape for _, shape in shrink_expand.SHAPES].index(shrink_expand.shape_for(tokens))
        print(json.dumps({"tokens": tokens, "inputs": inputs, "widths": widths, "onto": onto, "supported": supported, "shape": shape, "far": far}), flush=True)


if __name__ == "__main__":
    main()
