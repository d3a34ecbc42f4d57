"""With ZeRO-3 only the first process reads a checkpoint's weights, and transformers' own loading still finds what it looks for in the others; gathered weights are let go."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4vMoeForConditionalGeneration, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

from pipeline import swift_zero3, tinyglm
from pipeline.basemodel import TEMPLATE_FILE
from tests.conftest import ROOT

pytestmark = pytest.mark.contract
SMALL = 64
"""Numbers: the routers' biases of the tiny model have 8."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("base")
    processor = tinyglm.make_processor(TEMPLATE_FILE.read_text("utf-8"))
    model = tinyglm.make_model(tinyglm.make_config(processor.tokenizer))
    tinyglm.save(model, processor, folder)
    return model, folder / "model.safetensors"


def fused(model: Any, file: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the process of that rank has once transformers has read and fused."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(swift_zero3, "MOST_NUMBERS", SMALL)
    read = modeling_utils.load_state_dict(file, map_location="cpu", weights_only=True, disable_mmap=None)
    return dict(_apply_weight_conversions_to_state_dict(model, read, get_model_conversion_mapping(model)))


def test_the_others_have_all_names_and_shapes_and_the_content_of_buffers_only(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = saved
    first, other = (fused(model, file, rank, monkeypatch) for rank in (0, 1))
    assert {name: tensor.shape for name, tensor in first.items()} == {name: tensor.shape for name, tensor in other.items()}
    assert set(first) == set(model.state_dict())
    assert not any(tensor.is_meta for tensor in first.values())
    assert all(tensor.is_meta == (tensor.numel() > SMALL) for tensor in other.values())
    for name, _ in Glm4vMoeForConditionalGeneration.named_buffers(model):
        if name in first:
            assert torch.equal(first[name], other[name]), name
    assert any(name.endswith("e_score_correction_bias") for name, tensor in other.items() if not tensor.is_meta)


def test_transformers_asks_by_the_name_that_is_replaced() -> None:
    assert modeling_utils.load_state_dict is swift_zero3.load_state_dict
    assert "load_state_dict" in modeling_utils.PreTrainedModel._load_pretrained_model.__code__.co_names


def frozen_training(*arguments: str) -> dict[str, Any]:
    """What tests/frozen_under_zero3.py says, on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "tests/frozen_under_zero3.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_frozen_weights_are_let_go_layer_by_layer_and_training_is_the_same() -> None:
    plain, ours = frozen_training(), frozen_training("plugin")
    assert plain["gathered"] > 0.9 * plain["all"], "DeepSpeed lets frozen weights go by itself again: the plugin's second half can go"
    assert ours["gathered"] == 0
    assert ours["losses"] == plain["losses"]
