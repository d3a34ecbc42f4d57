"""What one step of answering is on the GPU, kernel by kernel, in an engine of this process: GLM-4.5V's true width, few layers, random weights, served as the shipped recipe for one H200 serves.

`VLLM_PLUGINS=tuneserve_gpu_lora,tuneserve_lora_indices python tests/acceptance/gpu/step_kernels.py --set '{"quantization": "fp8_per_tensor"}'`, two minutes: for a step of one request and of
sixteen, of the base, one adapter and eight, microseconds from one layer's attention to the next one's, and a middle layer's kernels in the order that they began in, with begin, length and name.
vLLM's own profiler fails on a server of all layers.
"""

import argparse
import json
import os
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from pipeline.recipe import ServingRecipe
from pipeline.serving.launch import serve_args
from tests.acceptance.gpu.serve_full_size import prepare, recipe_of

ADAPTERS = 8
PROMPT_TOKENS, ANSWER_TOKENS = 60, 14
LAYER = "reshape_and_cache"
"""In the name of the kernel that each layer's attention launches once: it writes keys and values into the cache."""


def engine_of(folder: Path, layers: int, settings: dict[str, Any]) -> LLMEngine:
    recipe = recipe_of(layers, ["m0"], {"gpu_memory_utilization": 0.8, "max_model_len_tokens": 4096, **settings})
    args = serve_args(ServingRecipe.model_validate(recipe), folder / "models" / f"layers-{layers}", 8000)
    known, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(args)
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(known))


class Asker:
    """Asks for answers, all at once; each question is another one, as the engine knows those it had."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._asked = 0

    def __call__(self, adapters: list[LoRARequest | None]) -> None:
        for adapter in adapters:
            self._asked += 1
            prompt: Any = {"prompt_token_ids": [1000 + (37 * self._asked + place * place) % 5000 for place in range(PROMPT_TOKENS)]}
            params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0)
            self._engine.add_request(f"r{self._asked}", prompt, params, lora_request=adapter)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def layers_of(ask: Asker, adapters: list[LoRARequest | None]) -> dict[str, Any]:
    """The layers of all answering steps but the last, which is cut off, and one layer's kernels. Times in microseconds."""
    ask(adapters)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ask(adapters)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((event.time_range.start, event.time_range.end - event.time_range.start, event.name[:100]) for event in events)
    starts = [place for place, kernel in enumerate(kernels) if LAYER in kernel[2]]
    lengths = [kernels[after][0] - kernels[before][0] for before, after in pairwise(starts)]
    typical = statistics.median(lengths)
    middle = min(range(len(lengths) // 2, len(lengths)), key=lambda place: abs(lengths[place] - typical))
    begin = kernels[starts[middle]][0]
    layer = [(round(start - begin, 2), round(length, 2), name) for start, length, name in kernels[starts[middle] : starts[middle + 1]]]
    return {"layer_us": round(typical, 1), "layers_us": [round(length, 1) for length in lengths], "kernels": layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuneserve-step-kernels"))  # noqa: S108 (a machine of one's own)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--set", type=json.loads, default={}, help="changed settings of the recipe, as a JSON object")
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folders = prepare(arguments.folder, arguments.layers, ADAPTERS)
    adapters = [LoRARequest(f"a{number}", number + 1, str(folder)) for number, folder in enumerate(folders)]
    ask = Asker(engine_of(arguments.folder, arguments.layers, arguments.set))
    cases: dict[str, list[LoRARequest | None]] = {"base, 1": [None], "one, 1": [adapters[0]]}
    cases |= {"base, 16": [None] * 16, "one, 16": [adapters[0]] * 16, "eight, 16": [*adapters, *adapters]}
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "layers": arguments.layers, "settings": arguments.set}
    for name, who in cases.items():
        found[name] = layers_of(ask, who)
        print(name, found[name]["layer_us"], "us a layer", flush=True)
        arguments.out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
