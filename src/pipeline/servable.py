"""Whether a vLLM server can serve an adapter folder: the static answer, from the folder alone, before the engine sees it.

The rules are vLLM 0.32's (vllm/lora: peft_helper, lora_model, model_manager, set_lora of the layers). What vLLM refuses is refused here with a remedy, and
so is what it does not notice: weights that it drops, or copies to where they mean something else. tests/test_servable_contract.py holds them against vLLM.
"""

import json
import os
import re
import reprlib
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from pipeline.adapter import ADAPTER_FILES
from pipeline.errors import AdapterInvalid

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 50_000
"""All routed experts of GLM-4.5V, one by one, are 35,000 tensors and 6 MB of header."""
MAX_NAME_LENGTH = 256
MAX_PATTERN_SECONDS = 2.0
"""CPU time for matching rank_pattern and alpha_pattern with the modules; vLLM does it while its engine stands still, and slower."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Names of init_lora_weights that leave the base as it is; what the others (PiSSA, OLoRA, CorDA, LoftQ) learn is relative to a base that they changed."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
NOT_FINITE = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}
"""By dtype, the bits that are all set in NaN and infinity and in no number."""
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's fused modules and the modules of an adapter that they hold."""
LAYER = re.compile(r"model\.language_model\.layers\.(?:0|[1-9][0-9]*)\.(.+)", re.DOTALL)
"""Only what lies in here takes adapters; vLLM 0.32 wraps neither tower, merger, lm_head nor embeddings of this model."""
LINEARS = frozenset(
    [f"self_attn.{name}_proj" for name in "qkvo"]
    + [f"{mlp}.{name}_proj" for mlp in ("mlp", "mlp.shared_experts") for name in ("gate", "up", "down")]
    + ["mlp.gate"]
)
EXPERT_2D = re.compile(r"mlp\.experts\.(0|[1-9][0-9]*)\.(gate|up|down)_proj")
EXPERT_3D = re.compile(r"mlp\.experts(\.base_layer)?")
"""PEFT's names where the experts are one parameter each: base_layer holds gate_up_proj, the other down_proj."""
OTHER_PARTS = ("model.visual.", "model.language_model.", "lm_head")
LoraLayout = Literal["plain", "experts-2d", "experts-3d"]


@dataclass(frozen=True)
class Reason:
    """Why an adapter cannot be served. `code` is kebab-case and stable; `message` gives the values, `remedy` what to do."""

    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes. `target_modules` are vLLM's --lora-target-modules: its own names ("qkv_proj"), an adapter's ("q_proj") or full ones.

    With `base_modules` (names as in the base's checkpoint) every key must name one of them; with `base_shapes` (see read_base_shapes) shapes must fit, too.
    With neither, names are known by GLM-4.5V's pattern.
    """

    max_rank: int
    target_modules: tuple[str, ...]
    wraps_experts: bool
    base_modules: frozenset[str] | None = None
    base_shapes: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False, hash=False)

    @cached_property
    def known(self) -> frozenset[str] | None:
        """Names of the base's modules and of all that contain them, or None where the base is not known."""
        names = self.base_modules if self.base_modules is not None else self.base_shapes
        if names is None:
            return None
        return frozenset(name[:end] for name in names for end in (*(at for at, letter in enumerate(name) if letter == "."), len(name)))

    def wraps(self, module: str) -> bool:
        """Whether vLLM would put the weights of `module`, a linear module of the language model by its checkpoint's name, to use."""
        parent, _, child = module.rpartition(".")
        packed = next((packed for packed, children in PACKED.items() if child in children), child)
        full = f"language_model.model.{parent.removeprefix('model.language_model.')}.{packed}"
        return not {packed, full, *PACKED.get(packed, ())}.isdisjoint(self.target_modules)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Pair:
    """The lora_A and lora_B of one module. `peft_name` is what rank and alpha patterns are matched with."""

    peft_name: str
    a: Tensor | None = None
    b: Tensor | None = None


@dataclass
class Tensors:
    """The tensors of an adapter, sorted by what they are; `pairs` by the module's name in the base's checkpoint."""

    pairs: dict[str, Pair]
    magnitudes: list[str]
    biases: list[str]
    full_weights: list[str]
    strange: list[str]
    """Names that vLLM cannot read."""
    doubled: list[str]
    not_float: list[Tensor]


def reasons(folder: Path, limits: ServerLimits) -> list[Reason]:
    """Every reason why a server of `limits` cannot serve the adapter in `folder`, most fundamental first; none if it can. Bad content raises nothing.

    Reads every tensor once: 63 MB take about 0.1 s, 3 GB of routed experts some seconds. Imports torch.
    """
    found, linked = stray_files(folder)
    if linked & set(ADAPTER_FILES):
        return found
    config = read_config(folder / CONFIG_FILE)
    listed = read_tensors(folder / WEIGHTS_FILE)
    found += [fault for fault in (config, listed) if isinstance(fault, Reason)]
    if isinstance(config, Reason) and config.code == "not-lora":
        return found
    tensors = None if isinstance(listed, Reason) else sort_tensors(listed)
    if not isinstance(config, Reason):
        found += config_reasons(config, tensors, limits)
    if tensors is None:
        return found
    found += name_reasons(tensors, limits)
    settings = {} if isinstance(config, Reason) else look_up(config, tensors.pairs)
    if isinstance(settings, Reason):
        found.append(settings)
        settings = {}
    found += shape_reasons(tensors, settings, limits)
    found += value_reasons(folder / WEIGHTS_FILE, tensors, settings)
    return found


def layout(folder: Path) -> LoraLayout:
    """How the adapter holds routed experts, by its tensors' names.

    `experts-3d` needs LoRARequest.is_3d_lora_weight=True and, for GLM-4.5V, a server with --enable-mixed-moe-lora-format.

    Raises AdapterInvalid if the weights cannot be read.
    """
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if isinstance(tensors, Reason):
        raise AdapterInvalid(f"{folder / WEIGHTS_FILE}: {tensors}")
    inner = [match[1] for module in sort_tensors(tensors).pairs if (match := LAYER.fullmatch(module))]
    if any(EXPERT_3D.fullmatch(module) for module in inner):
        return "experts-3d"
    return "experts-2d" if any(EXPERT_2D.fullmatch(module) for module in inner) else "plain"


def read_base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape, (out, in) for a linear one, of every module of the base model in `folder` that has a weight; headers are read only.

    Raises OSError or SafetensorError if a file cannot be read, or there is none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                if name.endswith(".weight"):
                    shapes[name.removesuffix(".weight")] = tuple(weights.get_slice(name).get_shape())
    if not shapes:
        raise FileNotFoundError(f"{folder}: holds no *.safetensors with weights")
    return shapes


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 120


def clipped(value: object) -> str:
    """As repr, but short, shallow and free of control characters."""
    return SHORT.repr(value)


def some(names: Iterable[str]) -> str:
    """The first three of `names`, and how many more there are."""
    all_names = list(names)
    return ", ".join(map(clipped, all_names[:3])) + (f" and {len(all_names) - 3} more" if len(all_names) > 3 else "")


# The folder


def stray_files(folder: Path) -> tuple[list[Reason], set[str]]:
    """Reasons for links and pickles anywhere in `folder`, and the links' names relative to it. No link is followed."""
    links, pickles = [], []
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(parent, name)
            if path.is_symlink():
                links.append(str(path.relative_to(folder)))
            elif name in files and path.suffix.lower() in PICKLE_SUFFIXES:
                pickles.append(str(path.relative_to(folder)))
    found = []
    if links:
        found.append(Reason("link", f"the folder holds a link: {some(links)}", "replace it by the file itself; what it points to may change or lie outside"))
    if pickles:
        remedy = f"save the adapter with safetensors and leave only {' and '.join(ADAPTER_FILES)} in the folder; loading a pickle can run code"
        found.append(Reason("pickle", f"the folder holds a pickle: {some(pickles)}", remedy))
    return found, set(links)


def plain_size(path: Path) -> int:
    """The size in bytes; raises OSError if `path` is no plain file (to open a pipe would block)."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a plain file")
    return status.st_size


def why(error: Exception) -> str:
    """The error without the folder's path, which says nothing to a reader."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


# adapter_config.json


def read_config(path: Path) -> dict[str, Any] | Reason:
    """The parsed configuration, its fields of the kinds that vLLM needs; a Reason if it is not one of a LoRA adapter."""
    try:
        if (size := plain_size(path)) > MAX_CONFIG_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_CONFIG_BYTES}")
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"no JSON object (got {clipped(config)})")
    except (OSError, ValueError, RecursionError) as error:
        return Reason("config-unreadable", f"{CONFIG_FILE}: {why(error)}", "restore the file, or train the adapter again")
    if config.get("peft_type") != "LORA":
        return Reason("not-lora", f"peft_type is {clipped(config.get('peft_type'))}", "only LORA can be served; train a LoRA adapter")
    if faults := list(field_faults(config)):
        return Reason("config-unreadable", f"{CONFIG_FILE}: {'; '.join(faults)}", "restore the file, or train the adapter again")
    return config


def field_faults(config: Mapping[str, Any]) -> Iterator[str]:
    def strings(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in config]:
        yield f"{', '.join(missing)}: missing"
        return
    if not is_rank(config["r"]):
        yield f"r: not a positive whole number (got {clipped(config['r'])})"
    if not is_number(config["lora_alpha"]):
        yield f"lora_alpha: not a finite number (got {clipped(config['lora_alpha'])})"
    modules = config["target_modules"]
    if not (modules is None or isinstance(modules, str) or strings(modules)):
        yield f"target_modules: neither a string nor a list of strings (got {clipped(modules)})"
    if not (config.get("modules_to_save") is None or strings(config["modules_to_save"])):
        yield f"modules_to_save: not a list of strings (got {clipped(config['modules_to_save'])})"
    for name, fits, kind in (("rank_pattern", is_rank, "positive whole numbers"), ("alpha_pattern", is_number, "finite numbers")):
        pattern = config.get(name) or {}
        if not (isinstance(pattern, dict) and all(fits(value) for value in pattern.values())):
            yield f"{name}: not an object of {kind} (got {clipped(pattern)})"


def is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # NaN is not


def config_reasons(config: Mapping[str, Any], tensors: Tensors | None, limits: ServerLimits) -> Iterator[Reason]:
    """What vLLM does not implement, told by the configuration or by tensors that only it brings about."""
    magnitudes, biases, full_weights = (tensors.magnitudes, tensors.biases, tensors.full_weights) if tensors else ([], [], [])
    if config.get("use_dora") or magnitudes:
        yield Reason("dora", f"it is a DoRA adapter ({some(magnitudes) if magnitudes else 'use_dora'})", "vLLM has no DoRA; train with use_dora: false")
    if (config.get("bias") or "none") != "none" or config.get("lora_bias") or biases:
        said = f"bias is {clipped(config.get('bias'))}, lora_bias is {clipped(config.get('lora_bias', False))}"
        yield Reason(
            "bias", f"it trains biases ({said}{f', {some(biases)}' if biases else ''})", "vLLM leaves biases out; train with bias: none, lora_bias: false"
        )
    # vLLM lets a classifier's head through here, and refuses its weights later where the model has none, as no chat model has.
    saved = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    if saved or full_weights:
        whole = f"it holds whole modules beside LoRA ({some(full_weights or saved)})"
        yield Reason("modules-to-save", whole, "vLLM serves none for a chat model; train without modules_to_save")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        remedy = "save it as plain LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        yield Reason("unsupported-init", f"init_lora_weights is {clipped(init)}: trained on a base that this initialization had changed", remedy)
    # Arrow routes among several adapters; vLLM does not know the field and would serve this one alone.
    features = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "arrow_config")
    if used := [name for name in features if config.get(name)]:
        yield Reason("unsupported-feature", f"it uses {', '.join(used)}", "vLLM does plain LoRA only; train without")
    ranks = {"r": config["r"], **{f"rank_pattern {clipped(key)}": rank for key, rank in (config.get("rank_pattern") or {}).items()}}
    if above := {name: rank for name, rank in ranks.items() if rank > limits.max_rank}:
        name, rank = max(above.items(), key=lambda item: item[1])
        enough = next((allowed for allowed in LORA_RANKS if allowed >= rank), None)
        fused = " (fused gate_up_proj has twice the recipe's rank)" if name != "r" and "gate_up_proj" in name else ""
        serve = f"serve with lora.max_rank {enough}, or train with a lower rank" if enough else f"train with a lower rank; vLLM ends at {LORA_RANKS[-1]}"
        yield Reason("rank-too-large", f"{name} is {rank}{fused}, the server takes up to {limits.max_rank}", serve)


# Names in adapter_model.safetensors


def read_tensors(path: Path) -> list[Tensor] | Reason:
    """Names, shapes and dtypes; only the header is read, and only one of a sane size."""
    remedy = f"restore {WEIGHTS_FILE}, or register the adapter again"
    try:
        size = plain_size(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise ValueError(f"{size} bytes are left of a longer file, or it is no safetensors file")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header} bytes, more than {MAX_HEADER_BYTES}")
        with safe_open(path, "np") as weights:
            names = weights.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{len(names)} tensors, more than {MAX_TENSORS}")
            slices = ((name, weights.get_slice(name)) for name in names)
            tensors = [Tensor(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
        if long := [tensor.name for tensor in tensors if len(tensor.name) > MAX_NAME_LENGTH]:
            raise ValueError(f"a tensor's name has more than {MAX_NAME_LENGTH} characters: {some(long)}")
    except (OSError, ValueError, SafetensorError) as error:
        return Reason("weights-unreadable", f"{WEIGHTS_FILE}: {why(error)}", remedy)
    return tensors or Reason(
        "no-tensors", f"{WEIGHTS_FILE} holds no tensors", "train the adapter again: its target_modules matched nothing, or saving went wrong"
    )


def sort_tensors(tensors: Sequence[Tensor]) -> Tensors:
    """As vLLM's parse_fine_tuned_lora_name reads names."""
    sorted_ = Tensors({}, [], [], [], [], [], [tensor for tensor in tensors if tensor.dtype not in NOT_FINITE])
    for tensor in tensors:
        name = tensor.name.removeprefix("base_model.model.")
        module, _, end = name.rpartition(".lora_")
        if module and end in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            part = "a" if end.removeprefix("embedding_")[0] == "A" else "b"
            pair = sorted_.pairs.setdefault(checkpoint_name(module), Pair(module))
            if getattr(pair, part):
                sorted_.doubled.append(tensor.name)
            setattr(pair, part, tensor)
        elif module and end.startswith("magnitude_vector"):
            sorted_.magnitudes.append(tensor.name)
        elif name.endswith("bias"):
            sorted_.biases.append(tensor.name)
        elif name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue  # the base's own, which PEFT saves beside embedding_A and _B; vLLM skips it, too
        elif name.endswith(".weight") and ".lora_" not in name:
            sorted_.full_weights.append(tensor.name)
        else:
            sorted_.strange.append(tensor.name)
    return sorted_


def checkpoint_name(module: str) -> str:
    """The module's name in the base's checkpoint; vLLM takes its own names for it, too."""
    if module.startswith("language_model.model."):
        return f"model.language_model.{module.removeprefix('language_model.model.')}"
    return (
        f"model.{module}" if module.startswith("visual.") else module.removeprefix("language_model.") if module.startswith("language_model.lm_head") else module
    )


Place = Literal["wrapped", "experts", "unwrapped", "unknown"]


def place(module: str, limits: ServerLimits) -> Place:
    """Where the weights of `module` would go: into use, or to experts or other modules that are not wrapped, or nowhere."""
    match = LAYER.fullmatch(module)
    expert = match and (EXPERT_2D.fullmatch(match[1]) or EXPERT_3D.fullmatch(match[1]))
    if limits.known is not None and module.removesuffix(".base_layer" if expert else "") not in limits.known:
        return "unknown"
    if expert:
        return "wrapped" if limits.wraps_experts else "experts"
    if match and match[1] in LINEARS and limits.wraps(module):
        return "wrapped"
    inside = match is None and module.startswith(OTHER_PARTS)
    return "unwrapped" if inside or (match and match[1] in LINEARS) or limits.known is not None else "unknown"


def name_reasons(tensors: Tensors, limits: ServerLimits) -> Iterator[Reason]:
    if not tensors.pairs:
        yield Reason("no-tensors", f"{WEIGHTS_FILE} holds neither lora_A nor lora_B", "train the adapter again: its target_modules matched nothing")
    places: defaultdict[Place, list[str]] = defaultdict(list)
    for module in tensors.pairs:
        places[place(module, limits)].append(module)
    others = places["unwrapped"] + places["unknown"]
    if places["unknown"] and len(places["unknown"]) == len(tensors.pairs):
        yield Reason(
            "keys-match-nothing", f"no key names a module of the served model: {some(places['unknown'])}; vLLM would answer as the base", prefix_remedy(others)
        )
    elif others:
        yield Reason("module-not-wrapped", f"the server has no place for the weights of {some(others)}; vLLM would drop them", wrap_remedy(others))
    if experts := places["experts"]:
        remedy = "serve with device: cuda and `lora.target_modules` including experts, or train attention only"
        yield Reason("experts-not-wrapped", f"it adapts routed experts, which this server does not wrap: {some(experts)}; vLLM would drop them", remedy)
    if tensors.strange:
        yield Reason(
            "unsupported-tensor", f"vLLM cannot read {some(tensors.strange)}", "save the adapter with PEFT's save_pretrained, and with plain LoRA only"
        )
    if tensors.doubled:
        yield Reason(
            "duplicate-module", f"weights of one module are there twice, under two names: {some(tensors.doubled)}", "keep one of the two; vLLM takes either"
        )


def prefix_remedy(modules: Sequence[str]) -> str:
    if any(module.startswith(("model.layers.", "layers.")) for module in modules):
        return "it was trained with a text-only class: `tuneserve inspect ADAPTER --write OUT` gives its keys the names of the served class, or train with that one"
    return "train it on the base that is served; its keys begin with base_model.model.model.language_model.layers"


def wrap_remedy(modules: Sequence[str]) -> str:
    if any(module.startswith("model.visual.") for module in modules):
        return "train with the vision tower and its merger frozen (freeze_vit, freeze_aligner): vLLM adapts neither here"
    children = sorted({module.rpartition(".")[2] for module in modules if (match := LAYER.fullmatch(module)) and match[1] in LINEARS})
    packed = sorted({next((name for name, parts in PACKED.items() if child in parts), child) for child in children})
    return f"serve with `lora.target_modules` including {', '.join(packed)}, or train attention only" if packed else "train attention only"


# Shapes


@dataclass(frozen=True)
class Settings:
    """What the configuration gives a module."""

    rank: int
    alpha: float


def look_up(config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Settings] | Reason:
    """By module, as PEFT and vLLM find them: of the first pattern that matches, else r and lora_alpha. The patterns are a stranger's regular expressions."""
    deadline = time.thread_time() + MAX_PATTERN_SECONDS
    remedy = "name modules plainly in rank_pattern and alpha_pattern; vLLM matches each pattern with each module while every request waits"

    def compiled(patterns: Mapping[str, Any]) -> Iterator[tuple[re.Pattern[str], Any]]:
        for key, value in patterns.items():
            if fault := pattern_fault(key):
                raise ValueError(f"the pattern {clipped(key)} {fault}")
            yield re.compile(rf"(.*\.)?({key})$"), value

    def first(patterns: Sequence[tuple[re.Pattern[str], Any]], name: str, default: Any) -> Any:
        for pattern, value in patterns:
            if time.thread_time() > deadline:
                raise ValueError(f"{len(ranks) + len(alphas)} patterns for {len(pairs)} modules take longer than {MAX_PATTERN_SECONDS:.0f} s to match")
            if pattern.match(name):
                return value
        return default

    try:
        ranks, alphas = (list(compiled(config.get(key) or {})) for key in ("rank_pattern", "alpha_pattern"))
        names = {module: pattern_name(pair.peft_name) for module, pair in pairs.items()}
        return {module: Settings(first(ranks, name, config["r"]), first(alphas, name, config["lora_alpha"])) for module, name in names.items()}
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        return Reason("bad-pattern", why(error), remedy)


def pattern_name(module: str) -> str:
    """Fused experts are matched by their parameters' names."""
    if module.endswith(".experts.base_layer"):
        return f"{module.removesuffix('.base_layer')}.gate_up_proj"
    return f"{module}.down_proj" if module.endswith(".experts") else module


def pattern_fault(pattern: str) -> str | None:
    """Why `pattern` is not safe to match: one repetition and one group, which is not repeated, take polynomial time; more may take for ever."""
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL).replace("(?:", "(")
    if len(pattern) > MAX_NAME_LENGTH:
        return f"has {len(pattern)} characters, more than {MAX_NAME_LENGTH}"
    if len(re.findall(r"[*+?{]", bare)) > 1 or bare.count("(") > 1 or re.search(r"\)[*+?{]", bare):
        return "has several repetitions or groups, and may take for ever to match"
    return None


@dataclass(frozen=True)
class Adapted:
    """A module with both halves."""

    settings: Settings | None
    a: Tensor
    b: Tensor


def shape_reasons(tensors: Tensors, settings: Mapping[str, Settings], limits: ServerLimits) -> Iterator[Reason]:
    """Half pairs, and ranks and shapes that vLLM would copy without a word to where they mean something else. Ranks are compared where `settings` has them."""
    whole = {module: Adapted(settings.get(module), pair.a, pair.b) for module, pair in tensors.pairs.items() if pair.a and pair.b}
    if halves := [half.name for pair in tensors.pairs.values() if not (pair.a and pair.b) and (half := pair.a or pair.b)]:
        yield Reason("half-pair", f"lora_A or lora_B is missing beside {some(halves)}", "restore the file, or train the adapter again")
    if faults := [fault for module, adapted in whole.items() if (fault := rank_fault(module, adapted))]:
        remedy = "put back the two files of one training; vLLM scales by the configuration, and adds up what there is of two ranks"
        yield Reason("rank-shape-mismatch", f"{faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}", remedy)
        return
    if faults := [fault for module, adapted in whole.items() if place(module, limits) == "wrapped" and (fault := base_fault(module, adapted, limits))]:
        yield Reason(
            "base-shape-mismatch", f"{faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}", "train the adapter on the base that is served"
        )
    if limits.wraps_experts and (faults := list(expert_faults(whole, limits))):
        remedy = "adapt gate_proj, up_proj and down_proj of every expert of a layer, with one rank for each of the three; vLLM packs them together"
        yield Reason("experts-incomplete", "; ".join(faults[:3]), remedy)


def is_fused(module: str) -> bool:
    """Whether PEFT holds a parameter of all experts under that name, also where a text-only class's prefix keeps vLLM from finding it."""
    return module.endswith((".mlp.experts", ".mlp.experts.base_layer"))


def rank_fault(module: str, adapted: Adapted) -> str | None:
    """What is wrong with the shapes of a pair; fused experts' have a rank's rows (A) and columns (B) for each expert."""
    a, b = adapted.a.shape, adapted.b.shape
    said = f"{clipped(module)}: lora_A is {list(a)}, lora_B is {list(b)}"
    if len(a) < 2 or len(b) < 2 or (LAYER.fullmatch(module) and (len(a) > 2 or len(b) > 2)):
        return f"{said}; both must be matrices"
    if a[0] != b[1] or 0 in a + b:
        return f"{said}; their ranks differ or are 0"
    rank = adapted.settings.rank if adapted.settings else a[0]
    if is_fused(module):
        return f"{said}; no multiple of the configuration's rank, {rank}" if a[0] % rank else None
    return f"{said}; the configuration says rank {rank}" if a[0] != rank else None


def base_fault(module: str, adapted: Adapted, limits: ServerLimits) -> str | None:
    """Where the pair does not fit its module. Wider than the module, vLLM fails half way through loading; narrower, it fills up with zeros and says nothing."""
    shapes = limits.base_shapes or {}
    shape = shapes.get(module)
    if is_fused(module):
        gate_up = module.endswith(".base_layer")
        one = shapes.get(f"{module.removesuffix('.base_layer')}.0.{'gate' if gate_up else 'down'}_proj")
        shape = (one[0] * (2 if gate_up else 1), *one[1:]) if one else None
    given = (adapted.b.shape[0], adapted.a.shape[1])
    if not shape or len(shape) != 2 or given == shape:
        return None
    return f"{clipped(module)} is {list(shape)} in the base, the adapter's update {list(given)}"


def expert_faults(whole: Mapping[str, Adapted], limits: ServerLimits) -> Iterator[str]:
    """Where vLLM, which packs the experts of a layer into one, would fail an assertion.

    With fused ones it does so after it has taken the adapter in, so that a second try seems to succeed.
    """
    single: defaultdict[str, dict[tuple[int, str], int]] = defaultdict(dict)
    fused: defaultdict[str, dict[str, Adapted]] = defaultdict(dict)
    for module, adapted in whole.items():
        if not (match := LAYER.fullmatch(module)):
            continue
        experts = f"{module.removesuffix(match[1])}mlp.experts"
        if expert := EXPERT_2D.fullmatch(match[1]):
            single[experts][int(expert[1]), expert[2]] = adapted.a.shape[0]
        elif expert := EXPERT_3D.fullmatch(match[1]):
            fused[experts]["gate_up_proj" if expert[1] else "down_proj"] = adapted
    for experts, ranks in single.items():
        count = expert_count(experts, limits) or max(number for number, _ in ranks) + 1
        if len(ranks) != 3 * count:
            yield f"{experts}: {len(ranks)} of {3 * count} projections are adapted"
        elif uneven := [kind for kind in ("gate", "up", "down") if len({rank for (_, of), rank in ranks.items() if of == kind}) > 1]:
            yield f"{experts}: the {uneven[0]}_proj of its experts differ in rank"
    for experts, parts in fused.items():
        if experts in single:
            yield f"{experts}: adapted twice, fused and one by one"
        elif len(parts) == 1:
            yield f"{experts}: only {next(iter(parts))} is adapted"
        elif not fits(parts["gate_up_proj"], parts["down_proj"], expert_count(experts, limits)):
            shapes = ", ".join(f"{kind} {list(part.a.shape)} and {list(part.b.shape)}" for kind, part in parts.items())
            yield f"{experts}: the shapes of base_layer and of the other are not those of gate_up_proj and down_proj ({shapes})"


def fits(gate_up: Adapted, down: Adapted, count: int | None) -> bool:
    """Whether two fused pairs can be gate_up_proj and down_proj of equally many experts, `count` if that is known."""
    if gate_up.b.shape[0] != 2 * down.a.shape[1] or gate_up.a.shape[1] != down.b.shape[0]:
        return False
    if not (gate_up.settings and down.settings):
        return True
    counts = {part.a.shape[0] // part.settings.rank for part in (gate_up, down) if part.settings}
    return counts == {count} if count else len(counts) == 1


def expert_count(experts: str, limits: ServerLimits) -> int | None:
    if limits.known is None:
        return None
    numbers = {name.removeprefix(f"{experts}.").partition(".")[0] for name in limits.known if name.startswith(f"{experts}.")}
    return len([number for number in numbers if number.isdecimal()]) or None


# Values


def value_reasons(path: Path, tensors: Tensors, settings: Mapping[str, Settings]) -> Iterator[Reason]:
    """Reads every tensor: numbers that are none, and an adapter that adds nothing."""
    import torch

    if tensors.not_float:
        kinds = ", ".join(sorted({tensor.dtype for tensor in tensors.not_float}))
        names = some(tensor.name for tensor in tensors.not_float)
        yield Reason("dtype", f"weights are no floating-point numbers ({kinds}): {names}", "save it in bfloat16, float16 or float32; vLLM casts without a word")
        return
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bad: list[str] = []
    zero: set[str] = set()
    try:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                # numpy counts bits in this thread; torch would wake its OpenMP pool, whose waiting took 8 s for 63 MB where both cores were busy.
                tensor, exponent = weights.get_tensor(name), NOT_FINITE[weights.get_slice(name).get_dtype()]
                bits = tensor.view(integers[tensor.element_size()]).numpy()
                if ((bits & exponent) == exponent).any():
                    bad.append(name)
                elif not (bits & (2 ** (8 * tensor.element_size() - 1) - 1)).any():  # all but the sign
                    zero.add(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        yield Reason("weights-unreadable", f"{WEIGHTS_FILE}: {why(error)}", f"restore {WEIGHTS_FILE}, or register the adapter again")
        return
    if bad:
        yield Reason(
            "not-finite", f"NaN or infinity in {some(bad)}", "the training diverged: train again with a lower learning rate, or take an earlier checkpoint"
        )
    pairs = {module: pair for module, pair in tensors.pairs.items() if pair.a and pair.b}
    if pairs and all(pair.b.name in zero or pair.a.name in zero for pair in pairs.values() if pair.a and pair.b):
        yield Reason(
            "no-effect", f"lora_B (or lora_A) of all {len(pairs)} modules is zero: it answers as the base", "train it: this is an adapter before its first step"
        )
    elif pairs and all(module in settings and settings[module].alpha == 0 for module in pairs):
        yield Reason("no-effect", "lora_alpha is 0: it answers as the base", "train it with an alpha above 0")
