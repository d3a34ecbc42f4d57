"""On a Python path, this makes the tensors of a base model without weights when they are read (full_size_base.py writes such a folder); all other files are as ever.

What then trains is what always does: ms-swift asks transformers, and transformers reads safetensors files, fuses, converts and quantizes tensor by tensor. Only the
214 GB need not lie on a disk. Values are random with GLM-4.5V's spread, so that routing is balanced and arithmetic costs what it costs. If $TUNESERVE_PEAK names a
folder, a process that used the GPU leaves its peak there.
"""

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors

MARKER = ".weights-are-made"
SPREAD = 0.02
whole_open = safetensors.safe_open


class MadeSlice:
    """One tensor of a file without content."""

    def __init__(self, name: str, described: Any) -> None:
        self.name, self.described = name, described

    def get_shape(self) -> list[int]:
        return list(self.described.get_shape())

    def get_dtype(self) -> str:
        return str(self.described.get_dtype())

    def __getitem__(self, index: object) -> Any:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        empty = torch.empty(self.get_shape(), dtype=torch.float32 if self.get_dtype() == "F32" else torch.bfloat16, device=device)
        if self.name.endswith("bias"):
            return empty.zero_()[index]
        return (empty.fill_(1) if "norm" in self.name else empty.normal_(0, SPREAD))[index]


class MadeFile:
    """A safetensors file that has a header only."""

    def __init__(self, described: Any) -> None:
        self.described = described

    def __enter__(self) -> "MadeFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.described.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.described.keys())

    def metadata(self) -> dict[str, str] | None:
        found: dict[str, str] | None = self.described.metadata()
        return found

    def get_slice(self, name: str) -> MadeSlice:
        return MadeSlice(name, self.described.get_slice(name))

    def get_tensor(self, name: str) -> Any:
        return self.get_slice(name)[...].cpu()  # who asks for whole tensors holds them all


def opened(filename: Any, *arguments: Any, **options: Any) -> Any:
    file = whole_open(filename, *arguments, **options)
    return MadeFile(file) if (Path(filename).parent / MARKER).exists() else file


def leave_peak() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peaks = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
        (Path(os.environ["TUNESERVE_PEAK"]) / f"{os.getpid()}.json").write_text(json.dumps({"command": sys.argv[0], **peaks}), "utf-8")


if __name__ == "sitecustomize":
    safetensors.safe_open = opened
    if "TUNESERVE_PEAK" in os.environ:
        atexit.register(leave_peak)
