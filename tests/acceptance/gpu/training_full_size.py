"""LoRA and QLoRA of GLM-4.5V at its true width on one GPU: memory, seconds a step and tokens a second, with the plugins that our recipes give ms-swift. See README.md here.

`run` loads a model of random weights through transformers with 4-bit linears and experts, from a safetensors checkpoint that it writes first (`--source disk`: the
streaming itself; 8 layers are 36 GB) or from tensors that are made when transformers reads them (`--source made`: the same conversions, all 46 layers on one GPU),
and trains a LoRA for a few steps at each length. `extrapolate` draws a line through the numbers of layers that were run. Answers mean nothing here.

Needs torch, transformers >= 5.17, peft, safetensors and bitsandbytes; no ms-swift and no network. What ms-swift does around it is done as it does: autocast to bfloat16,
reentrant gradient checkpointing, one row, AdamW on the adapter in float32.
"""

import argparse
import gc
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

from pipeline import swift_chunked_loss, swift_expert_nf4  # noqa: F401 (it takes its place when it is imported)
from tests.acceptance.gpu.dimensions import DEVICE, Made, checkpoint_of, true_config

GIB = 2**30
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTED = {"attention": ATTENTION, "vision": [*ATTENTION, "attn.qkv", "attn.proj", "merger.proj"], "experts": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}
IMAGE_TOKENS = 256
"""Of a picture of 448x448: 32x32 patches, four to a token."""


def write_checkpoint(config: Glm4vMoeConfig, folder: Path) -> None:
    """A file for each decoder layer, and one for the rest."""
    config.save_pretrained(folder)
    files: defaultdict[str, list[Made]] = defaultdict(list)
    for name, made in checkpoint_of(config).items():
        _, layer, rest = name.partition("language_model.layers.")
        files[f"model-{int(rest.partition('.')[0]) + 1 if layer else 0:05d}.safetensors"].append(made)
    for file, members in files.items():
        save_file({made.name: made[...].cpu() for made in members}, folder / file, metadata={"format": "pt"})
    placed = {made.name: file for file, members in files.items() for made in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}), "utf-8")


def load(config: Glm4vMoeConfig, folder: Path | None, *, quantized: bool) -> Any:
    """Quantized, if so, while it is read, as ms-swift has it loaded for our arguments."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["mlp.gate", "model.visual", "lm_head"],
    )
    source = {"pretrained_model_name_or_path": folder} if folder else {"pretrained_model_name_or_path": None, "state_dict": checkpoint_of(config)}
    options = {"config": config, "dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    options |= {"quantization_config": quantization} if quantized else {}
    return Glm4vMoeForConditionalGeneration.from_pretrained(**source, **options, attn_implementation="sdpa")


@contextmanager
def host_memory() -> Iterator[list[int]]:
    """The bytes of this process's own memory (files that are mapped, as checkpoints are, do not count), sampled."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            lines = Path("/proc/self/status").read_text("utf-8").splitlines()
            samples.extend(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def gpu_memory() -> dict[str, float]:
    """GiB on the GPU: now, and at most since the last reset; empty without one."""
    if DEVICE == "cpu":
        return {}
    torch.cuda.synchronize()
    now, peak, reserved = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {"allocated_gib": now / GIB, "peak_gib": peak / GIB, "peak_reserved_gib": reserved / GIB}


def experts_of(model: Any) -> dict[str, Any]:
    """What the routed experts are held in."""
    held = [module.parametrizations[name].original for module in model.modules() if parametrize.is_parametrized(module) for name in module.parametrizations]
    return {
        "expert_weights": len(held),
        "expert_gib": sum(weight.nbytes for weight in held) / GIB,
        "expert_dtypes": sorted({str(weight.dtype) for weight in held}),
    }


def with_adapter(model: Any, modules: list[str], *, checkpointing: bool) -> Any:
    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=modules))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    if "attn.qkv" in modules:  # as ms-swift does: what is checkpointed with reentry learns only from an input that has a gradient
        model.model.visual.patch_embed.register_forward_hook(lambda module, given, made: made.requires_grad_(True))
    model.config.use_cache = False
    return adapted.train()


def one_row(config: Glm4vMoeConfig, tokens: int, images: int) -> dict[str, Any]:
    """A row of random words, with `images` pictures of 448x448 (256 tokens each) at its beginning; every other token is learnt, the most that a row can take."""
    torch.manual_seed(7)
    ids = torch.randint(0, 2000, (1, tokens), device=DEVICE)
    kinds = torch.zeros_like(ids)
    for start in range(0, images * (IMAGE_TOKENS + 2), IMAGE_TOKENS + 2):
        end = start + IMAGE_TOKENS + 1
        ids[0, start], ids[0, end] = config.image_start_token_id, config.image_end_token_id
        ids[0, start + 1 : end], kinds[0, start + 1 : end] = config.image_token_id, 1
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(kinds == 1, -100), "mm_token_type_ids": kinds.int()}
    if images:
        vision = config.vision_config
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        row["pixel_values"] = torch.randn(images * IMAGE_TOKENS * 4, numbers, device=DEVICE)
        row["image_grid_thw"] = torch.tensor([[1, 32, 32]] * images, device=DEVICE)
    return row


def train(model: Any, row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Steps on one row. The first step, which is slower, is not timed."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4)
    losses, seconds = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(**row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    typical = statistics.median(seconds[1:])
    return {"losses": losses, "step_seconds": seconds, "typical_step_seconds": typical, "tokens_per_second": row["input_ids"].numel() / typical}


def run(arguments: argparse.Namespace) -> None:
    config = true_config(arguments.layers, tiny=arguments.tiny)
    about: dict[str, Any] = {"layers": arguments.layers, "source": arguments.source, "loss": arguments.loss}
    about |= {"base": arguments.base, "adapts": arguments.adapt, "checkpointing": not arguments.no_checkpointing}
    if arguments.offload:
        import_module("pipeline.swift_offload_checkpoints")  # it takes its place by itself
        about["offload"] = True
    about["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    if arguments.loss == "plain":
        Glm4vMoeForConditionalGeneration.forward = swift_chunked_loss.plain_forward

    def tell(**figures: Any) -> None:
        line = json.dumps(about | {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()})
        print(line, flush=True)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    folder = arguments.folder / f"layers-{arguments.layers}" if arguments.source == "disk" else None
    if folder and not (folder / "model.safetensors.index.json").exists():
        started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(config, folder)
        tell(stage="written", seconds=time.perf_counter() - started, gib=sum(path.stat().st_size for path in folder.iterdir()) / GIB)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    gpu_memory()
    started = time.perf_counter()
    with host_memory() as samples:
        model = load(config, folder, quantized=arguments.base == "nf4")
    tell(stage="loaded", seconds=time.perf_counter() - started, host_peak_gib=max(samples, default=0) / GIB, **gpu_memory(), **experts_of(model))
    adapted = with_adapter(model, ADAPTED[arguments.adapt], checkpointing=not arguments.no_checkpointing)
    for tokens in arguments.tokens:
        try:
            figures = train(adapted, one_row(config, tokens, arguments.images), arguments.steps)
        except torch.OutOfMemoryError as error:
            tell(stage="trained", tokens=tokens, error=str(error).partition(". ")[0], **gpu_memory())
            break
        tell(stage="trained", tokens=tokens, images=arguments.images, **figures, **gpu_memory())


def extrapolate(arguments: argparse.Namespace) -> None:
    """For each length the line through the two numbers of layers furthest apart below `--layers`, at `--layers`, and what was measured there."""
    found: defaultdict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in arguments.out.read_text("utf-8").splitlines():
        figures = json.loads(line)
        if figures["stage"] == "trained" and "error" not in figures and figures["loss"] == "chunked":
            found[figures["tokens"]][figures["layers"]] = figures
    for tokens, by_layers in sorted(found.items()):
        fewer = [layers for layers in by_layers if layers < arguments.layers]
        if len(fewer) < 2:
            continue
        few, many = min(fewer), max(fewer)
        line: dict[str, Any] = {"stage": "extrapolated", "tokens": tokens, "from_layers": [few, many], "layers": arguments.layers}
        for key in ("allocated_gib", "peak_gib", "typical_step_seconds"):
            low, high = by_layers[few].get(key), by_layers[many].get(key)
            if low is not None and high is not None:
                line[key] = round(low + (high - low) / (many - few) * (arguments.layers - few), 4)
                line[f"measured_{key}"] = by_layers.get(arguments.layers, {}).get(key)
        line["tokens_per_second"] = round(tokens / line["typical_step_seconds"], 1)
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.set_defaults(command=run)
    running.add_argument("--layers", type=int, default=46)
    running.add_argument("--source", choices=("disk", "made"), default="made")
    running.add_argument("--folder", type=Path, default=Path("/tmp/glm-4.5v"), help="where --source disk writes its checkpoint")  # noqa: S108 (a machine of one's own)
    running.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384, 32768])
    running.add_argument("--steps", type=int, default=3)
    running.add_argument("--loss", choices=("chunked", "plain"), default="chunked")
    running.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    running.add_argument(
        "--adapt", choices=tuple(ADAPTED), default="attention", help="beside the attention also the vision tower and merger, or the routed experts"
    )
    running.add_argument("--no-checkpointing", action="store_true")
    running.add_argument("--images", type=int, default=0, help="pictures of 448x448 in the row")
    running.add_argument("--offload", action="store_true", help="layers' inputs wait in host memory")
    running.add_argument("--tiny", action="store_true", help="small dimensions: whether the script works")
    drawing = commands.add_parser("extrapolate")
    drawing.set_defaults(command=extrapolate)
    drawing.add_argument("--layers", type=int, default=46)
    for command in (running, drawing):
        command.add_argument("--out", type=Path, default=Path("qlora.jsonl"), help="JSON lines, one as soon as it is known")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
