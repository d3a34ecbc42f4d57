"""An adapter held against a server: which server is meant, what is known of it, and every reason why it cannot serve the adapter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.adapter import name_fault
from pipeline.anatomy import named_base, sizes
from pipeline.basemodel import TINY, base_folder_at_hand, read_base_model, template_digest
from pipeline.command import SERVING_RECIPE
from pipeline.errors import InvalidInput, VersionRefused
from pipeline.project import Project
from pipeline.recipe import ServingRecipe, load_recipe
from pipeline.servable import (
    CONFIG_FILE,
    LAYER,
    LORA_RANKS,
    WEIGHTS_FILE,
    Adapted,
    Reason,
    ServerLimits,
    base_fault,
    read_base_shapes,
    read_config,
    read_tensors,
    reasons,
    sort_tensors,
)
from pipeline.serving.wanted import entry_faults

if TYPE_CHECKING:
    from pipeline.serving.wanted import RegisteredVersion

ANY_SERVER = ServerLimits(LORA_RANKS[-1], ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "gate", "experts"), wraps_experts=True)
"""Everything that vLLM 0.32 can wrap of this model, at its highest rank."""


@dataclass(frozen=True)
class Target:
    """What an adapter is held against. Without a recipe: vLLM's rules alone. `base_folder` only if the base lies here already; nothing is made or fetched."""

    limits: ServerLimits
    recipe: ServingRecipe | None = None
    path: Path | None = None
    base_folder: Path | None = None
    notes: tuple[str, ...] = field(default=())
    """What was not looked at, and why."""

    @property
    def title(self) -> str:
        return f"{self.recipe.name} ({self.path})" if self.recipe else "vLLM's rules, no server's"

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": str(self.path) if self.path else None,
            "server": self.recipe.name if self.recipe else None,
            "base_model": self.recipe.base_model if self.recipe else None,
            "base_known": self.base_folder is not None,
            "max_rank": self.limits.max_rank,
            "target_modules": list(self.limits.target_modules),
            "wraps_experts": self.limits.wraps_experts,
            "notes": list(self.notes),
        }


def server_of(path: Path, project: Project) -> Target:
    """The server of a serving recipe. Raises InvalidInput if the recipe is wrong."""
    recipe = load_recipe(path, ServingRecipe)
    limits = ServerLimits(recipe.lora.max_rank, recipe.lora.target_modules, recipe.lora.wraps_experts)
    folder = base_folder_at_hand(recipe.base_model, project)
    try:
        limits = replace(limits, base_shapes=read_base_shapes(folder) if folder else None)
    except (OSError, SafetensorError):
        folder = None
    unknown = f"the base {recipe.base_model} is not here: names were judged by GLM-4.5V's pattern, shapes and revision not at all"
    return Target(limits, recipe, path, folder, () if folder else (unknown,))


def likely_server(folder: Path, project: Project) -> Target:
    """The server that an adapter is for, where nobody says: the quickstart's or the only other one whose base it names; else none, and a note."""
    config = read_config(folder / CONFIG_FILE)
    named = None if isinstance(config, Reason) else named_base(config)
    usual = project.root / SERVING_RECIPE
    fitting = []
    for path in sorted(usual.parent.glob("*.yaml")):
        try:
            recipe = load_recipe(path, ServingRecipe)
        except InvalidInput:
            continue
        if (named is None and path == usual) or (named is not None and same_base(named, recipe.base_model, project)):
            fitting.append(path)
    if usual in fitting or len(fitting) == 1:
        found = server_of(usual if usual in fitting else fitting[0], project)
        shown = Path(project.relative(found.path)) if found.path else None
        if named is not None or not contradicts(folder, found.limits):
            return replace(found, path=shown, notes=(f"no --serving was given: held against {shown}", *found.notes))
        why = f"it names no base, and does not fit that of {shown}"
    elif fitting:
        why = f"several recipes have its base ({named}): {', '.join(path.name for path in fitting)}"
    else:
        why = f"no recipe here has its base ({named})" if named else "it names no base"
    return Target(ANY_SERVER, notes=(f"no --serving was given, and {why}: held against vLLM's rules alone, without a server's limits or its base",))


def contradicts(folder: Path, limits: ServerLimits) -> bool:
    """Whether the adapter has a layer that the base lacks, or a shape that does not fit."""
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if isinstance(tensors, Reason) or limits.known is None:
        return False
    pairs = {module: pair for module, pair in sort_tensors(tensors).pairs.items() if LAYER.fullmatch(module)}
    if any(module.removesuffix(".base_layer") not in limits.known for module in pairs):
        return True
    whole = [(module, Adapted(None, pair.a, pair.b)) for module, pair in pairs.items() if pair.a and pair.b and len(pair.a.shape) == len(pair.b.shape) == 2]
    return any(base_fault(module, adapted, limits) for module, adapted in whole)


def same_base(named: str, recipe_base: str, project: Project) -> bool:
    """Whether an adapter's word for its base may mean a recipe's: the same folder, or one of the same last name. A tiny one's folder is called tiny-<digest>."""
    name = Path(named).name.lower()
    if recipe_base == TINY:
        return name == TINY or name.startswith(f"{TINY}-")
    return project.resolve(Path(named)) == project.resolve(Path(recipe_base)) or name == Path(recipe_base).name.lower()


def folder_reasons(folder: Path, target: Target, project: Project) -> list[Reason]:
    """Every reason against the files in `folder`, most fundamental first. A base that both name and that lies here is compared by revision."""
    return [*reasons(folder, target.limits), *size_reasons(folder, target), *base_reasons(folder, target, project)]


def size_reasons(folder: Path, target: Target) -> Iterator[Reason]:
    limit = int(target.recipe.lora.max_adapter_gib * 2**30) if target.recipe else None
    if limit is not None and (size := sum(sizes(folder))) > limit:
        yield Reason("too-large", f"it has {size} bytes, more than {limit}", "raise lora.max_adapter_gib in the serving recipe if it should be served")


def base_reasons(folder: Path, target: Target, project: Project) -> Iterator[Reason]:
    config = read_config(folder / CONFIG_FILE)
    named = None if isinstance(config, Reason) else named_base(config)
    if named is None or target.base_folder is None:
        return
    trained_on = project.resolve(Path(named))
    try:  # a stranger's path: only what looks like a model's folder is read
        if not ((trained_on / "config.json").is_file() and any(trained_on.glob("*.safetensors"))) or trained_on.samefile(target.base_folder):
            return
    except OSError:
        return
    trained, served = (revision(base, project) for base in (trained_on, target.base_folder))
    if trained and served and trained != served:
        yield Reason("wrong-base", f"trained on base {trained[:16]} ({named}), this server has {served[:16]}", "train it on the served base")


def entry_reasons(version: "RegisteredVersion", target: Target, project: Project) -> list[Reason]:
    """Every reason in a version's entry in the registry, as a replica sees it."""
    if target.recipe is None:
        return list(entry_faults(version, None, template_digest(), ()))
    served = {target.recipe.served_name}
    name = [Reason("bad-name", fault, "register the adapter under another name")] if (fault := name_fault(version.name, served)) else []
    known = revision(target.base_folder, project) if target.base_folder else None
    return [*name, *entry_faults(version, known, template_digest(), served)]


def revision(base: Path, project: Project) -> str | None:
    """The base's revision, hashed once; None if the folder is no base model that may be loaded."""
    try:
        return read_base_model(base, project.bases / "digests.json" if project.bases.is_dir() else None).revision
    except (InvalidInput, OSError):
        return None


def refusal(error: VersionRefused) -> Reason:
    """What a replica says when it refuses files, as a Reason."""
    message, _, remedy = str(error).rpartition("; ")
    return Reason(error.code, message, remedy)


def verdict(found: Sequence[Reason], anatomy: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """What `tuneserve inspect --json` says."""
    return {"servable": not found, "reasons": listed(found), "adapter": dict(anatomy), "against": target.as_dict()}


def listed(found: Sequence[Reason]) -> list[dict[str, str]]:
    """Each code once: an entry in the registry and the files may say the same."""
    first: dict[str, Reason] = {}
    for reason in found:
        first.setdefault(reason.code, reason)
    return [{"code": reason.code, "message": reason.message, "remedy": reason.remedy} for reason in first.values()]
