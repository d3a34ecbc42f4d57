"""Whether a recipe fits GPUs before one is asked: memory per GPU by item, what bounds it, and the nearest change that makes it fit. Pure, and without torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline import basemodel, parameters
from pipeline.gpus import GIB, Gpu
from pipeline.parameters import Architecture
from pipeline.project import Project
from pipeline.recipe import FinetuneRecipe, ServedLora, ServingRecipe, Training
from pipeline.serving_memory import RUNTIME_UNCERTAINTY_BYTES, parallel_faults, serving_memory
from pipeline.training_memory import training_memory

TIGHT = 0.1
"""Less than this share of a GPU left after training's peak: torch's cache of freed blocks was up to 14 % above the peak where there was room (measured on one H100), and
a full GPU makes it give them back again and again."""
LENGTH_STEP_TOKENS = 256
LEAST_LENGTH_TOKENS = 1024
"""A shorter row or request is not proposed: a picture of 448x448 alone is 256 tokens."""
MOST_GPUS = 64
HOST = "host memory"
TINY_CONFIG = Path(__file__).with_name("tinyglm.config.json")
"""What tinyglm.make_config makes, as far as sizes go (tests/test_capacity_contract.py compares): asking it takes transformers, seconds."""
R = TypeVar("R", FinetuneRecipe, ServingRecipe)


@dataclass(frozen=True)
class Assumed:
    """What a plan cannot read from a recipe: the most answer and image tokens of one row; None: as many as a row may be long, the worst."""

    answer_tokens: int | None = None
    image_tokens: int | None = None


@dataclass(frozen=True)
class KvCache:
    """What is left for the KV cache of one server."""

    bytes_per_gpu: int
    tokens: int
    longest_request_tokens: int

    @property
    def sequences(self) -> float:
        """How many requests of full length it holds at once."""
        return self.tokens / self.longest_request_tokens


@dataclass(frozen=True)
class Plan:
    """A recipe against GPUs. All figures are bytes per GPU but for `host`."""

    model: str
    """Whose dimensions were planned with."""
    gpu: Gpu
    gpus: int
    """That the recipe uses."""
    available: int
    """GPUs that there are; a server uses only its own, so that several fit beside each other."""
    items: Mapping[str, int]
    capacity: int
    """What they may take together."""
    bound_by: str
    """The item that decides."""
    faults: tuple[str, ...] = ()
    """What keeps it from running whatever the memory, each as `field: message`."""
    kv_cache: KvCache | None = None
    host: int = 0
    """Host memory over all processes for what is offloaded."""
    change: str = ""
    """The nearest change that makes it fit; empty if it fits, or none was found."""

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def left(self) -> int:
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return not self.faults and self.left >= 0 and (self.kv_cache is None or self.kv_cache.tokens >= self.kv_cache.longest_request_tokens)

    @property
    def tight(self) -> bool:
        """It fits by less than what is uncertain."""
        spare = self.left - self.kv_cache.bytes_per_gpu * self.kv_cache.longest_request_tokens // max(1, self.kv_cache.tokens) if self.kv_cache else self.left
        return self.fits and spare < (RUNTIME_UNCERTAINTY_BYTES if self.kv_cache else TIGHT * self.capacity)

    @property
    def verdict(self) -> str:
        """One line: fits or not, by how much, what bounds it."""
        where = f"{self.gpus} x {self.gpu.name}"
        if self.faults:
            return f"does not run on {where}: {'; '.join(self.faults)}"
        if self.left < 0:
            return f"does not fit {where}: {gib(-self.left)} GiB too much on each; most for {self.bound_by} ({gib(self.items[self.bound_by])} GiB)"
        if self.kv_cache and not self.fits:
            longest = self.kv_cache.longest_request_tokens
            return f"does not fit {where}: the KV cache holds {self.kv_cache.tokens} tokens, one request of max_model_len_tokens is {longest}"
        spare = f"{self.kv_cache.tokens} tokens of KV cache" if self.kv_cache else f"{gib(self.left)} GiB left on each"
        return f"fits {where}: {spare}; most for {self.bound_by} ({gib(self.items[self.bound_by])} GiB)" + ("; tight" if self.tight else "")

    def lines(self) -> list[str]:
        """The table for people: GiB per GPU by item, total, capacity, verdict."""
        replicas = self.available // self.gpus if self.kv_cache and self.available > self.gpus else 0
        rows = [*self.items.items(), ("total", self.total), (f"capacity ({self.gpu.name})", self.capacity)]
        width = max(len(name) for name, _ in rows)
        lines = [f"GiB per {'process' if self.gpu.name == HOST else 'GPU'} ({self.model})", *(f"  {name:<{width}}  {gib(size):>7}" for name, size in rows)]
        if self.kv_cache and self.left > 0:
            cache = self.kv_cache
            held = f"{cache.sequences:.1f} requests of {cache.longest_request_tokens} at once"
            lines.append(f"  {'left for the KV cache':<{width}}  {gib(cache.bytes_per_gpu):>7}  = {cache.tokens} tokens, {held}")
        lines += [f"  host memory, all processes: {gib(self.host)} GiB offloaded"] if self.host else []
        lines += [f"  {replicas} such servers fit on {self.available} of them"] if replicas > 1 and self.fits else []
        lines.append(self.verdict)
        lines += [f"nearest change that fits: {self.change}"] if self.change else []
        return lines

    def as_dict(self) -> dict[str, Any]:
        cache = self.kv_cache
        kv = {"tokens": cache.tokens, "bytes_per_gpu": cache.bytes_per_gpu, "sequences": round(cache.sequences, 2)} if cache else None
        return {
            "fits": self.fits,
            "tight": self.tight,
            "model": self.model,
            "gpu": self.gpu.name,
            "gpus": self.gpus,
            "available": self.available,
            "items": dict(self.items),
            "total_bytes": self.total,
            "capacity_bytes": self.capacity,
            "bound_by": self.bound_by,
            "kv_cache": kv,
            "host_bytes": self.host,
            "faults": list(self.faults),
            "verdict": self.verdict,
            "change": self.change or None,
        }


def gib(size: int) -> str:
    """Bytes in GiB with one decimal, two below 1."""
    return f"{size / GIB:.2f}" if 0 < abs(size) < GIB else f"{size / GIB:.1f}"


def plan(recipe: FinetuneRecipe | ServingRecipe, architecture: Architecture, gpu: Gpu, available: int | None = None, assumed: Assumed = Assumed()) -> Plan:
    """The recipe on `available` GPUs of a kind (default: as many as it uses), with the nearest change if it does not fit; pure."""
    if isinstance(recipe, FinetuneRecipe):

        def planned(changed: FinetuneRecipe) -> Plan:
            return _training_plan(changed, architecture, gpu, None, assumed)

        found = _training_plan(recipe, architecture, gpu, available, assumed)
        return found if found.fits else replace(found, change=_nearest(_training_changes(recipe, found.available), planned, found))
    served = _serving_plan(recipe, architecture, gpu, available)
    changes = _serving_changes(recipe, served)
    return served if served.fits else replace(served, change=_nearest(changes, lambda changed: _serving_plan(changed, architecture, gpu, None), served))


def _training_plan(recipe: FinetuneRecipe, architecture: Architecture, gpu: Gpu, available: int | None, assumed: Assumed) -> Plan:
    processes = recipe.training.processes
    there = processes if available is None else available
    memory = training_memory(architecture, recipe, answer_tokens=assumed.answer_tokens, image_tokens=assumed.image_tokens)
    items = memory.items
    faults = [] if processes <= there else [f"training.processes: {processes} is one GPU each, and there are {there}"]
    return Plan(architecture.source, gpu, processes, there, items, gpu.bytes, _largest(items), tuple(faults), host=memory.host)


def _serving_plan(recipe: ServingRecipe, architecture: Architecture, gpu: Gpu, available: int | None) -> Plan:
    ways = recipe.tensor_parallel_size
    there = ways if available is None else available
    memory = serving_memory(architecture, recipe, gpu)
    if recipe.device == "cpu":
        kv = recipe.kv_cache_gib * GIB
        images = {"image cache": int(recipe.image_cache_gib * GIB)} if recipe.image_cache_gib else {}
        items = {"weights": memory.weights, "adapter slots": memory.adapter_slots, "KV cache (kv_cache_gib)": kv, **images}
        cache = KvCache(kv, kv // memory.kv_token, recipe.max_model_len_tokens)
        return Plan(architecture.source, gpu, ways, there, items, gpu.bytes, _largest(items), kv_cache=cache)
    cache = KvCache(memory.budget - memory.total, memory.kv_tokens, recipe.max_model_len_tokens)
    faults = [] if ways <= there else [f"tensor_parallel_size: {ways} is one GPU each, and there are {there}"]
    faults += parallel_faults(architecture, recipe)
    return Plan(architecture.source, gpu, ways, there, memory.items, memory.budget, _largest(memory.items), tuple(faults), cache)


def _largest(items: Mapping[str, int]) -> str:
    return max(items, key=lambda name: items[name])


def _nearest(changes: Iterator[tuple[str, R]], planned: Callable[[R], Plan], now: Plan) -> str:
    """The first change that fits the GPUs that there are, else the first that fits more of them; empty if none does."""
    more = ""
    for text, recipe in changes:
        found = planned(recipe)
        if not found.fits:
            continue
        if found.gpus <= now.available:
            return text
        more = more or f"{text} ({found.gpus} x {now.gpu.name})"
    return more


def _training_changes(recipe: FinetuneRecipe, available: int) -> Iterator[tuple[str, FinetuneRecipe]]:
    """In the order of what they cost the user: what changes only the time, alone and together; with that shorter rows; other weights; more GPUs.

    Where there are fewer GPUs than processes, all begin with fewer processes.
    """
    training, prefix = recipe.training, ""
    if training.processes > available:
        fewer = max(count for count in range(1, available + 1) if training.global_batch_size % (count * training.micro_batch_size) == 0)
        recipe, prefix = _with_training(recipe, processes=fewer), f"training.processes: {fewer}, "
        yield prefix.removesuffix(", "), recipe
    for text, fields in _same_result(recipe):
        yield prefix + text, _with_training(recipe, **fields)
    text, fields = _all_of(_same_result(recipe))
    if text:
        yield prefix + text, _with_training(recipe, **fields)
    for length in range(_below(training.max_length_tokens), LEAST_LENGTH_TOKENS - 1, -LENGTH_STEP_TOKENS):
        shorter = ", ".join(filter(None, (text, f"training.max_length_tokens: {length}")))
        yield prefix + shorter, _with_training(recipe, **fields, max_length_tokens=length)
    if recipe.quantization is None:
        yield from ((prefix + text, each) for text, each in _other_weights(recipe))
        for more in range(2, MOST_GPUS + 1):
            if training.global_batch_size % (more * training.micro_batch_size) == 0:
                yield f"training.processes: {more} with training.deepspeed: zero3", _with_training(recipe, processes=more, deepspeed="zero3")


def _other_weights(recipe: FinetuneRecipe) -> Iterator[tuple[str, FinetuneRecipe]]:
    """Other ways to hold the frozen base."""
    several = recipe.training.processes > 1
    if several and recipe.training.deepspeed not in ("zero3", "zero3_offload"):
        yield "training.deepspeed: zero3", _with_training(recipe, deepspeed="zero3")
    if recipe.training.deepspeed != "zero3_offload":
        yield "training.deepspeed: zero3_offload", _with_training(recipe, deepspeed="zero3_offload")
    in_4_bits = recipe.model_copy(update={"quantization": "nf4"})
    if recipe.training.deepspeed in ("zero3", "zero3_offload"):
        in_place = "zero2" if several else None
        yield f"quantization: nf4, training.deepspeed: {in_place or 'none'}", _with_training(in_4_bits, deepspeed=in_place)
    else:
        yield "quantization: nf4", in_4_bits


def _same_result(recipe: FinetuneRecipe) -> list[tuple[str, dict[str, Any]]]:
    """Changes after which training learns the same, in more time."""
    training = recipe.training
    sizes = [size for size in range(training.micro_batch_size - 1, 0, -1) if training.global_batch_size % (size * training.processes) == 0]
    found: list[tuple[str, dict[str, Any]]] = [(f"training.micro_batch_size: {size}", {"micro_batch_size": size}) for size in sizes]
    if not training.gradient_checkpointing:
        found.append(("training.gradient_checkpointing: true", {"gradient_checkpointing": True}))
    if not training.offload_checkpoints and training.device == "cuda" and training.processes == 1 and training.deepspeed is None:
        both = "" if training.gradient_checkpointing else "training.gradient_checkpointing: true, "
        found.append((f"{both}training.offload_checkpoints: true", {"gradient_checkpointing": True, "offload_checkpoints": True}))
    return found


def _all_of(changes: list[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """All changes as one; of several to one field the last."""
    fields: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for text, change in changes:
        fields |= change
        texts |= dict.fromkeys(change, text)
    return ", ".join(dict.fromkeys(texts.values())), fields


def _below(tokens: int) -> int:
    return (tokens - 1) // LENGTH_STEP_TOKENS * LENGTH_STEP_TOKENS


def _with_training(recipe: FinetuneRecipe, **fields: Any) -> FinetuneRecipe:
    training: Training = recipe.training.model_copy(update=fields)
    return recipe.model_copy(update={"training": training})


def _serving_changes(recipe: ServingRecipe, found: Plan) -> Iterator[tuple[str, ServingRecipe]]:
    """In the order of what they cost the user, each alone, then together; more GPUs last."""
    tokens = found.kv_cache.tokens if found.kv_cache else 0
    if tokens >= LEAST_LENGTH_TOKENS:
        length = tokens // LENGTH_STEP_TOKENS * LENGTH_STEP_TOKENS
        yield f"max_model_len_tokens: {length}", recipe.model_copy(update={"max_model_len_tokens": length})
    smaller: list[tuple[str, dict[str, Any]]] = []
    if not recipe.quantization and recipe.precision == "bfloat16":
        smaller.append(("quantization: fp8_per_channel", {"quantization": "fp8_per_channel"}))
    lora: ServedLora = recipe.lora
    for slots in range(lora.max_loras - 1, 0, -1):
        smaller.append((f"lora.max_loras: {slots}", {"lora": lora.model_copy(update={"max_loras": slots})}))
    if lora.wraps_experts:
        attention = lora.model_copy(update={"target_modules": ("qkv_proj", "o_proj")})
        smaller.append(("lora.target_modules: [qkv_proj, o_proj]", {"lora": attention}))
    yield from ((text, recipe.model_copy(update=fields)) for text, fields in smaller)
    fp8 = smaller[0][1] if smaller and "quantization" in smaller[0][1] else {}
    for text, fields in smaller[1:] if fp8 else ():
        yield f"{smaller[0][0]}, {text}", recipe.model_copy(update=fp8 | fields)
    for ways in range(min(found.available, recipe.tensor_parallel_size - 1), 0, -1):
        alone = {"expert_parallel": False, "vision_data_parallel": False} if ways == 1 else {}
        fewer = {"tensor_parallel_size": ways, **alone}
        yield f"tensor_parallel_size: {ways}", recipe.model_copy(update=fewer)
        if fp8:
            yield f"tensor_parallel_size: {ways}, quantization: fp8_per_channel", recipe.model_copy(update=fewer | fp8)
    for ways in range(recipe.tensor_parallel_size + 1, MOST_GPUS + 1):
        yield f"tensor_parallel_size: {ways}", recipe.model_copy(update={"tensor_parallel_size": ways})
        shared = {"tensor_parallel_size": ways, "vision_data_parallel": True, "expert_parallel": True}
        yield f"tensor_parallel_size: {ways}, expert_parallel: true, vision_data_parallel: true", recipe.model_copy(update=shared)


def architecture_of(base_model: str, project: Project) -> Architecture:
    """The dimensions of a recipe's base model: its folder's config.json, else, before the download, GLM-4.5V's published ones. `tiny` is not made for it.

    Raises InvalidInput if the folder's config.json is not one that a plan can be made from.
    """
    if base_model == basemodel.TINY:
        return _tiny(project)
    path = project.resolve(Path(base_model)) / "config.json"
    if path.is_file():
        return replace(parameters.read_config(path), source=base_model)
    published = parameters.published()
    return replace(published, source=f"{published.source}: {base_model} is not here yet")


def _tiny(project: Project) -> Architecture:
    made = project.bases / basemodel.tiny_name() / "config.json"
    return replace(parameters.read_config(made if made.is_file() else TINY_CONFIG), source="the tiny GLM-4.5V")


def host_memory(shares: int = 1) -> Gpu:
    """This machine's memory as what a CPU recipe has, for each of so many processes."""
    return Gpu(HOST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // shares, "sysconf")
