"""A PEFT adapter directory as a value: which files it is, whether they may be trusted, and its digest, which is its identity."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.errors import AdapterInvalid

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a served adapter may be called; never a base model's served name nor a RESERVED_NAMES entry."""
RESERVED_NAMES = frozenset({"image", "video", "audio", "text"})
"""vLLM gives LoRA requests of these names a meaning of its own (default multimodal adapters)."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter on disk. `digest` is SHA-256 over the two files; equal digests mean equal weights and settings."""

    folder: Path
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    tensors: int


def adapter_digest(folder: Path) -> str:
    """SHA-256 in hex over name and content digest of each of ADAPTER_FILES, independent of where the folder lies.

    Raises AdapterInvalid if a file is missing or is a link.
    """
    total = hashlib.sha256()
    for name in ADAPTER_FILES:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise AdapterInvalid(f"{path}: missing or not a plain file; an adapter folder holds {' and '.join(ADAPTER_FILES)}")
        with path.open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, its config parsed and its safetensors header read (no tensor is loaded).

    Raises AdapterInvalid for a missing file, a config that is not LoRA, or a damaged safetensors file.
    """
    digest = adapter_digest(folder)
    config_path, weights_path = (folder / name for name in ADAPTER_FILES)
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except ValueError as error:
        raise AdapterInvalid(f"{config_path}: not JSON ({error}); train the adapter again or restore the file") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterInvalid(f"{config_path}: not a LoRA adapter; only peft_type LORA is served")
    try:
        with safe_open(weights_path, "np") as weights:
            tensors = len(weights.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterInvalid(f"{weights_path}: not a readable safetensors file ({error})") from error
    if tensors == 0:
        raise AdapterInvalid(f"{weights_path}: holds no tensors")
    modules = config.get("target_modules") or ()
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        target_modules = (modules,) if isinstance(modules, str) else tuple(sorted(modules))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterInvalid(f"{config_path}: a field is missing or of the wrong kind ({error!r}); train the adapter again") from error
    return Adapter(folder, digest, rank, alpha, target_modules, tensors)


def name_fault(name: str, base_names: frozenset[str] | set[str] = frozenset()) -> str | None:
    """Why `name` may not be served as an adapter, or None. vLLM looks adapters up before bases, so a base's name would hijack it."""
    if not ADAPTER_NAME.fullmatch(name):
        return "a name is 1 to 64 letters, digits, '.', '_' or '-', and starts with a letter or a digit"
    if name in RESERVED_NAMES:
        return f"'{name}' is reserved by vLLM ({', '.join(sorted(RESERVED_NAMES))})"
    if name in base_names:
        return f"'{name}' is the name of a served base model; requests for the base would reach the adapter"
    return None
