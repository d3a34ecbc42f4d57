"""y += x A B for the tokens of many adapters at once, as one GPU kernel (Triton). vLLM takes three: it clears a buffer, adds up x A in it (shrink), adds (x A) B to y (expand).

While answers are made a launch takes longer than its work, and longer steps are bound by memory, where this kernel reads x once for all slices (q, k and v) of a layer.

Tokens are sorted by adapter and cut into tiles of one adapter's; `shares` programs work on a tile. Each multiplies its share of x with its share of A and writes what comes of it. When all
of the tile have arrived, each adds those parts up, in a fixed order, so that the same input gives the same output, and expands its share of the columns. To be waited for, a tile's programs
must all run or have run: there are at most 64, a GPU runs hundreds at a time, and starts them in the order of their numbers, in which a tile's stand together. (That order is not in CUDA's
specification; CUB's scans, which wait for earlier blocks, rely on it too. Beside another kernel they start as that one's programs end, which wait for none of theirs.) Sums are in float32, x A and its product with B are rounded to x's type as in vLLM.

Triton's interpreter ($TRITON_INTERPRET=1), which runs programs one after the other, gets both halves as two launches.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SLICES = 3
MOST_TILES = 8192
ONE_SLICE_TOKENS = 1024
"""Where there is one slice, vLLM's kernels read x once too, and are as fast or faster in steps of more tokens than this (compare_lora.py, H100)."""
LEAST_DOT = 16
"""tl.dot's shortest inner dimension, for two-byte numbers."""
REDUCED = 4096
"""Numbers that a program adds up at a time: what its registers hold."""
ADDED = 1024
"""Columns of a program that adds."""
HOPPER = (9, 0)
"""The first compute capability with programmatic dependent launches, which start a kernel while the one before it ends."""


class Shape(NamedTuple):
    """How the work is cut."""

    rows: int
    """Tokens of a tile."""
    shares: int
    """Programs of a tile; a power of two."""
    columns: int
    """Outputs of a step of expanding, of rank 16."""
    inner: int
    """Inputs of a step of shrinking, at most."""
    warps: int
    stages: int


SHAPES = (
    (4, Shape(rows=4, shares=64, columns=256, inner=128, warps=4, stages=2)),
    (64, Shape(rows=4, shares=32, columns=512, inner=128, warps=2, stages=2)),
    (384, Shape(rows=32, shares=16, columns=512, inner=64, warps=4, stages=3)),
    (1024, Shape(rows=32, shares=8, columns=512, inner=64, warps=4, stages=3)),
    (MOST_TILES * 16, Shape(rows=32, shares=4, columns=512, inner=64, warps=4, stages=3)),
)
"""By the most tokens of a step, what is fastest of these: tests/acceptance/gpu/compare_lora.py on an H100, GLM-4.5V's attention, rank 16, one and eight adapters."""
BESIDE_SHAPES = (
    (4, Shape(rows=4, shares=16, columns=512, inner=128, warps=4, stages=3)),
    (16, Shape(rows=16, shares=8, columns=512, inner=128, warps=4, stages=3)),
    (64, Shape(rows=16, shares=16, columns=512, inner=128, warps=4, stages=3)),
    *SHAPES[2:],
)
"""The same beside other work, as the base's product is: what has that and this end soonest, of the same attention in FP8 on an H200 (docs/benchmarks.md). For answers few programs, which leave the
GPU to the product; in longer steps, where it takes the whole GPU, what is fastest by itself."""


@triton.jit
def _tile_of(number, lora_ids, lora_tokens, lora_starts, GROUPS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Slot, place of the first token and number of tokens left of the tile; no tokens if there is no such tile. Group of slot -1: tokens of the base."""
    group = tl.arange(0, PADDED)
    there = group < GROUPS
    slots = tl.load(lora_ids + group, there, -1)
    tokens = tl.where(slots >= 0, tl.load(lora_tokens + group, there, 0), 0)
    starts = tl.load(lora_starts + group, there, 0)
    tiles = (tokens + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    mine = (number < ends) & (number >= ends - tiles)
    before = (number - tl.sum(tl.where(mine, ends - tiles, 0))) * ROWS
    return tl.sum(tl.where(mine, slots, 0)), tl.sum(tl.where(mine, starts, 0)) + before, tl.sum(tl.where(mine, tokens, 0)) - before


@triton.jit
def _shrink(states, a, slot, at, INPUTS: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr):
    weights = a + slot.to(tl.int64) * (RANK * INPUTS) + tl.arange(0, RANK)[None, :] * INPUTS
    return tl.dot(states, tl.load(weights + at + tl.arange(0, INNER)[:, None]))


@triton.jit
def _step_of(step, b0, b1, b2, width0, width1, width2, SLICES: tl.constexpr, COLUMNS: tl.constexpr):
    """The slice that a step of expanding belongs to: its B, width, first column in y, and number; and the step's first column in the slice."""
    b, width, first, number, begin = b0, width0, 0, 0, step
    if SLICES > 1:
        steps0 = tl.cdiv(width0, COLUMNS)
        if step >= steps0:
            b, width, first, number, begin = b1, width1, width0, 1, step - steps0
    if SLICES > 2:
        steps01 = tl.cdiv(width0, COLUMNS) + tl.cdiv(width1, COLUMNS)
        if step >= steps01:
            b, width, first, number, begin = b2, width2, width0 + width1, 2, step - steps01
    return b, width, first, number, begin * COLUMNS


@triton.jit
def _b_weights(b, slot, width, column, RANK: tl.constexpr):
    weights = b + slot.to(tl.int64) * width * RANK + column[None, :] * RANK
    return tl.load(weights + tl.arange(0, RANK)[:, None], (column < width)[None, :], 0.0)


@triton.jit
def _sum_of(parts, row, real, SHARES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, REDUCE: tl.constexpr):
    """x A of a tile: the sum of what its programs wrote, [ROWS, RANK]. Read past the first cache, which may not have what others wrote."""
    part = tl.arange(0, REDUCE)[:, None, None] * (ROWS * RANK) + row[None, :, None] * RANK + tl.arange(0, RANK)[None, None, :]
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for begin in tl.static_range(0, SHARES, REDUCE):
        total += tl.sum(tl.load(parts + begin * (ROWS * RANK) + part, real[None, :, None], 0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _onto(y, token, real, y_stride, column, width, first, ADD: tl.constexpr):
    """Where a step's outputs go, which of them there are, and what is there already."""
    place = y + token.to(tl.int64)[:, None] * y_stride + (first + column)[None, :]
    inside = real[:, None] & (column < width)[None, :]
    return place, inside, tl.load(place, inside & ADD, 0.0)


@triton.jit
def _shrink_expand(
    x,
    y,
    a0,
    a1,
    a2,
    b0,
    b1,
    b2,
    width0,
    width1,
    width2,
    parts,
    arrivals,
    tokens,
    lora_ids,
    lora_tokens,
    lora_starts,
    x_stride,
    y_stride,
    INPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    REDUCE: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    ONE_STEP: tl.constexpr,
    SHRINKS: tl.constexpr,
    EXPANDS: tl.constexpr,
    ADD: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    share = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.arange(0, ROWS)
    if ONE_TOKEN:
        slot = tl.load(lora_ids)
        if slot < 0:
            if launch_pdl:
                tl.extra.cuda.gdc_wait()  # or the kernel after this one might begin before the one before it has ended
            return
        real = row < 1
        token = row
    else:
        slot, begin, left = _tile_of(tile, lora_ids, lora_tokens, lora_starts, GROUPS, PADDED, ROWS)
        if left <= 0:
            if launch_pdl:
                tl.extra.cuda.gdc_wait()
            return
        real = row < left
        token = tl.load(tokens + begin + row, real, 0)
    steps = tl.cdiv(width0, COLUMNS)
    if SLICES > 1:
        steps += tl.cdiv(width1, COLUMNS)
    if SLICES > 2:
        steps += tl.cdiv(width2, COLUMNS)
    inner_column = tl.arange(0, COLUMNS)
    if ONE_STEP:  # each program has one step of expanding at most: its weights are read before it waits
        b, width, first, number, start = _step_of(min(share, steps - 1), b0, b1, b2, width0, width1, width2, SLICES, COLUMNS)
        weights = _b_weights(b, slot, width, start + inner_column, RANK)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()  # x and y come from the kernels before; weights and tokens' adapters do not
    tile_parts = parts + tile * (SLICES * SHARES * ROWS * RANK)
    if SHRINKS:
        sum0 = tl.zeros((ROWS, RANK), dtype=tl.float32)
        sum1 = tl.zeros((ROWS, RANK), dtype=tl.float32)
        sum2 = tl.zeros((ROWS, RANK), dtype=tl.float32)
        for at in range(share * (INPUTS // SHARES), (share + 1) * (INPUTS // SHARES), INNER):
            states = tl.load(x + token.to(tl.int64)[:, None] * x_stride + at + tl.arange(0, INNER)[None, :], real[:, None], 0.0)
            sum0 += _shrink(states, a0, slot, at, INPUTS, RANK, INNER)
            if SLICES > 1:
                sum1 += _shrink(states, a1, slot, at, INPUTS, RANK, INNER)
            if SLICES > 2:
                sum2 += _shrink(states, a2, slot, at, INPUTS, RANK, INNER)
        part = tile_parts + share * (ROWS * RANK) + row[:, None] * RANK + tl.arange(0, RANK)[None, :]
        tl.store(part, sum0, real[:, None])
        if SLICES > 1:
            tl.store(part + SHARES * ROWS * RANK, sum1, real[:, None])
        if SLICES > 2:
            tl.store(part + 2 * SHARES * ROWS * RANK, sum2, real[:, None])
    if SHRINKS and EXPANDS:
        tl.debug_barrier()  # all threads of the program have written
        before = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu")
        if ONE_STEP and share >= steps:
            return
        # The count is never set back: each launch adds SHARES to it.
        wanted = (before // SHARES + 1) * SHARES
        while tl.atomic_add(arrivals + tile, 0, sem="acquire", scope="gpu") < wanted:
            pass
        tl.debug_barrier()
    if EXPANDS and ONE_STEP:
        if share < steps:
            shrunk = _sum_of(tile_parts + number * (SHARES * ROWS * RANK), row, real, SHARES, ROWS, RANK, REDUCE)
            change = tl.dot(shrunk.to(weights.dtype), weights).to(y.dtype.element_ty)
            place, inside, old = _onto(y, token, real, y_stride, start + inner_column, width, first, ADD)
            tl.store(place, old + change, inside)
    elif EXPANDS:
        each = tl.cdiv(steps, SHARES)
        for step in range(share * each, min((share + 1) * each, steps)):
            b, width, first, number, start = _step_of(step, b0, b1, b2, width0, width1, width2, SLICES, COLUMNS)
            weights = _b_weights(b, slot, width, start + inner_column, RANK)
            shrunk = _sum_of(tile_parts + number * (SHARES * ROWS * RANK), row, real, SHARES, ROWS, RANK, REDUCE)
            change = tl.dot(shrunk.to(weights.dtype), weights).to(y.dtype.element_ty)
            place, inside, old = _onto(y, token, real, y_stride, start + inner_column, width, first, ADD)
            tl.store(place, old + change, inside)


@triton.jit
def _add_rows(y, change, slots, y_stride, change_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = y + row * y_stride + column, column < width
    changed = tl.load(place, inside) + tl.load(change + row * change_stride + column, inside)  # read together with the slot, not after it
    tl.store(place, changed, inside & (tl.load(slots + row) >= 0))


HALVES = ((True, False), (False, True)) if triton.knobs.runtime.interpret else ((True, True),)
"""What each launch does, shrinking and expanding."""


def shape_for(tokens: int, beside: bool = False) -> Shape:
    return next(shape for most, shape in (BESIDE_SHAPES if beside else SHAPES) if tokens <= most)


def supported(tokens: int, inputs: int, rank: int, slices: int) -> bool:
    """Whether `add` is for a step of so many tokens through a layer of so many inputs, with adapters of this rank."""
    power_of_two = rank & (rank - 1) == 0
    if slices == 1 and tokens > ONE_SLICE_TOKENS:
        return False
    if not 1 <= tokens <= SHAPES[-1][0] or not LEAST_DOT <= rank <= 64 or not power_of_two or not 1 <= slices <= MOST_SLICES:
        return False
    return min(_inner(inputs, shape_for(tokens, beside)) for beside in (False, True)) >= LEAST_DOT


def _inner(inputs: int, shape: Shape) -> int:
    """The inputs of a step of shrinking: a power of two that goes into a program's share; 0 if they cannot be shared evenly."""
    share, rest = divmod(inputs, shape.shares)
    return 0 if rest else min(shape.inner, share & -share)


@cache
def _arrivals(device: torch.device, shares: int, beside: bool) -> Tensor:
    """How many programs of each tile have arrived, ever. Of each number of shares its own, as a count must be a multiple of it between launches; and launches `beside` others theirs."""
    return torch.zeros(MOST_TILES, dtype=torch.int64, device=device)


@cache
def _launches_dependently(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) >= HOPPER)


def add(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    tokens: Tensor,
    lora_tokens: Tensor,
    lora_starts: Tensor,
    lora_ids: Tensor,
    *,
    onto: bool = True,
    beside: bool = False,
    shape: Shape | None = None,
) -> None:
    """y += x A B, or y = x A B if not `onto`, for every token with an adapter; the rows of others stay as they are. It begins while the kernel before it on this stream
    ends, or, if `beside`, after it, and is cut for other work beside it.

    `x`: [tokens, inputs]; `y`: [tokens, outputs of all slices side by side]; `a` and `b` by slice: [slots, 1, rank, inputs] and [slots, 1, outputs, rank], contiguous. The rest is how vLLM
    says which token has which adapter (LoRAKernelMeta), int32: `tokens`, sorted by slot; for each slot that is in use, and -1 (none), `lora_ids`, how many tokens (`lora_tokens`), and where
    in `tokens` they begin (`lora_starts`). Sizes must be `supported`. Of launches `beside` others, and of those that are not, one at a time on a device: they share their counts.
    """
    count, inputs = x.shape
    slices, rank, groups = len(a), a[0].shape[-2], lora_ids.numel()
    shape = shape or shape_for(count, beside)
    widths = [each.shape[-2] for each in b]
    tiles = (count + min(groups, count) * (shape.rows - 1)) // shape.rows
    parts = torch.empty(tiles * slices * shape.shares * shape.rows * rank, dtype=torch.float32, device=x.device)
    padding = MOST_SLICES - slices
    for shrinks, expands in HALVES:
        _shrink_expand[(shape.shares, tiles)](
            x,
            y,
            *a,
            *[a[0]] * padding,
            *b,
            *[b[0]] * padding,
            *widths,
            *[0] * padding,
            parts,
            _arrivals(x.device, shape.shares, beside),
            tokens,
            lora_ids,
            lora_tokens,
            lora_starts,
            x.stride(0),
            y.stride(0),
            **constants(count, inputs, widths, rank=rank, groups=groups, shape=shape),
            SHRINKS=shrinks,
            EXPANDS=expands,
            ADD=onto,
            launch_pdl=not beside and _launches_dependently(x.device),
            num_warps=shape.warps,
            num_stages=shape.stages,
        )


def add_rows(y: Tensor, change: Tensor, slots: Tensor) -> None:
    """y += change, both [tokens, outputs], in the rows whose slot is not -1."""
    rows, width = change.shape
    _add_rows[(rows, triton.cdiv(width, ADDED))](y, change, slots, y.stride(0), change.stride(0), width, BLOCK=ADDED)


def constants(tokens: int, inputs: int, widths: Sequence[int], *, rank: int, groups: int, shape: Shape) -> dict[str, int | bool]:
    """What the kernel is compiled for, by parameter: a step of so many tokens, a layer's inputs and its slices' outputs, and the adapters' rank and groups."""
    columns = shape.columns * LEAST_DOT // rank
    return {
        "INPUTS": inputs,
        "SLICES": len(widths),
        "RANK": rank,
        "GROUPS": groups,
        "PADDED": triton.next_power_of_2(groups),
        "ROWS": shape.rows,
        "SHARES": shape.shares,
        "COLUMNS": columns,
        "INNER": _inner(inputs, shape),
        "REDUCE": min(shape.shares, max(1, REDUCED // (shape.rows * rank))),
        "ONE_TOKEN": tokens == 1,
        "ONE_STEP": sum(-(-width // columns) for width in widths) <= shape.shares,
    }
