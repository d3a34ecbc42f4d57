"""Fixtures of the fast tier: projects in temporary folders, tiny rows and adapters made on the spot."""

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline.project import Project

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / ".tuneserve").mkdir()
    return Project(tmp_path)


def write_rows(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def row(answer: str = "Azul tote", image: str | None = "a.png", question: str = "What product is this?", **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": ("<image>" if image else "") + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image] if image else [], **more}


def write_image(path: Path, colour: tuple[int, int, int] = (200, 10, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def write_adapter(folder: Path, scale: float = 1.0, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": numpy.full((8, 4), scale, "float32"), f"{key}.lora_B.weight": numpy.full((4, 8), scale, "float32")}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
