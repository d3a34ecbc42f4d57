"""Adapters beside the base's product (gpu_lora.py) and after it, through vLLM's layers, on the GPU that is here: GLM-4.5V's attention without attention itself, FP8 per channel, rank 16, eight slots.

`python tests/acceptance/gpu/beside_base.py`, 90 s: a JSON line for each number of tokens and adapters, with microseconds of a qkv_proj and an o_proj, norms and quantizing between, all compiled
as vLLM does: without LoRA, without an adapter, adapters after the base's product, and beside it. Both ways must give the same but for rounding; where nothing is compiled rows of the base must be
as without LoRA, bit for bit; and each of REPEATS goes must give the same. With `--shapes` (a minute more) also the microseconds of each way to cut the kernel's work, which BESIDE_SHAPES in
shrink_expand.py are chosen by.
"""

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from pipeline.serving import gpu_lora, shrink_expand
from pipeline.serving.shrink_expand import Shape
from tests.acceptance.gpu.kernel_timing import microseconds, same
from tests.acceptance.gpu.tune_lora import FEW, KV, SHAPES, SLOTS, WIDTH, Bench, Q

TOKENS = (2, 4, 16, 64, 256, 512, 1024)
PAIRS = 4
"""Layers, each with weights of its own; more than the caches hold."""
REPEATS = 30
MOST_ROUNDING = 1e-3
MOST_DIFFERENCE = 0.25
"""Of what the adapters change in the output of all layers: where torch.compile adds it, sums are not rounded to bfloat16 before they are quantized to FP8 again."""
LARGEST_FP8 = 448.0
FEW_TOKENS = tuple(Shape(*cut) for cut in ((4, 64, 256, 128, 4, 2), (4, 32, 512, 128, 2, 2), (4, 16, 512, 128, 4, 3), (4, 8, 512, 128, 4, 3)))
FEW_TOKENS += tuple(
    Shape(*cut) for cut in ((16, 32, 512, 128, 4, 2), (16, 16, 512, 128, 4, 3), (16, 8, 512, 128, 4, 3), (16, 8, 512, 128, 8, 3), (16, 4, 512, 128, 8, 3))
)
MANY_TOKENS = tuple(
    Shape(*cut) for cut in ((16, 16, 512, 128, 4, 3), (32, 16, 512, 64, 4, 3), (32, 8, 512, 64, 4, 3), (32, 4, 512, 64, 4, 3), (32, 2, 512, 64, 4, 3))
)
MANY_TOKENS += tuple(Shape(*cut) for cut in ((64, 8, 256, 64, 4, 3), (64, 4, 256, 64, 4, 3), (64, 2, 256, 64, 8, 3)))

gpu_lora.install()
vllms = BaseLinearLayerWithLoRA._apply_sync.__wrapped__  # with our kernel, by our `add_lora_linear`
WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "without_lora": lambda layer, x: layer.base_layer.quant_method.apply(layer.base_layer, x, None),
    "after": vllms,
    "beside": BaseLinearLayerWithLoRA._apply_sync,
}


def product(layer: SimpleNamespace, x: Tensor, _: Tensor | None) -> Tensor:
    by_token = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-9) / LARGEST_FP8
    quantized = (x.float() / by_token).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    y: Tensor = ops.cutlass_scaled_mm(quantized, layer.weight, by_token, layer.by_output, torch.bfloat16)
    return y


class Layer(BaseLinearLayerWithLoRA):
    def __init__(self, bench: Bench, number: int, wrapper: PunicaWrapperGPU) -> None:
        nn.Module.__init__(self)
        self.lora_a_stacked, self.lora_b_stacked = tuple(bench.a[number]), tuple(bench.b[number])
        self.output_slices = bench.outputs
        self.punica_wrapper, self.tp_size = wrapper, 1
        outputs = sum(bench.outputs)
        weight = torch.randn(outputs, bench.inputs, device="cuda").to(torch.float8_e4m3fn).t()
        by_output = torch.full((1, outputs), bench.inputs**-0.5, device="cuda")
        self.base_layer = SimpleNamespace(weight=weight, by_output=by_output, quant_method=SimpleNamespace(apply=product))


def through(layers: list[tuple[Layer, Layer]], way: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def normed(x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def forward(x: Tensor) -> Tensor:
        for qkv_proj, o_proj in layers:
            q, k, v = way(qkv_proj, normed(x)).split([Q, KV, KV], -1)
            mixed = q + 0.1 * torch.cat([k, v] * (Q // KV // 2), -1)
            x = x + way(o_proj, mixed)
        return x

    return forward


def slots_of(tokens: int, adapters: int) -> Tensor:
    """Answers take turns; prompts' tokens stand together. With adapters for eight or more tokens the last eighth of them is the base's."""
    numbers = torch.arange(tokens) % adapters if tokens <= FEW[-1] else torch.arange(tokens) * adapters // tokens
    numbers[tokens - tokens // 8 :] = -1
    return numbers.int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    torch._inductor.config.combo_kernels = True  # as vLLM has it
    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=False, fully_sharded_loras=False)
    wrapper = PunicaWrapperGPU(TOKENS[-1], 256, "cuda", lora_config=config)
    benches = [Bench(slices) for slices in SHAPES]
    layers = [(Layer(benches[0], number, wrapper), Layer(benches[1], number, wrapper)) for number in range(PAIRS)]
    compiled = {name: torch.compile(through(layers, way), dynamic=True, fullgraph=True) for name, way in WAYS.items()}
    with torch.inference_mode():
        for tokens in TOKENS:
            for adapters in sorted({1, min(SLOTS, tokens)}):
                print(json.dumps({"tokens": tokens, "adapters": adapters} | compared(layers, compiled, tokens, adapters, arguments.shapes)), flush=True)


def far(output: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, of that of `wanted`."""
    return round(((output - wanted).float().norm() / wanted.float().norm()).item(), 5)


def compared(layers: list[tuple[Layer, Layer]], compiled: dict[str, Callable[[Tensor], Tensor]], tokens: int, adapters: int, shapes: bool) -> dict[str, object]:
    meta = layers[0][0].punica_wrapper.token_mapping_meta
    slots = slots_of(tokens, adapters)
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    where = f"{tokens} tokens, {adapters} adapters"

    def timed(name: str) -> float:
        for _ in range(2):
            compiled[name](x)
        return round(microseconds(lambda _: compiled[name](x), 1) / PAIRS, 2)

    def timed_as(shape: Shape) -> float:
        chosen, shrink_expand.BESIDE_SHAPES = shrink_expand.BESIDE_SHAPES, ((tokens, shape),)
        try:
            return timed("beside")
        finally:
            shrink_expand.BESIDE_SHAPES = chosen

    meta.prepare_tensors(slots.cuda())
    first = layers[0][0]
    base, after, beside = (way(first, x) for way in WAYS.values())
    if not same(beside, after, MOST_ROUNDING) or not torch.equal(base[slots.cuda() < 0], beside[slots.cuda() < 0]) or torch.equal(base, after):
        raise SystemExit(f"{where}: adapters beside the base's product give another output than after it")
    outputs = {name: run(x) for name, run in compiled.items()}
    changed = far(outputs["after"], outputs["without_lora"])
    difference = far(outputs["beside"], outputs["after"])
    found: dict[str, object] = {"change": changed, "difference": difference}
    if difference > MOST_DIFFERENCE * changed:
        raise SystemExit(f"{where}: compiled, adapters beside the base's product give another output than after it: {found}")
    found |= {f"{name}_us": timed(name) for name in ("after", "beside")}
    if shapes:
        found["by_shape_us"] = [(*shape, timed_as(shape)) for shape in (FEW_TOKENS if tokens <= FEW[-1] else MANY_TOKENS)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled["beside"](x)
    for _ in range(REPEATS):
        output.zero_()
        graph.replay()
        if not torch.equal(output, outputs["beside"]):
            raise SystemExit(f"{where}: another output each time")
    meta.no_lora_flag_cpu[0] = True
    meta.token_lora_mapping.fill_(-1)
    if far(compiled["beside"](x), outputs["without_lora"]) > MOST_DIFFERENCE * changed:
        raise SystemExit(f"{where}: without adapters the output is another than without LoRA")
    found |= {f"{name}_us": timed(way) for name, way in (("without_lora", "without_lora"), ("no_adapter", "beside"), ("no_adapter_after", "after"))}
    return found


if __name__ == "__main__":
    main()
