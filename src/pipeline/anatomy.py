"""What an adapter consists of: which modules in which layers, ranks, scalings, sizes, and how much it changes. From its folder alone, sound or not."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pipeline.adapter import ADAPTER_FILES, adapter_digest
from pipeline.errors import AdapterInvalid
from pipeline.servable import (
    CONFIG_FILE,
    LAYER,
    NOT_FINITE,
    WEIGHTS_FILE,
    LoraLayout,
    Pair,
    Reason,
    Settings,
    clipped,
    is_fused,
    layout,
    look_up,
    pattern_name,
    plain_size,
    read_config,
    read_tensors,
    sort_tensors,
)

if TYPE_CHECKING:
    import torch

NUMBER = re.compile(r"\.(0|[1-9][0-9]*)(?=\.)")


@dataclass
class Group:
    """The modules of one kind, for example every layer's self_attn.q_proj. Norms are Frobenius norms over all of them together; None where they are no numbers."""

    layers: set[int] = field(default_factory=set)
    modules: int = 0
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)
    scalings: set[float] = field(default_factory=set)
    """What multiplies B A."""
    parameters: int = 0
    squares: dict[str, float] = field(default_factory=lambda: {"a": 0.0, "b": 0.0, "update": 0.0})

    def as_dict(self) -> dict[str, Any]:
        norms = {f"norm_{part}": math.sqrt(square) if math.isfinite(square) else None for part, square in self.squares.items()}
        sets = {"ranks": sorted(self.ranks), "alphas": sorted(self.alphas), "scalings": sorted(self.scalings)}
        return {"layers": sorted(self.layers), "modules": self.modules, **sets, "parameters": self.parameters, **norms}


@dataclass(frozen=True)
class Anatomy:
    """What could be read of an adapter; None, 0 or empty where a file is missing or damaged (`servable.reasons` says what is wrong)."""

    digest: str | None
    bytes: int
    layout: LoraLayout | None
    base_model: str | None
    """What adapter_config.json calls the base it was trained on: a folder or a hub's name, written by a stranger."""
    rslora: bool | None
    tensors: int
    dtypes: Mapping[str, int]
    """Parameters by safetensors' name of their type."""
    groups: Mapping[str, Group]

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    def as_dict(self) -> dict[str, Any]:
        ranks, scalings = (sorted(set().union(*(getattr(group, name) for group in self.groups.values()))) for name in ("ranks", "scalings"))
        return {
            "digest": self.digest,
            "bytes": self.bytes,
            "layout": self.layout,
            "base_model": self.base_model,
            "rslora": self.rslora,
            "ranks": ranks,
            "scalings": scalings,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "modules": {name: group.as_dict() for name, group in sorted(self.groups.items())},
        }


def dissect(folder: Path) -> Anatomy:
    """What the adapter in `folder` consists of. Raises nothing for bad content; reads every tensor once, and imports torch."""
    try:
        digest = adapter_digest(folder)
    except (AdapterInvalid, OSError):
        digest = None
    config, listed = read_config(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
    settings_of = {} if isinstance(config, Reason) else config
    tensors = [] if isinstance(listed, Reason) else listed
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    return Anatomy(
        digest,
        sum(sizes(folder)),
        layout(folder) if tensors else None,
        named_base(settings_of),
        bool(settings_of.get("use_rslora")) if settings_of else None,
        len(tensors),
        dtypes,
        groups(folder / WEIGHTS_FILE, settings_of, sort_tensors(tensors).pairs),
    )


def sizes(folder: Path) -> Iterator[int]:
    for name in ADAPTER_FILES:
        try:
            yield plain_size(folder / name)
        except OSError:
            continue


def named_base(config: Mapping[str, Any]) -> str | None:
    """What the configuration calls its base, made fit for a terminal; None if it names none."""
    name = config.get("base_model_name_or_path")
    return None if name in (None, "") else name if isinstance(name, str) and name.isprintable() and len(name) < 1000 else clipped(name)


def groups(path: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Group]:
    """The pairs with both halves, by `kind`; norms as far as the tensors can be read."""
    found = look_up(config, pairs) if config else {}
    settings = {} if isinstance(found, Reason) else found
    by_kind: defaultdict[str, Group] = defaultdict(Group)
    whole: list[tuple[str, Pair, Settings | None, Group]] = []
    for module, pair in pairs.items():
        name, layer = kind(pattern_name(module) if is_fused(module) else module)
        if not (pair.a and pair.b):
            continue
        group, setting = by_kind[name], settings.get(module)
        group.layers |= set() if layer is None else {layer}
        group.modules += 1
        group.ranks.add(setting.rank if setting else pair.a.shape[0] if pair.a.shape else 0)
        group.parameters += math.prod(pair.a.shape) + math.prod(pair.b.shape)
        if setting:
            group.alphas.add(setting.alpha)
            group.scalings.add(scaling(setting, config))
        whole.append((module, pair, setting, group))
    for (_, _, setting, group), squares in zip(whole, squared_norms(path, whole, config), strict=True):
        for part in group.squares:
            group.squares[part] += squares[part] if setting or part != "update" else math.nan
    return dict(by_kind)


def kind(module: str) -> tuple[str, int | None]:
    """A module's name without what tells it from its like in other layers (and experts), and its layer."""
    if match := LAYER.fullmatch(module):
        return NUMBER.sub(".*", match[1]), int(module.removeprefix("model.language_model.layers.").partition(".")[0])
    number = NUMBER.search(module)
    return NUMBER.sub(".*", module), int(number[1]) if number and len(number[1]) < 10 else None


def scaling(setting: Settings, config: Mapping[str, Any]) -> float:
    """What PEFT and vLLM multiply B A with."""
    return setting.alpha / (math.sqrt(setting.rank) if config.get("use_rslora") else setting.rank)


def squared_norms(path: Path, whole: Iterable[tuple[str, Pair, Settings | None, Group]], config: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """For each pair the squared Frobenius norms of A, B and the update; NaN where they cannot be told."""
    unknown = dict.fromkeys(("a", "b", "update"), math.nan)
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError):
        yield from (unknown for _ in whole)
        return
    with file as weights:
        for module, pair, setting, _ in whole:
            a, b = pair.a, pair.b
            if not (a and b and {a.dtype, b.dtype} <= set(NOT_FINITE) and len(a.shape) == len(b.shape) == 2):
                yield unknown
                continue
            try:
                matrices = weights.get_tensor(a.name).double(), weights.get_tensor(b.name).double()
            except (OSError, ValueError, RuntimeError, SafetensorError):
                yield unknown
                continue
            known = {"a": float(matrices[0].square().sum()), "b": float(matrices[1].square().sum()), "update": math.nan}
            rank = setting.rank if setting and is_fused(module) else a.shape[0]
            if setting and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0:
                known["update"] = scaling(setting, config) ** 2 * squared_product(*matrices, rank)
            yield known


def squared_product(a: "torch.Tensor", b: "torch.Tensor", rank: int) -> float:
    """|B A|^2 as tr((B^T B)(A A^T)), never making B A; summed over experts where A holds a rank's rows for each (and B its columns, experts varying fastest)."""
    each_a = a.reshape(-1, rank, a.shape[1])
    each_b = b.reshape(b.shape[0], rank, -1).permute(2, 1, 0)
    return float(((each_b @ each_b.transpose(1, 2)) * (each_a @ each_a.transpose(1, 2))).sum())
