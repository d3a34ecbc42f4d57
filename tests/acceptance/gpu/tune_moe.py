"""Tunes vLLM's kernel for routed experts (Triton's fused MoE, which a server with adapters uses) for GLM-4.5V's experts on the GPU that is here.

`python tests/acceptance/gpu/tune_moe.py FOLDER` writes what vLLM reads from $VLLM_TUNED_CONFIG_FOLDER, `E=128,N=1408,device_name=...json`, anew after each number of tokens;
it prints a line for each with the microseconds a layer of vLLM's default and of the choice. Both matrix products of an expert take the same configuration; routing is even, weights and
inputs are random; the output must equal the default's but for rounding. FP8 per tensor, whole experts on one GPU. Stops choosing after --seconds.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from vllm.model_executor.layers.fused_moe import fused_experts, override_config
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name, get_default_config

from tests.acceptance.gpu.kernel_timing import microseconds, same

WIDTH, EXPERTS, CHOSEN, INNER = 4096, 128, 8, 1408
DTYPE = "fp8_w8a8"
"""As vLLM calls it."""
LAYERS = 3
"""Sets of weights: 2.2 GB each."""
TOKENS = (1024, 16, 64, 512, 1, 256, 4, 128, 32, 768, 384, 8, 96, 2, 48, 24, 192, 2048, 8192, 4096)
"""In the order in which they are chosen; vLLM takes the nearest that there is."""
NAIVE = 4
"""Up to so many tokens vLLM gives each chosen expert a block of its own; these launches, and that of one token, are compiled apart."""
MOST_DIFFERENCE = 2e-2
Config = dict[str, int]


def candidates(tokens: int) -> list[Config]:
    """Blocks of rows about as high as an expert has tokens, or twice; for few tokens, which read weights and do little else, many shapes of the weights' block."""
    rows = tokens * CHOSEN // EXPERTS
    found: list[Config] = []
    widths: tuple[int, ...]
    stages: tuple[int, ...]
    for height in (16, 32, 64, 128):
        if not (rows / 2 <= height <= max(2 * rows, 16) or (height == 128 and rows > 256)):
            continue
        depths = {16: (128, 256), 32: (128, 256), 64: (64, 128, 256), 128: (64, 128)}[height]
        widths, stages = ((64, 128, 256), (2, 3, 4))
        if height == 16:
            widths, stages = ((64, 128), (3, 4, 5)) if tokens <= NAIVE else ((64, 128, 256), (2, 3, 4, 5))
        for width, depth, warps, count in itertools.product(widths, depths, (4, 8), stages):
            if warps == 4 or width >= 128:
                sizes = {"BLOCK_SIZE_M": height, "BLOCK_SIZE_N": width, "BLOCK_SIZE_K": depth, "GROUP_SIZE_M": 1}
                found.append(sizes | {"num_warps": warps, "num_stages": count})
    return found


class Experts:
    """Some layers' routed experts as one GPU has them."""

    def __init__(self, layers: int = LAYERS) -> None:
        torch.manual_seed(1)
        self.layers = layers
        self.up = [self.weights(2 * INNER, WIDTH) for _ in range(layers)]
        self.down = [self.weights(WIDTH, INNER) for _ in range(layers)]
        scales = torch.full((EXPERTS,), 0.02, device="cuda")
        self.quantized = fp8_w8a8_moe_quant_config(scales, scales)

    def weights(self, outputs: int, inputs: int) -> torch.Tensor:
        made = torch.empty(EXPERTS, outputs, inputs, device="cuda", dtype=torch.float8_e4m3fn)
        for expert in made:
            expert.copy_(torch.randn(outputs, inputs, device="cuda"))
        return made

    def launch(self, tokens: int) -> Any:
        states = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        chosen = [torch.rand(tokens, EXPERTS, device="cuda").topk(CHOSEN).indices.int() for _ in range(self.layers)]
        shares = torch.full((tokens, CHOSEN), 1 / CHOSEN, device="cuda")
        return lambda number: fused_experts(states, self.up[number], self.down[number], shares, chosen[number], quant_config=self.quantized)


def compile_share(share: tuple[int, int]) -> None:
    """Each candidate once for each way in which it is compiled, so that Triton's cache on disk has it."""
    number, workers = share
    experts = Experts(layers=1)
    points = {(1 if tokens == 1 else NAIVE if tokens <= NAIVE else 1024, json.dumps(config)) for tokens in TOKENS for config in candidates(tokens)}
    for tokens, config in sorted(points)[number::workers]:
        with override_config(json.loads(config)), contextlib.suppress(OutOfResources):
            experts.launch(tokens)(0)
    torch.cuda.synchronize()


def timed(experts: Experts, tokens: int, config: Config, wanted: torch.Tensor, run: Any) -> float:
    """Microseconds of a layer's experts; infinite where the GPU has no room for this configuration, or computes something else with it."""
    with override_config(config):
        try:
            output = run(0)
        except OutOfResources:
            return float("inf")
        if not same(output, wanted, MOST_DIFFERENCE):
            print(json.dumps({"tokens": tokens, "computes something else": config}), flush=True)
            return float("inf")
        return microseconds(run, experts.layers)


def choose(experts: Experts, tokens: int) -> dict[str, Any]:
    """The fastest; another than the default must gain two hundredths."""
    default, run = dict(get_default_config(tokens, EXPERTS, INNER, WIDTH, CHOSEN, DTYPE)), experts.launch(tokens)
    with override_config(default):
        wanted = run(0).clone()
    times = [(config, timed(experts, tokens, config, wanted, run)) for config in (default, *candidates(tokens))]
    best = min(times, key=lambda each: each[1])
    best = best if best[1] < 0.98 * times[0][1] else times[0]
    return {"tokens": tokens, "default_us": round(times[0][1], 1), "best_us": round(best[1], 1), "default": default, "config": best[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--workers", type=int, default=28)
    arguments = parser.parse_args()
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(compile_share, [(number, arguments.workers) for number in range(arguments.workers)])
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    experts = Experts()
    found: dict[int, Config] = {}
    path = arguments.folder / get_config_file_name(EXPERTS, INNER, DTYPE)
    for tokens in TOKENS:
        if time.monotonic() - began > arguments.seconds:
            break
        chosen = choose(experts, tokens)
        print(json.dumps(chosen | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
        found[tokens] = chosen["config"]
        path.write_text(json.dumps({str(key): found[key] for key in sorted(found)}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
