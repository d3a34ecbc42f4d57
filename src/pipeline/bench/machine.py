"""The machine that a benchmark ran on, as far as a reader of its figures needs to know."""

import os
import platform
from typing import Any


def machine() -> dict[str, Any]:
    """GPUs by name (none where nvidia-smi sees none), CPUs that this process may use, their kind, memory and Python; no host name."""
    from pipeline.gpus import gpus_here

    gpus, _ = gpus_here()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "gpus": [gpu.name for gpu in gpus],
        "cpus": cpus,
        "architecture": platform.machine(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
