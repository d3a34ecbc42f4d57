"""How long loading an adapter holds vLLM's steps up: read by vLLM between two steps, and read ahead beside them (adapter_worker.py), in turns, in one engine.

The base has GLM-4.5V's attention in LAYERS layers and next to no experts, on the CPU. `python -m tests.acceptance.test_adapter_reading FOLDER` is the engine, and prints a JSON line.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.acceptance.figures import show

LAYERS = 12
ADAPTERS = 13
"""The first is not counted."""
SMALL = {"n_routed_experts": 8, "moe_intermediate_size": 64, "intermediate_size": 256}


def test_what_is_read_ahead_holds_steps_up_for_less_than_half_as_long(tmp_path: Path) -> None:
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "tuneserve_cpu_moe,tuneserve_cpu_lora", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.acceptance.test_adapter_reading", str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
    )
    held_up_ms = json.loads(done.stdout.splitlines()[-1])
    medians = {way: statistics.median(times) for way, times in held_up_ms.items()}
    show(steps_held_up_ms=held_up_ms, medians=medians, ratio=medians["ahead"] / medians["between"])
    assert medians["ahead"] < medians["between"] / 2


def measure(folder: Path) -> dict[str, list[float]]:
    """Milliseconds that each load takes of the engine's own thread, by way."""
    from tests.acceptance.gpu import dimensions

    dimensions.TEXT.update(SMALL)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    from tests.acceptance.gpu.full_size_base import write
    from tests.acceptance.gpu.serve_full_size import RANK, SPREAD, write_adapter

    write(folder / "base", LAYERS)
    adapters = [write_adapter(folder / f"a{number}", LAYERS, number, SPREAD) for number in range(ADAPTERS)]
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 4, "max_cpu_loras": 16, "lora_target_modules": ["qkv_proj", "o_proj"]}
    served = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": True, "load_format": "dummy", "limit_mm_per_prompt": {"image": 0, "video": 0}}
    extension = "pipeline.serving.adapter_worker.AdapterWorker"
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder / "base"), worker_extension_cls=extension, **served, **lora))
    taken: dict[str, list[float]] = {"between": [], "ahead": []}
    for number, adapter in enumerate(adapters, 1):
        way = ("ahead", "between")[number % 2]
        seconds = 0.0
        if way == "ahead":
            began = time.perf_counter()
            engine.collective_rpc("tuneserve_read_adapter", args=(adapter.name, number, str(adapter), False))
            seconds = time.perf_counter() - began
            while not all(engine.collective_rpc("tuneserve_adapter_is_read", args=(number,))):
                time.sleep(0.005)
        began = time.perf_counter()
        assert engine.add_lora(LoRARequest(adapter.name, number, str(adapter)))
        taken[way].append(round(1000 * (seconds + time.perf_counter() - began), 1))
    return {way: times[1:] if way == "between" else times for way, times in taken.items()}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))), flush=True)
