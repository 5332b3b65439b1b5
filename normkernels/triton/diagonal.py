"""Triton kernels for groups of one channel: moments, sums of products and an affine map of each channel.

A tile has ROWS channels and BLOCK columns of each. Where positions are next to each other in memory it has few channels
and many columns; where channels are, it has enough channels that whole sectors are read. A pass leaves its sums
(parts, C); the kernel that needs the result merges them, in a fixed order. pop_norm's maps do so at their start, each
program for its own channels. That reads some KiB from the second-level cache, and saves a launch, or a ticket that
would have to be zeroed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.layouts import empty_output
from normkernels.triton.arguments import Affine, Matrix, Moments, Products, Statistics, sources_of
from normkernels.triton.configs import Config, configuration
from normkernels.triton.launch import WARPS, Columns, Split, columns, launch, split
from normkernels.triton.support import architecture
from normkernels.triton.tiles import bounds, count_of, load_tile, pointers

CHANNEL_BATCH = 64  # parts that a program merges at a time

# --- reduce ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["columns"])
def partial_channel_moments(
    x, channels, columns, chunk, out, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Compute arguments.Moments of one part of the columns.

    The shift is the mean of the part's first tile, which stays in registers.
    """
    part = tl.program_id(1)
    channel, offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = channel < channels
    start, stop = bounds(part, chunk, columns, WIDE, x.run)

    column = start + offset
    mask = real[:, None] & (column < stop)[None, :]
    tile = load_tile(x, channel, column, mask)
    shift = tl.sum(tile, 1) / tl.minimum(stop - start, BLOCK).to(tl.float32)
    tile = tl.where(mask, tile - shift[:, None], 0.0)
    total, square = tile, tile * tile
    for first in range(start + BLOCK, stop, BLOCK):
        column = first + offset
        mask = real[:, None] & (column < stop)[None, :]
        tile = tl.where(mask, load_tile(x, channel, column, mask) - shift[:, None], 0.0)
        total += tile
        square += tile * tile

    sums = tl.sum(total, 1)
    delta = sums / (stop - start).to(tl.float32)
    slot = part.to(tl.int64) * channels + channel
    tl.store(out.shift + slot, shift, mask=real)
    tl.store(out.delta + slot, delta, mask=real)
    tl.store(out.square + slot, tl.sum(square, 1) - sums * delta, mask=real)


@triton.jit(do_not_specialize=["columns"])
def partial_channel_cross(
    y, x, mean, channels, columns, chunk, out, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Compute arguments.Products of one part of the columns.

    A missing mean counts as zero, and sum x is left out then; without x, only sum y is computed.
    """
    part = tl.program_id(1)
    channel, offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = channel < channels
    RUN: tl.constexpr = y.run if x is None else (x.run if x.run < y.run else y.run)
    start, stop = bounds(part, chunk, columns, WIDE, RUN)
    shift = tl.zeros((ROWS,), tl.float32)
    if mean is not None:
        shift = tl.load(mean + channel, mask=real, other=0.0)

    sum_y = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_x, cross = sum_y, sum_y
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = real[:, None] & (column < stop)[None, :]
        left = load_tile(y, channel, column, mask)
        sum_y += left
        if x is not None:
            right = tl.where(mask, load_tile(x, channel, column, mask) - shift[:, None], 0.0)
            cross += left * right
            if mean is not None:
                sum_x += right

    slot = part.to(tl.int64) * channels + channel
    tl.store(out.sum_y + slot, tl.sum(sum_y, 1), mask=real)
    if x is not None:
        tl.store(out.cross + slot, tl.sum(cross, 1), mask=real)
        if mean is not None:
            tl.store(out.sum_x + slot, tl.sum(sum_x, 1), mask=real)


# --- merge ----------------------------------------------------------------------------------------------------------


@triton.jit
def merged_moments(partial, cut, columns, channels, channel, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Return mean in float32, what its rounding left out (the exact mean is their sum), and variance (Chan's formula).

    All is relative to the first part's shift: its difference to another part's is exact to its own rounding. So float32
    is enough, and float64, which is 64 times slower on GPUs for desktops, is not needed.
    """
    real = channel < channels
    m = columns.to(tl.float32)
    pivot = tl.load(partial.shift + channel, mask=real, other=0.0)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, cut.parts, BATCH):
        part = first + tl.arange(0, BATCH)
        count = count_of(part, cut, columns).to(tl.float32)
        total += count[None, :] * from_pivot(partial, pivot, part, cut.parts, channels, channel)
    offset = tl.sum(total, 1) / m

    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, cut.parts, BATCH):
        part = first + tl.arange(0, BATCH)
        count = count_of(part, cut, columns).to(tl.float32)
        between = from_pivot(partial, pivot, part, cut.parts, channels, channel) - offset[:, None]
        at, mask = slots(part, cut.parts, channels, channel)
        total += tl.load(partial.square + at, mask=mask, other=0.0) + count[None, :] * between * between
    var = tl.sum(total, 1) / m

    mean = pivot + offset
    back = mean - pivot
    return mean, (pivot - (mean - back)) + (offset - back), tl.where(var < 0, 0.0, var)  # constant channels: about 0


@triton.jit
def slots(part, parts, channels, channel):
    """Return where vectors (parts, C) have these parts' entries of these channels, and which of them exist."""
    at = part.to(tl.int64)[None, :] * channels + channel[:, None]
    return at, (channel < channels)[:, None] & (part < parts)[None, :]


@triton.jit
def from_pivot(partial, pivot, part, parts, channels, channel):
    """Return the parts' means minus the pivot; zero beyond the last part."""
    at, mask = slots(part, parts, channels, channel)
    apart = tl.load(partial.shift + at, mask=mask, other=0.0) - pivot[:, None]
    apart += tl.load(partial.delta + at, mask=mask, other=0.0)
    return tl.where(mask, apart, 0.0)


@triton.jit
def merged_sums(sums, parts, channels, channel, ROWS: tl.constexpr, BATCH: tl.constexpr):
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, parts, BATCH):
        at, mask = slots(first + tl.arange(0, BATCH), parts, channels, channel)
        total += tl.load(sums + at, mask=mask, other=0.0)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["columns"])
def finish_channel_moments(partial, cut, columns, channels, out, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Compute arguments.Statistics of all columns from those of the parts."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, remainder, var = merged_moments(partial, cut, columns, channels, channel, ROWS, BATCH)
    real = channel < channels
    tl.store(out.mean + channel, mean, mask=real)
    tl.store(out.remainder + channel, remainder, mask=real)
    tl.store(out.cov + channel, var, mask=real)


@triton.jit
def finish_channel_cross(partial, parts, channels, out, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Add the products of the parts."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = channel < channels
    tl.store(out.sum_y + channel, merged_sums(partial.sum_y, parts, channels, channel, ROWS, BATCH), mask=real)
    tl.store(out.sum_x + channel, merged_sums(partial.sum_x, parts, channels, channel, ROWS, BATCH), mask=real)
    tl.store(out.cross + channel, merged_sums(partial.cross, parts, channels, channel, ROWS, BATCH), mask=real)


# --- map ------------------------------------------------------------------------------------------------------------


@triton.jit
def map_columns(
    x, shift, factor, x2, shift2, factor2, constant, y, channel, channels, columns, chunk,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Set y = factor (x - shift) + factor2 (x2 - shift2) + constant on the program's part of the columns.

    x2 may be None. The vectors have an entry for each of the program's channels.
    """
    offset = tl.arange(0, BLOCK)
    start, stop = bounds(tl.program_id(1), chunk, columns, WIDE, y.run)
    for begin in range(start, stop, BLOCK):
        column = begin + offset
        mask = (channel < channels)[:, None] & (column < stop)[None, :]
        tile = load_tile(x, channel, column, mask)
        mapped = factor[:, None] * (tile - shift[:, None]) + constant[:, None]
        if x2 is not None:
            tile = load_tile(x2, channel, column, mask)
            mapped += factor2[:, None] * (tile - shift2[:, None])
        tl.store(pointers(y, channel, column), mapped.to(y.data.dtype.element_ty), mask=mask)


@triton.jit
def of_channels(values, channel, channels, default: tl.constexpr):
    """Return values[channel] in float32, or the default where there is no vector or no channel."""
    if values is None:
        result = tl.full(channel.shape, default, tl.float32)
    else:
        result = tl.load(values + channel, mask=channel < channels, other=default).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["columns"])
def channel_map(
    x, shift, x2, shift2, matrix, affine, y, channels, columns, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Set y = weight (matrix [x - shift; x2 - shift2]) + bias, as ``mix_kernel``; matrix (C, 1, sources)."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gamma = of_channels(affine.weight, channel, channels, 1.0)
    entries = matrix.data + channel.to(tl.int64) * matrix.group_stride
    factor = gamma * tl.load(entries, mask=channel < channels, other=0.0).to(tl.float32)
    factor2 = factor
    if x2 is not None:
        entries += matrix.column_stride
        factor2 = gamma * tl.load(entries, mask=channel < channels, other=0.0).to(tl.float32)
    map_columns(
        x, of_channels(shift, channel, channels, 0.0), factor,
        x2, of_channels(shift2, channel, channels, 0.0), factor2, of_channels(affine.bias, channel, channels, 0.0),
        y, channel, channels, columns, chunk, BLOCK, WIDE,
    )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------------------------


def prepared(kernel: str, x: Tensor) -> tuple[Columns, Config, int, Split]:
    """Return x as columns, the configuration, the number of blocks of channels, and how the columns are cut."""
    seen = columns(x)
    config = configuration(kernel, 1, seen.layout, x.dtype, architecture(x.device))
    blocks = triton.cdiv(x.shape[1], config.rows)
    return seen, config, blocks, split(seen.total, blocks, config.block, x.device, WARPS // config.warps)


def reduce_channel_moments(x: Tensor) -> tuple[Moments, Split]:
    seen, config, blocks, cut = prepared("moments", x)
    partial = Moments(*x.new_empty((3, cut.parts, x.shape[1]), dtype=torch.float32))
    launch(
        partial_channel_moments, (blocks, cut.parts), seen, x.shape[1], seen.total, cut.chunk, partial,
        ROWS=config.rows, BLOCK=config.block, WIDE=seen.wide, config=config, device=x.device,
    )  # fmt: skip
    return partial, cut


def reduce_channel_cross(y: Tensor, x: Tensor | None, mean: Tensor | None) -> tuple[Products, Split]:
    """Run the pass for sum y (x - mean); without a mean, and without x, some of the vectors are not written."""
    seen, config, blocks, cut = prepared("cross_moments", y if x is None else x)
    left, right = (seen, None) if x is None else (columns(y), seen)
    partial = Products(*y.new_empty((3, cut.parts, y.shape[1]), dtype=torch.float32))
    launch(
        partial_channel_cross, (blocks, cut.parts), left, right, mean, y.shape[1], left.total, cut.chunk, partial,
        ROWS=config.rows, BLOCK=config.block, WIDE=left.wide, config=config, device=y.device,
    )  # fmt: skip
    return partial, cut


def merge_channel_moments(x: Tensor, out: Statistics) -> None:
    partial, cut = reduce_channel_moments(x)
    merge(finish_channel_moments, (partial, cut, x.numel() // x.shape[1]), out.mean, out)


def merge_channel_cross(y: Tensor, x: Tensor, mean: Tensor, out: Products) -> None:
    partial, cut = reduce_channel_cross(y, x, mean)
    merge(finish_channel_cross, (partial, cut.parts), mean, out)


def merge(kernel: triton.JITFunction, partial: tuple[object, ...], vector: Tensor, out: Statistics | Products) -> None:
    """Launch the kernel that merges partial results into ``out``; vector: any (C,)."""
    config = configuration("merge", 1, "", torch.float32, architecture(vector.device))
    launch(
        kernel, (triton.cdiv(len(vector), config.rows),), *partial, len(vector), out,
        ROWS=config.rows, BATCH=CHANNEL_BATCH, config=config, device=vector.device,
    )  # fmt: skip


class Map(NamedTuple):
    """How kernels that end with ``map_columns`` are launched: grid, last arguments, and options."""

    grid: tuple[int, int]
    result: tuple[Columns, int, int, int]
    meta: dict[str, Any]


def mapping(sources: int, result: Tensor) -> Map:
    """Return how to launch a map of one or two sources."""
    out, config, blocks, cut = prepared("mix" if sources == 1 else "stacked_mix", result)
    meta = {"ROWS": config.rows, "BLOCK": config.block, "WIDE": out.wide, "config": config, "device": result.device}
    return Map((blocks, cut.parts), (out, result.shape[1], out.total, cut.chunk), meta)


def map_channels(
    sources: list[tuple[Tensor, Tensor | None]],
    matrix: Tensor,
    bias: Tensor | None,
    like: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return weight (matrix @ [source - shift; ...]) + bias, as ``mix`` for any group size; matrix: (C, 1, sources)."""
    result = empty_output(like)
    given = mapping(len(sources), result)
    launch(
        channel_map, given.grid,
        *sources_of(sources), Matrix(matrix, *matrix.stride()), Affine(weight, bias), *given.result, **given.meta,
    )  # fmt: skip
    return result
