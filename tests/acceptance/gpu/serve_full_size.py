"""GLM-4.5V at its true width behind `tuneserve serve`, with random weights and adapters: makes what is served, starts it, and leaves it running for `tuneserve bench`.

`python tests/acceptance/gpu/serve_full_size.py up --layers 46` writes the base without weights and random attention adapters, registers these in MLflow as champions of models of their own
(the first model has further versions, for alias moves), starts `tuneserve serve`, and ends once the replica is ready. `plain` starts the same server without LoRA, elsewhere. `adapters` only writes base and adapters.
See README.md here for what the machine needs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipeline.project import Project
from tests.acceptance.gpu.dimensions import TEXT
from tests.acceptance.gpu.full_size_base import know_digests, write

RANK = 16
SPREAD = {"lora_A": 0.009, "lora_B": 0.004}
"""Standard deviation of an adapter's weights: A as PEFT begins it for 4096 inputs (1 / sqrt(3 * 4096)), B as a few hundred steps might leave it: a projection changes by about 1.5 %. Of STRONG, 16 %: eight such adapters
in one batch cost more, most likely as they choose more different experts than eight requests of one do."""
STRONG = {"lora_A": 0.02, "lora_B": 0.02}
EXPERTS_SPREAD = {"lora_A": 0.02, "lora_B": 0.1}
"""For routed experts, which make up little of what layers with random weights add: with six layers on the CPU this moves a prompt's log-probabilities by up to 0.9, SPREAD by 0.05, which is refused as no-effect."""
EXPERTS_LORA = {"target_modules": ["qkv_proj", "o_proj", "experts"], "max_loras": 4}
"""Eight slots of 2.9 GiB leave no room on one H200."""
SHIPPED = Path("recipes/serving/glm-4.5v-h200-fp8.yaml")
READY_SECONDS = 500.0


def write_adapter(folder: Path, layers: int, seed: int, spread: dict[str, float]) -> Path:
    """A PEFT adapter of rank 16 on every layer's attention: 63 MB with 46 layers."""
    dice = np.random.default_rng(seed)
    head, heads, groups, width = TEXT["head_dim"], TEXT["num_attention_heads"], TEXT["num_key_value_heads"], TEXT["hidden_size"]
    sizes = {"q_proj": (width, heads * head), "k_proj": (width, groups * head), "v_proj": (width, groups * head), "o_proj": (heads * head, width)}
    tensors = {}
    for layer in range(layers):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                tensors[f"{name}.{part}.weight"] = (dice.standard_normal(shape, np.float32) * spread[part]).astype(np.float16)
    return save_adapter(folder, tensors, RANK, {"target_modules": sorted(sizes)})


def write_expert_adapter(folder: Path, layers: int, seed: int) -> Path:
    """As peft 0.20 saves an adapter of rank 8 of the routed experts, gate and up fused at twice the rank: 40 MB a layer, 1.8 GB with 46 layers."""
    dice = np.random.default_rng(seed)
    rank, experts, width, inner = RANK // 2, TEXT["n_routed_experts"], TEXT["hidden_size"], TEXT["moe_intermediate_size"]
    shapes = {"base_layer.lora_A": (2 * rank * experts, width), "base_layer.lora_B": (2 * inner, 2 * rank * experts)}
    shapes |= {"lora_A": (rank * experts, inner), "lora_B": (width, rank * experts)}
    tensors = {}
    for layer in range(TEXT["first_k_dense_replace"], layers):
        for part, shape in shapes.items():
            values = dice.standard_normal(shape, np.float32) * EXPERTS_SPREAD[part.removeprefix("base_layer.")]
            tensors[f"base_model.model.model.language_model.layers.{layer}.mlp.experts.{part}.weight"] = values.astype(np.float16)
    patterns = {f"{kind}_pattern": {r".*\.gate_up_proj": of * rank} for kind, of in (("rank", 2), ("alpha", 4))}
    return save_adapter(folder, tensors, rank, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], **patterns})


def save_adapter(folder: Path, tensors: dict[str, NDArray[np.float16]], rank: int, targets: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none"}
    config |= {"base_model_name_or_path": "GLM-4.5V", "inference_mode": True} | targets
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def recipe_of(layers: int, models: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The shipped recipe for one H200, with this base and these models."""
    shipped: dict[str, Any] = yaml.safe_load(SHIPPED.read_text("utf-8"))
    lora = shipped["lora"] | settings.pop("lora", {})
    return shipped | {"name": f"layers-{layers}", "base_model": f"models/layers-{layers}", "follow": models} | settings | {"lora": lora}


def prepare(folder: Path, layers: int, adapters: int, spread: dict[str, float] = SPREAD, faint: int | None = None, experts: int = 0) -> list[Path]:
    """Base, `adapters` of attention and then `experts` of routed experts; that of number `faint` changes a tenth of what the others do: what a batch costs with it is not due to the experts that it
    chooses."""
    base = folder / "models" / f"layers-{layers}"
    if not base.is_dir():
        write(base, layers)
        know_digests(base, Project(folder).bases / "digests.json")
    spreads = [spread | {"lora_B": spread["lora_B"] / 10} if number == faint else spread for number in range(adapters)]
    made = [write_adapter(folder / "adapters" / f"a{number}", layers, number, each) for number, each in enumerate(spreads)]
    return made + [write_expert_adapter(folder / "adapters" / f"e{number}", layers, number) for number in range(experts)]


def register(folder: Path, layers: int, adapters: list[Path], versions: int) -> list[str]:
    """Registers each adapter, the first models' first; the last `versions` are further versions of the first model. The names of the models."""
    from pipeline.adapter import read_adapter
    from pipeline.basemodel import resolve_base_model, template_digest
    from pipeline.registry import Registry

    registry = Registry(os.environ["MLFLOW_TRACKING_URI"])
    base = resolve_base_model(f"models/layers-{layers}", Project(folder), lambda *_: None)
    models = [f"m{number}" for number in range(len(adapters) - versions)]
    for model, adapter in zip([*models, *models[:1] * versions], adapters, strict=True):
        with registry.run(model, {}, {}) as run:
            registry.register(model, run.run_id, read_adapter(adapter), {}, base.revision, template_digest(), f"random {adapter.name}")
    for model in models:
        registry.move_champion(model, "1")
    return models


def start(folder: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    (folder / f"{name}.pid").write_text(f"{child.pid}\n", "utf-8")
    return child


def up(folder: Path, layers: int, adapters: list[Path], versions: int, ports: tuple[int, int], settings: dict[str, Any]) -> dict[str, Any]:
    """`ports`: the replica's and MLflow's."""
    port, mlflow_port = ports
    began = time.monotonic()
    os.environ["TUNESERVE_PROJECT"] = str(folder)
    store = f"sqlite:///{folder}/mlflow.db"
    where = ["--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1"]
    where += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "mlruns")]
    start(folder, "mlflow", [sys.executable, "-m", "mlflow", "server", *where])
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{mlflow_port}"
    while time.monotonic() - began < READY_SECONDS and not answers(f"http://127.0.0.1:{mlflow_port}/health"):
        time.sleep(0.5)
    models = register(folder, layers, adapters, versions)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(layers, models, {"port": port, **settings})), "utf-8")
    booted = time.monotonic()
    child = start(folder, "serve", [sys.executable, "-m", "pipeline.cli", "serve", "recipe.yaml"])
    while time.monotonic() - booted < READY_SECONDS and child.poll() is None:
        if answers(f"http://127.0.0.1:{port}/health"):  # after the first sync
            return {"registered_seconds": round(booted - began, 1), "boot_seconds": round(time.monotonic() - booted, 1)}
        time.sleep(0.5)
    logs = [folder / "serve.log", *sorted((folder / ".tuneserve").rglob("vllm-*.log"))]
    raise SystemExit("\n".join(f"{path}:\n{path.read_text('utf-8', 'replace')[-4000:]}" for path in logs))


def plain(folder: Path, layers: int, port: int, settings: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """The same server without LoRA engine and plugins, for `bench serve --arm plain=http://127.0.0.1:PORT#glm-4.5v`; its log is plain.log. `arguments`: more of vLLM's.

    Without LoRA vLLM may choose other kernels for the experts: of FP8 per channel CUTLASS's, which know no LoRA; `--moe-backend triton` has it use the same.
    """
    from pipeline.recipe import ServingRecipe
    from pipeline.serving.launch import serve_args

    prepare(folder, layers, 0)
    args = serve_args(ServingRecipe.model_validate(recipe_of(layers, ["none"], {"port": port, **settings})), folder / "models" / f"layers-{layers}", port)
    begin, end = args.index("--enable-lora"), args.index("--worker-extension-cls") + 2
    os.environ["VLLM_PLUGINS"] = ""
    booted = time.monotonic()
    child = start(folder, "plain", [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *args[:begin], *args[end:], *arguments])
    while time.monotonic() - booted < READY_SECONDS and child.poll() is None:
        if answers(f"http://127.0.0.1:{port}/health"):
            return {"boot_seconds": round(time.monotonic() - booted, 1)}
        time.sleep(0.5)
    raise SystemExit((folder / "plain.log").read_text("utf-8", "replace")[-4000:])


def answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("up", "plain", "adapters"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuneserve-full-size"))  # noqa: S108 (a machine of one's own)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--versions", type=int, default=2, help="further ones of the first model, for alias moves")
    parser.add_argument("--strong", action="store_true", help="adapters that change much (see SPREAD)")
    parser.add_argument("--b-std", type=float, help="standard deviation of the adapters' B, in place of these")
    parser.add_argument("--faint", action="store_true", help="the last model's adapter changes a tenth of what the others' do")
    parser.add_argument("--experts", action="store_true", help="of `up`: the further versions adapt routed experts, which the server wraps too, in four slots")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--mlflow-port", type=int, default=5005)
    parser.add_argument("--vllm", type=str.split, default=[], help="of `plain`: more arguments for vLLM, in one word")
    parser.add_argument("--set", type=json.loads, default={}, help="changed settings of the recipe, as a JSON object")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    spread = STRONG if arguments.strong else SPREAD
    if arguments.b_std is not None:
        spread = spread | {"lora_B": arguments.b_std}
    if arguments.what == "adapters":
        print(prepare(arguments.folder, arguments.layers, arguments.adapters, spread))
    elif arguments.what == "plain":
        print(json.dumps(plain(arguments.folder, arguments.layers, arguments.port, arguments.set, arguments.vllm)), flush=True)
    else:
        ports = (arguments.port, arguments.mlflow_port)
        faint = arguments.adapters - 1 if arguments.faint else None
        experts = arguments.versions if arguments.experts else 0
        adapters = prepare(arguments.folder, arguments.layers, arguments.adapters + arguments.versions - experts, spread, faint, experts)
        if arguments.experts:
            arguments.set["lora"] = EXPERTS_LORA | arguments.set.get("lora", {})
        print(json.dumps(up(arguments.folder, arguments.layers, adapters, arguments.versions, ports, arguments.set)), flush=True)


if __name__ == "__main__":
    main()
