"""A process of its own whose Triton kernels are interpreted, which is decided as Triton is imported: prints how far shrink_expand.py's are off float64, a JSON object of one case a line.

`python -m tests.serving.interpreted_lora` calls the kernel; with `--vllm` vLLM's GPU wrapper with our hook (gpu_lora.py) does, on the CPU, and then vLLM's layers do; with `--order` it
prints in which order torch.compile leaves what these layers do.
"""

import functools
import json
import os
import re
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch

from pipeline.serving import gpu_lora, shrink_expand

CASES = (
    (1, 2, 2048, (192, 64, 64), True),
    (4, 1, 1024, (100, 28), True),
    (9, 2, 1536, (128,), False),
    (6, 2, 512, (128,), True),
    (20, 3, 1024, (1024, 64), True),
    (70, 2, 512, (600, 28, 28), True),
    (400, 2, 512, (192, 64, 64), True),
)
"""Tokens of a step, slots for adapters, inputs, outputs of each slice, whether onto what is there: each way through the kernel, and each shape but that for the longest steps."""

MOST_LAYER_TOKENS = 6
"""Of cases that go through vLLM's layers, too; the interpreter is slow."""


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


def wrapper_of(slots):
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # which it imports where Triton has a GPU
    config = SimpleNamespace(max_loras=slots, specialize_active_lora=False, fully_sharded_loras=False)
    return punica_gpu.PunicaWrapperGPU(4096, 256, "cpu", lora_config=config)


def through_vllm(y, x, a, b, slots_of_tokens, slots, onto):
    wrapper = wrapper_of(slots)
    wrapper.token_mapping_meta.prepare_tensors(slots_of_tokens.int())
    wrapper.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, tuple(each.shape[-2] for each in b), **({} if onto else {"add_inputs": False}))


def layer_of(wrapper, a, b, product):
    """vLLM's layer with adapters, around `product` of a base's layer."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    layer = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(layer)
    layer._enable_aux_cuda_stream, layer.tp_size = False, 1
    layer.punica_wrapper, layer.lora_a_stacked, layer.lora_b_stacked = wrapper, tuple(a), tuple(b)
    layer.output_slices = tuple(each.shape[-2] for each in b)
    layer.base_layer = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda _, x, __: product(x)))
    return layer


def through_layer(y, x, a, b, slots_of_tokens, slots):
    """What the layer puts out where the base's puts out y; with a token less than rows, as in a graph of more; and without adapters."""
    from vllm.lora.layers.utils import LoRAMapping

    wrapper, outputs = wrapper_of(slots), []
    layer = layer_of(wrapper, a, b, lambda _: y.clone())
    adapters = (slots_of_tokens + 1).tolist()
    for of_row in (adapters, adapters[:-1], [0] * len(y)):
        wrapper.update_metadata(LoRAMapping(tuple(of_row), (0,), is_prefill=True), [slot + 1 for slot in range(slots)], slots, 100)
        outputs.append(layer.apply(x))
        if of_row is adapters:
            layer.tp_size = 2
            assert (layer.apply(x) - outputs[-1]).norm() <= 1e-6 * outputs[-1].norm(), "over several GPUs, where adapters come after the base's product"
            layer.tp_size = 1
        if len(b) == 1:
            compiled = torch.compile(lambda layer=layer: layer.apply(x), backend="eager", fullgraph=True)
            assert (compiled() - outputs[-1]).norm() <= 1e-6 * outputs[-1].norm(), "where what reads the output adds"
    return outputs


def print_order():
    """Of two layers of an attention and what is between: what the code calls that torch.compile's backend generates, with the buffers that it is given."""
    from torch._inductor import cpp_builder
    from torch._inductor.graph import GraphLowering

    torch._inductor.config.enable_auto_functionalized_v2 = False  # as vLLM has it
    gpu_lora.install()
    product = torch.library.custom_op("tuneserve_tests::product", lambda x, w: x @ w, mutates_args=(), schema="(Tensor x, Tensor w) -> Tensor")
    product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
    wrapper, layers = wrapper_of(2), []
    for inputs, widths in ((512, (256, 64)), (320, (512,))) * 2:
        a, b = [torch.randn(2, 1, 16, inputs) for _ in widths], [torch.randn(2, 1, width, 16) for width in widths]
        layers.append(layer_of(wrapper, a, b, functools.partial(product, w=torch.randn(inputs, sum(widths)))))

    def forward(x):
        for qkv_proj, o_proj in zip(layers[::2], layers[1::2], strict=True):
            q, k = qkv_proj.apply(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))).split([256, 64], -1)
            x = x + o_proj.apply(torch.cat([q.sin(), k.cos()], -1))
        return x

    def print_and_stop(code):
        calls = re.findall(
            r"^ +(?:buf\d+ = )?(?:torch\.ops\.\w+\.)?(tuneserve_\w+|product|cpp_fused\w*)(?:\.default)?\((.*)\)$", code.partition("def call(")[2], re.MULTILINE
        )
        print(json.dumps([(name, re.findall(r"\bbuf\d+\b", arguments)) for name, arguments in calls]), flush=True)
        os._exit(0)

    torch._inductor.config.cpp.vec_isa_ok, cpp_builder.get_cpp_compiler = False, lambda: "none"  # it stops before anything is compiled
    GraphLowering.save_output_code = staticmethod(print_and_stop)
    torch.compile(forward, dynamic=True, fullgraph=True)(torch.randn(5, 512))


def main():
    if "--order" in sys.argv:
        print_order()
    vllm = "--vllm" in sys.argv
    if vllm:
        gpu_lora.install()
        new_empty = torch.Tensor.new_empty  # what nothing was written to must not be read:
        torch.Tensor.new_empty = lambda self, *size, **options: new_empty(self, *size, **options).fill_(torch.nan if self.is_floating_point() else 0)
    for tokens, slots, inputs, widths, onto in CASES:
        torch.manual_seed(tokens)
        a, b = [torch.randn(slots, 1, 16, inputs) for _ in widths], [torch.randn(slots, 1, width, 16) for width in widths]
        x, y = torch.randn(tokens, inputs), torch.randn(tokens, sum(widths))
        slots_of_tokens = torch.randint(-1, slots, (tokens,)) if tokens > 1 else torch.tensor([1])
        wanted = expected(y, x, a, b, slots_of_tokens, onto)
        if vllm:
            if onto and tokens <= MOST_LAYER_TOKENS:
                changed, shorter, unchanged = through_layer(y, x, a, b, slots_of_tokens, slots)
                assert torch.equal(shorter[:-1], changed[:-1]) and torch.equal(shorter[-1], y[-1])
                assert torch.equal(unchanged, y) and torch.equal(changed[slots_of_tokens < 0], y[slots_of_tokens < 0])
                assert (changed - wanted).norm() < 1e-5 * wanted.norm()
            through_vllm(y, x, a, b, slots_of_tokens, slots, onto)
        else:
            beside = y.clone()
            shrink_expand.add(y, x, a, b, *meta(slots_of_tokens, slots), onto=onto)
            if shrink_expand.shape_for(tokens) != shrink_expand.shape_for(tokens, beside=True):
                shrink_expand.add(beside, x, a, b, *meta(slots_of_tokens, slots), onto=onto, beside=True)
                assert (y - beside).norm() < 1e-6 * wanted.norm()
        far = ((y - wanted).norm() / wanted.norm()).item()
        supported = shrink_expand.supported(tokens, inputs, 16, len(widths))
        shape = [shape for _, shape in shrink_expand.SHAPES].index(shrink_expand.shape_for(tokens))
        print(json.dumps({"tokens": tokens, "inputs": inputs, "widths": widths, "onto": onto, "supported": supported, "shape": shape, "far": far}), flush=True)


if __name__ == "__main__":
    main()
