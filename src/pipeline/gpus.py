"""GPUs and their memory: the kinds that teams use, by name, and the ones that are in this machine."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from pipeline.errors import Fault, InvalidInput

GIB = 2**30
MIB = 2**20
NVIDIA_SMI_SECONDS = 30.0
"""It takes seconds on hosts without the persistence daemon."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `bytes` is what CUDA reports as its total (less than the name says); `source` where that was seen."""

    name: str
    bytes: int
    source: str


KNOWN = tuple(
    Gpu(name, int(gib * GIB), source)
    for name, gib, source in (
        ("rtx-4090-24gb", 23.5, "out-of-memory messages say 23.52 to 23.68 GiB (SoulX-FlashTalk#5, VGen#104)"),
        ("a100-40gb", 39.4, "out-of-memory messages say 39.4 to 39.5 GiB (CoSeR#10)"),
        ("l40s-48gb", 44.4, "out-of-memory messages say 44.40 to 44.53 GiB (Step-Video-T2V#8, Wan2.1#205)"),
        ("a100-80gb", 79.1, "others see 79.22 and 79.25 GiB (vllm#10511, VAREdit#6)"),
        ("h100-80gb", 79.1, "85,017,493,504 B (79.18 GiB) measured; others see 79.11 GiB with another driver (vllm#27508)"),
        ("h200-141gb", 139.8, "calculated: nvidia-smi's 143,771 MiB less about 600 MiB that the driver reserves"),
        ("b200-180gb", 178.3, "cudaGetDeviceProperties says 178.35 GiB (pytorch/ao#4002); not seen by us"),
    )
)
"""Smallest first. Drivers differ by 0.1 GiB, so the lower figure counts. Only the H100 was seen by us."""


def known_gpu(name: str) -> Gpu:
    """The kind called `name`. Raises InvalidInput, naming the known ones."""
    for gpu in KNOWN:
        if gpu.name == name.lower():
            return gpu
    raise InvalidInput([Fault("--gpu", "", f"{name} is not known; known: {', '.join(gpu.name for gpu in KNOWN)}")])


def gpus_here() -> tuple[list[Gpu], str]:
    """The GPUs that CUDA would use in this machine, and why there are none if so.

    Asks nvidia-smi, which comes with the driver: torch would hold memory on the GPU that is asked about. Total less reserved is what CUDA reports (measured: equal to the byte).
    """
    if shutil.which("nvidia-smi") is None:
        return [], "nvidia-smi is not on the PATH, so there is no NVIDIA driver"
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.reserved", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({error})"
    if done.returncode != 0:
        return [], f"nvidia-smi fails ({(done.stderr or done.stdout).strip()[:200]})"
    return read_nvidia_smi(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_nvidia_smi(text: str, visible: str | None) -> tuple[list[Gpu], str]:
    """The GPUs in nvidia-smi's table (index, uuid, name, total and reserved MiB), in the order of CUDA_VISIBLE_DEVICES if that is set; pure."""
    found: dict[str, Gpu] = {}
    order: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or not cells[3].isdecimal():
            continue
        index, uuid, name, total = cells[0], cells[1], cells[2], int(cells[3])
        reserved = int(cells[4]) if cells[4].isdecimal() else 0
        gpu = Gpu(name, (total - reserved) * MIB, "nvidia-smi")
        found |= {index: gpu, uuid: gpu}
        order.append(index)
    if visible is None:
        return [found[index] for index in order], "" if order else "nvidia-smi lists none"
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        matches = [gpu for key, gpu in found.items() if key == entry or (len(entry) > 4 and key.startswith(entry))]
        if not matches:  # CUDA ignores it and all that follow; a part of a GPU (MIG) has another size than the GPU
            break
        chosen.append(matches[0])
    return chosen, "" if chosen else f"CUDA_VISIBLE_DEVICES={visible} names none that nvidia-smi lists whole"
