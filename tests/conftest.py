"""Fixtures of the fast tier: projects in temporary folders, tiny rows and adapters made on the spot."""

import contextlib
import json
import signal
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.project import Project
from pipeline.tinyglm import SPECIAL_TOKENS

ROOT = Path(__file__).parents[1]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what is started here would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / ".tuneserve").mkdir()
    return Project(tmp_path)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow store that holds nothing, to be copied: MLflow takes seconds to make one."""
    from pipeline.registry import Registry

    folder = tmp_path_factory.mktemp("empty-store")
    with contextlib.chdir(folder):
        assert Registry(f"sqlite:///{folder}/mlflow.db").registered() == []
    return folder / "mlflow.db"


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


def write_counting_base(folder: Path) -> Path:
    """What tokens are counted with: a tokenizer of single bytes with GLM's special tokens, and an image processor; nothing else of a base model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=[*SPECIAL_TOKENS, "<|own|>"], initial_alphabet=alphabet, vocab_size=300, show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    images = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": 4 * 112 * 112}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images), "utf-8")
    return folder


def write_adapter(folder: Path, scale: float = 1.0, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": numpy.full((8, 4), scale, "float32"), f"{key}.lora_B.weight": numpy.full((4, 8), scale, "float32")}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
