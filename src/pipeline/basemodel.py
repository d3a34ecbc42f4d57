"""A base model as a value: where it lies, its revision, and whether its folder may be trusted; finds or makes the tiny GLM-4.5V."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import Fault, InvalidInput
from pipeline.progress import Report
from pipeline.project import Project

TINY = "tiny"
TEMPLATE_FILE = Path(__file__).with_name("glm4_5v.jinja")
"""Our chat template; training and serving agree only while both use it."""
DEFINING_SUFFIXES = frozenset({".json", ".safetensors", ".jinja"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
MEASURED_FILE = "tuneserve.json"
"""What a tiny base model scored when it was made; not part of the revision."""
TINY_SOURCES = ("pictures.py", "tinyglm.py", TEMPLATE_FILE.name)
TINY_PACKAGES = ("tokenizers", "torch", "transformers")
TINY_LOCK, TINY_DRAFTS = ".tiny.lock", ".tiny-*.draft"
"""Held while a tiny base model is made, and the folders of those that are not yet whole."""
LOCK_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class BaseModel:
    """A checked base model on disk. Equal revisions mean equal weights, configuration, tokenizer and chat template."""

    folder: Path
    revision: str


def template_digest() -> str:
    """SHA-256 in hex of our chat template's bytes."""
    return hashlib.sha256(TEMPLATE_FILE.read_bytes()).hexdigest()


def read_base_model(folder: Path, digest_cache: Path | None = None) -> BaseModel:
    """The base model in `folder`; its revision is SHA-256 in hex over name and content digest of each defining file, wherever the folder lies.

    `digest_cache` is a file that spares hashing again what has not changed (size, times, device and inode are equal).
    Raises InvalidInput with every reason why the folder is not a base model that may be loaded.
    """
    if not folder.is_dir():
        raise InvalidInput([Fault(str(folder), "", "no such folder; give the folder of a GLM-4.5V in Hugging Face's format, or `tiny`")])
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [name for name in files if not any(part.startswith(".") for part in name.split("/"))]
    if faults := _faults(folder, files):
        raise InvalidInput(faults)
    defining = [name for name in files if Path(name).suffix in DEFINING_SUFFIXES and name != MEASURED_FILE]
    digests = _file_digests([folder / name for name in defining], digest_cache)
    total = hashlib.sha256()
    for name, digest in zip(defining, digests, strict=True):
        total.update(f"{name} {digest}\n".encode())
    return BaseModel(folder, total.hexdigest())


def _faults(folder: Path, files: list[str]) -> list[Fault]:
    """Everything that keeps the folder with these files from being a base model; ms-swift loads it with trust_remote_code, so code is refused."""
    faults = []
    if "config.json" not in files:
        faults.append(Fault(str(folder / "config.json"), "", "missing; download the model again, or give the folder that holds its config.json"))
    if not any(name.endswith(".safetensors") for name in files):
        faults.append(Fault(str(folder), "", "holds no *.safetensors; download the weights in safetensors format"))
    for name in files:
        path, suffix = folder / name, Path(name).suffix
        if suffix in PICKLE_SUFFIXES:
            faults.append(Fault(str(path), "", "a pickle can run code when it is loaded; remove it and keep the safetensors"))
        elif suffix == ".py":
            faults.append(Fault(str(path), "", "Python code would run when the model is loaded; remove it (GLM-4.5V needs none)"))
        elif name.endswith("config.json"):
            faults += _config_faults(path)
        elif name.endswith(".safetensors.index.json"):
            faults += _shard_faults(path)
    return faults


def _config_faults(path: Path) -> list[Fault]:
    config, faults = _read_object(path)
    if "auto_map" in config:
        faults.append(Fault(str(path), "auto_map", "names Python code that would run when the model is loaded; remove the key (GLM-4.5V needs none)"))
    return faults


def _shard_faults(path: Path) -> list[Fault]:
    index, faults = _read_object(path)
    shards = index.get("weight_map")
    if not faults and not isinstance(shards, dict):
        return [Fault(str(path), "weight_map", "missing or not an object; download the file again")]
    missing = sorted({str(name) for name in (shards or {}).values() if not (path.parent / str(name)).is_file()})
    return faults + [Fault(str(path.parent / name), "", f"missing, though {path.name} names it; complete the download") for name in missing]


def _read_object(path: Path) -> tuple[dict[str, Any], list[Fault]]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        return {}, [Fault(str(path), "", f"not JSON ({error}); download the file again")]
    return (content, []) if isinstance(content, dict) else ({}, [Fault(str(path), "", "not a JSON object; download the file again")])


def _file_digests(paths: list[Path], cache: Path | None) -> list[str]:
    """SHA-256 in hex of each file, taken from `cache` where it knows the very file; `cache` then knows them all."""
    known = _read_object(cache)[0] if cache and cache.is_file() else {}
    digests, learnt = [], dict(known)
    for path in paths:
        stat = path.stat()
        key = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}-{stat.st_dev}-{stat.st_ino}"
        digest = known.get(key)
        if not isinstance(digest, str):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        digests.append(digest)
        learnt[key] = digest
    if cache and learnt != known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_name(f"{cache.name}.{os.getpid()}")
        draft.write_text(json.dumps(learnt, indent=0), "utf-8")
        draft.replace(cache)
    return digests


def tiny_base_model(bases_dir: Path, report: Report | None = None) -> BaseModel:
    """The tiny GLM-4.5V below `bases_dir`, made there first (minutes) if the one of this source and these libraries is missing.

    One process makes it while others wait; a build that was cut short is never seen, and is cleared away by the next.
    Raises TuneserveError if the model did not learn to name what it sees.
    """
    report = report or (lambda text, fraction: None)
    folder = bases_dir / tiny_name()
    if not folder.is_dir():
        bases_dir.mkdir(parents=True, exist_ok=True)
        with (bases_dir / TINY_LOCK).open("wb") as lock:
            while not _locked(lock.fileno()):
                report("waiting for another process that makes the tiny GLM-4.5V", 0.0)
                time.sleep(LOCK_POLL_SECONDS)
            if not folder.is_dir():
                _make_tiny(folder, report)
    return read_base_model(folder)


def resolve_base_model(name: str, project: Project, report: Report | None = None) -> BaseModel:
    """The base model that a recipe names: `tiny`, made at first use, or a folder, relative to the project."""
    if name == TINY:
        return tiny_base_model(project.bases, report)
    return read_base_model(project.resolve(Path(name)), project.bases / "digests.json")


def base_folder_at_hand(name: str, project: Project) -> Path | None:
    """The folder of the base model that a recipe names, unchecked, if its tokenizer lies there already; nothing is made or hashed."""
    folder = project.bases / f"tiny-{_tiny_digest()[:12]}" if name == TINY else project.resolve(Path(name))
    return folder if (folder / "tokenizer.json").is_file() else None


def _make_tiny(folder: Path, report: Report) -> None:
    """Build into a draft beside `folder`, which appears only when all is written. Runs under the lock, so every draft found is a dead build's."""
    from pipeline import tinyglm

    for stale in folder.parent.glob(TINY_DRAFTS):
        shutil.rmtree(stale)
    draft = folder.with_name(f".{folder.name}.draft")
    tinyglm.make_tiny(draft, TEMPLATE_FILE.read_text("utf-8"), MEASURED_FILE, report)
    draft.rename(folder)


def _locked(descriptor: int) -> bool:
    """Whether this process now holds the lock; it is let go when the file is closed or the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def tiny_name() -> str:
    """The folder's name of the tiny GLM-4.5V that this source and these libraries make; one of any other name is of older ones."""
    return f"{TINY}-{_tiny_digest()[:12]}"


def _tiny_digest() -> str:
    """SHA-256 in hex over everything that decides what the tiny model becomes."""
    total = hashlib.sha256()
    for source in TINY_SOURCES:
        total.update(Path(__file__).with_name(source).read_bytes())
    for package in TINY_PACKAGES:
        total.update(f"{package} {version(package)}\n".encode())
    return total.hexdigest()
