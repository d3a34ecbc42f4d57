"""Run by torchrun: `tests/frozen_under_zero3.py [plugin]` trains a small frozen model with adapters under ZeRO-3 on CPUs, each layer checkpointed with reentry as ms-swift does, the loss in chunks.

Prints as JSON the loss of each step, and how many frozen numbers stood gathered at most right after a layer's module ran, of `all` frozen ones.
"""

import importlib
import json
import sys

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from pipeline import swift_chunked_loss

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it asks for a compiler
WIDTH, LAYERS, STEPS, ROWS, WORDS = 32, 6, 4, 8, 50
swift_chunked_loss.CHUNK_TOKENS = 3


class Experts(nn.Module):
    """Weights that are used through a view, as fused experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 10, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", hidden, self.weights.transpose(-2, -1)).mean(1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False))
        self.experts = Experts()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + torch.tanh(self.base(hidden) + self.adapter(hidden))
        return hidden + self.experts(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden.requires_grad_(True)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        return swift_chunked_loss.chunked_loss(self.head, hidden[None], torch.arange(len(hidden))[None])


def main() -> None:
    if sys.argv[1:] == ["plugin"]:
        importlib.import_module("pipeline.swift_zero3")
    torch.manual_seed(0)
    model = Model()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": zero, "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad], config=config)
    gathered: list[int] = []

    def look(*_: object) -> None:
        gathered.append(sum(parameter.ds_numel for parameter in frozen if parameter.ds_status == ZeroParamStatus.AVAILABLE))

    for layer in model.layers:
        layer.base.register_forward_hook(look)
        layer.experts.register_forward_hook(look)
    losses = []
    for step in range(STEPS):
        rows = torch.randn(ROWS * distributed.get_world_size(), WIDTH, generator=torch.Generator().manual_seed(step))
        loss = engine(rows.chunk(distributed.get_world_size())[distributed.get_rank()].clone())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if distributed.get_rank() == 0:
        print(json.dumps({"losses": losses, "gathered": max(gathered), "all": sum(parameter.ds_numel for parameter in frozen)}))


main()
