"""The same adapter under other names or in another layout, where that is exact: tensors are copied, cut and filled up with zeros, never rounded.

Scalings are PEFT's and vLLM's (lora_alpha / r, or / sqrt(r) with rsLoRA, each looked up in the patterns); layouts are those of PEFT 0.20 for this model.
"""

import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import AdapterInvalid
from pipeline.servable import (
    CONFIG_FILE,
    EXPERT_2D,
    EXPERT_3D,
    LAYER,
    WEIGHTS_FILE,
    Pair,
    Reason,
    Settings,
    Tensor,
    clipped,
    look_up,
    pattern_name,
    read_config,
    read_tensors,
    sort_tensors,
)

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
TEXT_ONLY = re.compile(r"(?:model\.)?((?:layers\.[0-9]+|embed_tokens|norm)\..+)", re.DOTALL)
"""A name, after PREFIX, in a class that is the language model alone: with `model.` in AutoModelForCausalLM's, without in the bare model's."""
FUSED = ("gate_up_proj", "down_proj")
SINGLE = ("gate_proj", "up_proj", "down_proj")
ExpertsLayout = Literal["2d", "3d"]


@dataclass(frozen=True)
class Content:
    """An adapter in memory: its configuration as parsed, and its tensors by name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Update:
    """A module's A (rank, in) and B (out, rank); of fused experts stacked, (experts, rank, in) and (experts, out, rank). B A is scaled by alpha / rank."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])


def read_content(folder: Path) -> Content:
    """The adapter in `folder`, as it is. Raises AdapterInvalid if a file cannot be read or the configuration is not LoRA's."""
    from safetensors.torch import load_file

    config, tensors = read_config(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
    if isinstance(config, Reason):
        raise AdapterInvalid(f"{folder}: {config}")
    if isinstance(tensors, Reason):
        raise AdapterInvalid(f"{folder}: {tensors}")
    return Content(config, load_file(folder / WEIGHTS_FILE))


def convert(content: Content, experts: ExpertsLayout | None) -> tuple[Content, list[str]]:
    """The adapter as a vision-language server takes it, its experts in that layout (None: as they are), and what was done; nothing if it is so already.

    Raises AdapterInvalid where the result would not be exactly the same adapter.
    """
    done = []
    if any(TEXT_ONLY.match(name.removeprefix(PREFIX)) for name in content.tensors):
        content, done = with_language_model(content), ["names of a text-only class -> names of the vision-language class"]
    if experts == "2d" and any(is_expert(module, EXPERT_3D) for module in pairs_of(content)):
        content, done = with_single_experts(content), [*done, "fused experts (3-D) -> single experts (2-D)"]
    if experts == "3d" and any(is_expert(module, EXPERT_2D) for module in pairs_of(content)):
        content, done = with_fused_experts(content), [*done, "single experts (2-D) -> fused experts (3-D)"]
    return content, done


def write_content(content: Content, folder: Path) -> None:
    """Makes `folder`, which appears only when all is written. Raises OSError, also if it is there."""
    from safetensors.torch import save_file

    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    draft.mkdir()
    try:
        (draft / CONFIG_FILE).write_text(json.dumps(content.config, indent=2), "utf-8")  # not sorted: of several patterns the first that matches counts
        save_file(dict(content.tensors), draft / WEIGHTS_FILE, metadata={"format": "pt"})
        if folder.exists() or folder.is_symlink():  # rename would take the place of an empty folder
            raise FileExistsError(17, "appeared meanwhile", str(folder))
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft)
        raise


# Names


def with_language_model(content: Content) -> Content:
    """From a text-only class's names to those of Glm4vMoeForConditionalGeneration, which holds the same language model below model.language_model."""
    renamed: dict[str, torch.Tensor] = {}
    settings: dict[str, Settings] = {}
    for name, tensor in content.tensors.items():
        match = TEXT_ONLY.match(name.removeprefix(PREFIX))
        new = f"{PREFIX}model.language_model.{match[1]}" if match else name
        if new in renamed or (new != name and new in content.tensors):
            raise AdapterInvalid(f"{clipped(new)} would be there twice: the adapter holds weights of both classes; train it again with one of them")
        renamed[new] = tensor
    before, result = settings_of(content), Content({**content.config, "auto_mapping": None}, renamed)  # which named the class that it was trained with
    for module, setting in before.items():
        match = TEXT_ONLY.match(f"{module}.lora_A")
        settings[f"model.language_model.{match[1]}".removesuffix(".lora_A") if match else module] = setting
    if found_again(result, settings) and plain_targets(content.config):
        return result
    config = {**result.config, **targets(content.config, pairs_of(result)), **patterns(settings, default(content.config))}
    return checked(replace(result, config=config), settings)


def plain_targets(config: Mapping[str, Any]) -> bool:
    """Whether PEFT finds the same modules whatever stands before their names."""
    names = config["target_modules"] or []
    parameters = config.get("target_parameters") or []
    return isinstance(names, list) and not config.get("exclude_modules") and not any("layers" in name for name in [*names, *parameters])


# Layouts


def with_single_experts(content: Content) -> Content:
    """From 3-D to 2-D. gate_proj and up_proj each get the A of gate_up_proj, or their half of it if every B is block-diagonal, as the other way makes it."""
    updates: dict[str, Update] = {}
    layers = fused_experts(content)
    halved = all(map(block_diagonal, (parts["gate_up_proj"] for parts in layers.values() if "gate_up_proj" in parts)))
    for experts, parts in layers.items():
        for name, whole in parts.items():
            for child, update in split(whole, halved).items() if name == "gate_up_proj" else [(name, whole)]:
                for number in range(update.a.shape[0]):
                    updates[f"{experts}.{number}.{child}"] = Update(update.a[number], update.b[number], update.alpha)
    return rebuilt(content, EXPERT_3D, updates, {})


def block_diagonal(gate_up: Update) -> bool:
    """Whether gate_proj uses the first half of A's rows alone, and up_proj the second."""
    gate, up = gate_up.b.chunk(2, dim=1)
    half = gate_up.rank // 2
    return gate_up.rank % 2 == 0 and not gate[:, :, half:].any() and not up[:, :, :half].any()


def split(gate_up: Update, halved: bool) -> dict[str, Update]:
    """gate_proj, which has B's first rows, and up_proj of a fused update."""
    gate, up = gate_up.b.chunk(2, dim=1)
    if not halved:
        return {"gate_proj": replace(gate_up, b=gate), "up_proj": replace(gate_up, b=up)}
    half, alpha = gate_up.rank // 2, tidy(gate_up.alpha / 2)
    return {"gate_proj": Update(gate_up.a[:, :half], gate[:, :, :half], alpha), "up_proj": Update(gate_up.a[:, half:], up[:, :, half:], alpha)}


def with_fused_experts(content: Content) -> Content:
    """From 2-D to 3-D. gate_up_proj gets both A below each other and a block-diagonal B; where gate_proj and up_proj share their A, that A alone."""
    fused: dict[str, Update] = {}
    for experts, parts in single_experts(content).items():
        if ("gate_proj" in parts) != ("up_proj" in parts):
            raise AdapterInvalid(f"{experts}: only one of gate_proj and up_proj is adapted; the 3-D layout holds both: use --experts 2d, or train both")
        if "gate_proj" in parts:
            fused[f"{experts}.base_layer"] = joined(parts["gate_proj"], parts["up_proj"], experts)
        if "down_proj" in parts:
            fused[experts] = parts["down_proj"]
    return rebuilt(content, EXPERT_2D, {}, fused)


def joined(gate: Update, up: Update, experts: str) -> Update:
    """gate_up_proj, its first rows gate_proj's."""
    import torch

    if gate.a.shape == up.a.shape and torch.equal(gate.a, up.a) and gate.alpha == up.alpha:
        return Update(gate.a, torch.cat((gate.b, up.b), dim=1), gate.alpha)
    if not math.isclose(gate.alpha / gate.rank, up.alpha / up.rank, rel_tol=1e-12):
        raise AdapterInvalid(
            f"{experts}: gate_proj is scaled by {gate.alpha / gate.rank:g}, up_proj by {up.alpha / up.rank:g}, and the 3-D layout has one scaling for both; "
            "keep the 2-D layout, or train with one lora_alpha"
        )
    if gate.a.dtype != up.a.dtype or gate.b.dtype != up.b.dtype or gate.a.shape[2] != up.a.shape[2]:
        raise AdapterInvalid(f"{experts}: gate_proj and up_proj differ in type or input; restore the file, or keep the 2-D layout")
    rank = gate.rank + up.rank
    b = gate.b.new_zeros(gate.b.shape[0], gate.b.shape[1] + up.b.shape[1], rank)
    b[:, : gate.b.shape[1], : gate.rank] = gate.b
    b[:, gate.b.shape[1] :, gate.rank :] = up.b
    return Update(torch.cat((gate.a, up.a), dim=1), b, tidy(gate.alpha * rank / gate.rank))


def fused_experts(content: Content) -> dict[str, dict[str, Update]]:
    """By layer's experts the stacked gate_up_proj and down_proj."""
    found: defaultdict[str, dict[str, Update]] = defaultdict(dict)
    settings = settings_of(content)
    for module, pair in pairs_of(content).items():
        if not is_expert(module, EXPERT_3D):
            continue
        (a, b), rank = tensors_of(content, module, pair), settings[module].rank
        gate_up = module.endswith(".base_layer")
        if a.shape[0] % rank or a.shape[0] != b.shape[1] or (gate_up and b.shape[0] % 2):
            raise AdapterInvalid(
                f"{clipped(module)}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not rank {rank} for each expert; restore the two files"
            )
        stacked = Update(a.reshape(-1, rank, a.shape[1]), b.reshape(b.shape[0], rank, -1).permute(2, 0, 1), plain_alpha(content.config, settings[module]))
        found[module.removesuffix(".base_layer")]["gate_up_proj" if gate_up else "down_proj"] = stacked
    return found


def single_experts(content: Content) -> dict[str, dict[str, Update]]:
    """By layer's experts the gate_proj, up_proj and down_proj of all experts, stacked."""
    import torch

    each: defaultdict[str, defaultdict[str, dict[int, tuple[Pair, Settings]]]] = defaultdict(lambda: defaultdict(dict))
    settings = settings_of(content)
    for module, pair in pairs_of(content).items():
        if match := is_expert(module, EXPERT_2D):
            each[module[: -len(match[0])] + "mlp.experts"][f"{match[2]}_proj"][int(match[1])] = pair, settings[module]
    found: dict[str, dict[str, Update]] = {}
    for experts, kinds in each.items():
        count = 1 + max(number for kind in kinds.values() for number in kind)
        found[experts] = {}
        for name, numbered in kinds.items():
            if len(numbered) != count:
                raise AdapterInvalid(f"{experts}: {name} of {len(numbered)} experts of {count} is adapted; the 3-D layout holds all: keep the 2-D one")
            tensors = [tensors_of(content, f"{experts}.{number}.{name}", numbered[number][0]) for number in range(count)]
            if len({(setting.rank, setting.alpha, a.shape, b.shape) for (_, setting), (a, b) in zip(numbered.values(), tensors, strict=True)}) > 1:
                raise AdapterInvalid(f"{experts}: the {name} of its experts differ in rank, alpha or shape; the 3-D layout has one for all: keep the 2-D one")
            a, b = torch.stack([a for a, _ in tensors]), torch.stack([b for _, b in tensors])
            found[experts][name] = Update(a, b, plain_alpha(content.config, numbered[0][1]))
    return found


def rebuilt(content: Content, old: re.Pattern[str], single: Mapping[str, Update], fused: Mapping[str, Update]) -> Content:
    """`content` with these updates in the place of the experts' in layout `old`; its configuration says alpha / r, also where it was rsLoRA's."""
    import torch

    before, tensors = settings_of(content), dict(content.tensors)
    settings: dict[str, Settings] = {}
    for module, pair in pairs_of(content).items():
        if is_expert(module, old):
            tensors_of(content, module, pair)
            for tensor in filter(None, (pair.a, pair.b)):
                del tensors[tensor.name]
        else:
            settings[module] = Settings(before[module].rank, plain_alpha(content.config, before[module]))
    if twice := next((module for module in (*single, *fused) if module in settings), None):
        raise AdapterInvalid(f"{clipped(twice)}: its experts are adapted in both layouts; train it again with one of them")
    for module, update in (*single.items(), *fused.items()):
        settings[module] = Settings(update.rank, update.alpha)
        b = update.b if module in single else update.b.permute(1, 2, 0).reshape(update.b.shape[1], -1)
        for half, matrix in (("A", update.a.reshape(-1, update.a.shape[-1])), ("B", b)):  # each in memory of its own: safetensors saves no views
            tensors[f"{PREFIX}{module}.lora_{half}.weight"] = matrix.clone(memory_format=torch.contiguous_format)
    # PEFT 0.20 reads the 2-D layout with twice `r` and `lora_alpha` for gate_up_proj, whatever the patterns say.
    gates = {settings[module] for module in single if module.endswith(".gate_proj")}
    usual = gates.pop() if len(gates) == 1 else Settings(content.config["r"], tidy(plain_alpha(content.config, default(content.config))))
    result = Content(dict(content.config), tensors)
    config = {**content.config, "use_rslora": False, **targets(content.config, pairs_of(result)), **patterns(settings, usual)}
    return checked(replace(result, config=config), settings)


# Configuration


def default(config: Mapping[str, Any]) -> Settings:
    return Settings(config["r"], config["lora_alpha"])


def plain_alpha(config: Mapping[str, Any], settings: Settings) -> float:
    """The alpha that scales the same without rsLoRA."""
    return tidy(settings.alpha * math.sqrt(settings.rank)) if config.get("use_rslora") else settings.alpha


def tidy(number: float) -> float:
    return int(number) if number == int(number) else number


def targets(config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """What PEFT should wrap for these modules, by the ends of names; more of that name, without weights here, change nothing."""
    parameters = [name for name in config.get("target_parameters") or () if not name.endswith(FUSED)]
    modules, fused = set(), set()
    for module in pairs:
        match = LAYER.fullmatch(module)
        if match and EXPERT_2D.fullmatch(match[1]):
            modules |= set(SINGLE)
        elif match and EXPERT_3D.fullmatch(match[1]):
            fused.add("mlp.experts." + ("gate_up_proj" if module.endswith(".base_layer") else "down_proj"))
        elif not any(f"{module}.weight".endswith(name) for name in parameters):
            modules.add(match[1] if match else module)
    return {"target_modules": sorted(modules), "target_parameters": sorted({*parameters, *fused}) or None, "exclude_modules": None}


def patterns(settings: Mapping[str, Settings], usual: Settings) -> dict[str, Any]:
    """r, lora_alpha and their patterns, such that each module finds its own; no two patterns match one module, so their order says nothing."""
    ranks = {module: setting.rank for module, setting in settings.items()}
    alphas = {module: setting.alpha for module, setting in settings.items()}
    return {"r": usual.rank, "lora_alpha": usual.alpha, "rank_pattern": pattern(ranks, usual.rank), "alpha_pattern": pattern(alphas, usual.alpha)}


def pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The shortest names that tell values apart: of a kind of module, of that kind in one layer, of one module."""
    by_name: list[dict[str, set[float]]] = [defaultdict(set) for _ in range(3)]
    names = {module: pattern_names(module) for module in values}
    for module, value in values.items():
        for known, name in zip(by_name, names[module], strict=True):
            known[name].add(value)
    found = {}
    for module, value in values.items():
        name = next(name for known, name in zip(by_name, names[module], strict=True) if len(known[name]) == 1)
        # A name may be usual in one layer and told apart in another: only the ones that differ are written.
        if value != usual:
            found[name] = value
    return found


def pattern_names(module: str) -> Sequence[str]:
    """Regular expressions for ends of names, from wide to narrow; the experts' are the same in both layouts, and for PEFT, which knows them as parameters."""
    whole = re.escape(pattern_name(module))
    match = LAYER.fullmatch(pattern_name(module))
    if not match:
        return whole, whole, whole
    inner = match[1]
    kind = re.escape(inner)
    if inner.startswith("mlp.experts."):
        kind = rf"mlp\.experts\..*\b{inner.rpartition('.')[2]}"
    elif inner == "mlp.gate":
        kind = r"mlp\.gate\b.*"  # a parameter in transformers 5: mlp.gate.weight
    layer = module.removeprefix("model.language_model.layers.").partition(".")[0]
    return kind, rf"layers\.{layer}\.{kind}", whole


def checked(content: Content, settings: Mapping[str, Settings]) -> Content:
    """`content`, whose configuration gives every module these. Raises AdapterInvalid if it does not."""
    if not found_again(content, settings):
        raise AdapterInvalid("its ranks and alphas cannot be written as patterns; train it again with one rank and alpha for each kind of module")
    return content


def found_again(content: Content, settings: Mapping[str, Settings]) -> bool:
    found = look_up(content.config, pairs_of(content))
    return not isinstance(found, Reason) and found == dict(settings)


# Tensors


def pairs_of(content: Content) -> dict[str, Pair]:
    return sort_tensors([Tensor(name, tuple(tensor.shape), "") for name, tensor in content.tensors.items()]).pairs


def settings_of(content: Content) -> dict[str, Settings]:
    """Of every module. Raises AdapterInvalid if a pattern may not be matched."""
    found = look_up(content.config, pairs_of(content))
    if isinstance(found, Reason):
        raise AdapterInvalid(str(found))
    return found


def is_expert(module: str, layout: re.Pattern[str]) -> re.Match[str] | None:
    match = LAYER.fullmatch(module)
    return layout.fullmatch(match[1]) if match else None


def tensors_of(content: Content, module: str, pair: Pair) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Both matrices of a pair. Raises AdapterInvalid if one is missing or no matrix."""
    if not (pair.a and pair.b and len(pair.a.shape) == len(pair.b.shape) == 2):
        raise AdapterInvalid(f"{clipped(module)}: lora_A or lora_B is missing or no matrix; restore the file, or train the adapter again")
    return content.tensors[pair.a.name], content.tensors[pair.b.name]
