"""Tunes vLLM's LoRA kernels (shrink and expand) for GLM-4.5V's attention on the GPU that is here, for one adapter in a batch and for as many as there are slots.

`python tests/acceptance/gpu/tune_lora.py FOLDER` writes what vLLM reads from $VLLM_TUNED_CONFIG_FOLDER: GPU_SHRINK.json and GPU_EXPAND_TRUE.json, by slots, slices, tokens and shape;
it prints a line for each with the microseconds of vLLM's default and of the choice. A choice is the least sum of both cases' times, and its output must equal the default's but for
rounding. Times are medians of CUDA graphs that go through ADAPTER_SETS layers' weights, as a model does, so that no cache holds them. Stops choosing after --seconds.

`--compare` chooses nothing: the same lines for the configurations that FOLDER has for this GPU (or for the GPU that `--of` names).
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
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.ops.triton_ops.utils import get_lora_op_configs

from tests.acceptance.gpu.kernel_timing import microseconds, same

WIDTH, Q, KV, RANK, SLOTS = 4096, 12288, 1024, 16, 8
SHAPES = {3: (WIDTH, (Q, KV, KV)), 1: (Q, (WIDTH,))}
"""By number of slices (qkv_proj and o_proj): inputs, and outputs of each slice."""
FEW, MANY = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048, 8192)
ADAPTER_SETS = 8
FILES = {"shrink": "SHRINK", "expand": "EXPAND_TRUE"}
"""By kernel, how vLLM calls its configurations' file."""
MOST_DIFFERENCE = {"shrink": 1e-3, "expand": 1e-2}
"""Of the norm: float32 sums in another order, bfloat16."""
Config = dict[str, Any]


def candidates(op: str, tokens: int) -> list[Config]:
    rest = {"num_ctas": 1, "max_nreg": None}
    if op == "shrink" and tokens <= FEW[-1]:
        space = itertools.product((16,), (128, 256, 512), (1, 4, 8, 16, 32), (2, 4), (2, 4))
    elif op == "shrink":
        space = itertools.product((32, 64), (64, 128), (1, 4, 8), (4,), (2, 4))
    elif tokens <= FEW[-1]:
        space = itertools.product((16,), (64, 128, 256), (16,), (2, 4), (1, 2))
    else:
        space = itertools.product((32, 64), (64, 128, 256), (16,), (4, 8), (1, 2))
    if op == "shrink":
        names = ("block_m", "block_k", "split_k", "num_warps", "num_stages")
        return [dict(zip(names, point, strict=True)) | rest | {"block_n": 16, "group_size_m": 8} for point in space]
    return [dict(zip(("block_m", "block_n", "block_k", "num_warps", "num_stages"), point, strict=True)) | rest for point in space]


def weights(outputs: int, inputs: int) -> torch.Tensor:
    """Of all slots."""
    return torch.randn(SLOTS, 1, outputs, inputs, device="cuda", dtype=torch.bfloat16) / 50


class Bench:
    """The kernels of one module: its layers' weights, and what is put through them."""

    def __init__(self, slices: int, gpus: int = 1) -> None:
        torch.manual_seed(slices)
        self.slices, (self.inputs, self.outputs) = slices, SHAPES[slices]
        if slices == 1:
            self.inputs //= gpus
        else:
            self.outputs = tuple(width // gpus for width in self.outputs)
        self.a = [[weights(RANK, self.inputs) for _ in self.outputs] for _ in range(ADAPTER_SETS)]
        self.b = [[weights(width, RANK) for width in self.outputs] for _ in range(ADAPTER_SETS)]

    def meta(self, tokens: int, adapters: int) -> tuple[Any, ...]:
        meta = LoRAKernelMeta.make(SLOTS, tokens, "cuda")
        # Decoding gives each token the adapter of its request; a prompt's tokens stand together.
        numbers = torch.arange(tokens) % adapters if tokens <= FEW[-1] else torch.arange(tokens) * adapters // tokens
        meta.prepare_tensors(numbers.int().cuda())
        return meta.meta_args(tokens, False)  # as `tuneserve serve` has it: room for every slot and the base, however many are in the batch

    def launch(self, op: str, tokens: int, adapters: int) -> Any:
        """A function that runs the kernel on one set of weights, and the output that it writes to."""
        meta = self.meta(tokens, adapters)
        states = torch.randn(tokens, self.inputs, device="cuda", dtype=torch.bfloat16)
        small = torch.randn(self.slices, tokens, RANK, device="cuda", dtype=torch.float32)
        wide = torch.zeros(tokens, sum(self.outputs), device="cuda", dtype=torch.bfloat16)
        if op == "shrink":
            return lambda number: lora_shrink_op._lora_shrink(states, self.a[number], small, *meta, 1.0), small
        return lambda number: lora_expand_op._lora_expand(small, self.b[number], wide, *meta, add_inputs=True), wide

    def default(self, op: str, tokens: int) -> Config:
        hidden = self.inputs if op == "shrink" else max(self.outputs)
        return dict(get_lora_op_configs(op, SLOTS + 1, tokens, hidden, RANK, self.slices, None if op == "shrink" else True))


def use(config: Config) -> None:
    lora_shrink_op.get_lora_op_configs = lora_expand_op.get_lora_op_configs = lambda *_, **__: config


def compile_share(share: tuple[int, int]) -> None:
    """Each candidate once, so that Triton's cache on disk has it."""
    number, workers = share
    benches = {slices: Bench(slices) for slices in SHAPES}
    points = [(op, slices, tokens, c) for op in ("shrink", "expand") for slices in SHAPES for tokens in (FEW[-1], MANY[0]) for c in candidates(op, tokens)]
    for op, slices, tokens, config in points[number::workers]:
        run, _ = benches[slices].launch(op, tokens, SLOTS)
        use(config)
        with contextlib.suppress(OutOfResources):
            run(0)
    torch.cuda.synchronize()


def timed(bench: Bench, op: str, tokens: int, adapters: int, config: Config, default: Config) -> float:
    """Microseconds of a launch; infinite where the GPU has no room for this configuration. Raises SystemExit if its output is another than the default's."""
    run, output = bench.launch(op, tokens, adapters)
    outputs = []
    for each in (default, config):
        use(each)
        output.zero_()
        try:
            run(0)
        except OutOfResources:
            return float("inf")
        outputs.append(output.clone())
    if not same(outputs[1], outputs[0], MOST_DIFFERENCE[op]):
        raise SystemExit(f"{op} of {tokens} tokens, {adapters} adapters: another output with {config} than with {default}")
    return microseconds(run, ADAPTER_SETS)


def choose(bench: Bench, op: str, tokens: int) -> dict[str, Any]:
    """The configuration with the least sum over one adapter and as many as there are slots; another than the default must gain a hundredth."""
    default = bench.default(op, tokens)
    counts = sorted({1, min(SLOTS, tokens)})
    times = [(config, [timed(bench, op, tokens, adapters, config, default) for adapters in counts]) for config in [default, *candidates(op, tokens)]]
    best = min(times, key=lambda each: sum(each[1]))
    best = best if sum(best[1]) < 0.99 * sum(times[0][1]) else times[0]
    return {"default_us": [round(each, 2) for each in times[0][1]], "best_us": [round(each, 2) for each in best[1]], "config": best[0]}


def compare(folder: Path, gpu: str) -> None:
    benches = {slices: Bench(slices) for slices in SHAPES}
    for op, file in FILES.items():
        of_slices = json.loads((folder / f"{gpu}_{file}.json").read_text("utf-8"))[str(SLOTS + 1)]
        for slices, tokens in itertools.product(SHAPES, (*FEW, *MANY)):
            ((config,),) = (of_k.values() for of_k in of_slices[str(slices)][str(tokens)].values())
            default = benches[slices].default(op, tokens)
            us = {
                adapters: [timed(benches[slices], op, tokens, adapters, each, default) for each in (default, config)]
                for adapters in sorted({1, min(SLOTS, tokens)})
            }
            print(
                json.dumps(
                    {
                        "op": op,
                        "slices": slices,
                        "tokens": tokens,
                        "default_us": [round(each[0], 2) for each in us.values()],
                        "configured_us": [round(each[1], 2) for each in us.values()],
                    }
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--of", metavar="GPU", help="whose configurations to compare, as in their files' names")
    arguments = parser.parse_args()
    began = time.monotonic()
    gpu = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    if arguments.compare:
        return compare(arguments.folder, arguments.of or gpu)
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(compile_share, [(number, arguments.workers) for number in range(arguments.workers)])
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    benches = {slices: Bench(slices) for slices in SHAPES}
    found: dict[str, Any] = {"shrink": {}, "expand": {}}
    for tokens in (16, 64, 4, 1, 32, 8, 2, *MANY):
        for slices, bench in benches.items():
            for op, file in FILES.items():
                if time.monotonic() - began > arguments.seconds:
                    return
                chosen = choose(bench, op, tokens)
                print(json.dumps({"op": op, "slices": slices, "tokens": tokens} | chosen), flush=True)
                k, n = (bench.inputs, RANK) if op == "shrink" else (RANK, max(bench.outputs))
                of_slots = found[op].setdefault(str(SLOTS + 1), {})
                of_slots.setdefault(str(slices), {}).setdefault(str(tokens), {}).setdefault(str(k), {})[str(n)] = chosen["config"]
                path = arguments.folder / f"{gpu}_{file}.json"
                path.unlink(missing_ok=True)  # it may be a link to another GPU's
                path.write_text(json.dumps(found[op], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
