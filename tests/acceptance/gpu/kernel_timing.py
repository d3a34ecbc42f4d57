"""How long a kernel takes inside a model's step, and whether two of its configurations compute the same."""

import statistics
from collections.abc import Callable

import torch

REPLAYS = 7


def microseconds(run: Callable[[int], object], layers: int) -> float:
    """Of one launch: `run(number)` launches with the weights of that layer. The median of CUDA graphs that go through all layers' weights, as a model does, so that no cache holds them."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(layers):
            run(number)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / layers / 2)
    return statistics.median(times)


def same(output: torch.Tensor, wanted: torch.Tensor, most: float) -> bool:
    """But for rounding: the difference's norm is at most `most` of the norm; NaN is not."""
    return ((output - wanted).float().norm() / wanted.float().norm()).item() <= most
