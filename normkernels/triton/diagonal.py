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
from normkernels.triton.configs import Config, configuration
from normkernels.triton.launch import WARPS, Split, columns, launch, split
from normkernels.triton.support import architecture
from normkernels.triton.tiles import bounds, count_of, load_tile, pointers, positions_of

BATCH = 64  # parts that a program merges at a time

# --- reduce ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["columns"])
def partial_channel_moments(
    x, sample_stride, channel_stride, position_stride, positions, channels, columns, chunk,
    shift_out, delta_out, square_out,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the mean of one part of the columns, in two numbers shift + delta, and the sum of squares about it.

    The shift is the mean of the part's first tile, which stays in registers.
    """
    part = tl.program_id(1)
    channel, offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = channel < channels
    start, stop = bounds(part, chunk, columns, WIDE, RUN)

    column = start + offset
    mask = real[:, None] & (column < stop)[None, :]
    at = positions_of(column, positions, sample_stride, position_stride, RUN)
    tile = load_tile(x, channel, channel_stride, at, mask, RUN)
    shift = tl.sum(tile, 1) / tl.minimum(stop - start, BLOCK).to(tl.float32)
    tile = tl.where(mask, tile - shift[:, None], 0.0)
    total, square = tile, tile * tile
    for first in range(start + BLOCK, stop, BLOCK):
        column = first + offset
        mask = real[:, None] & (column < stop)[None, :]
        at = positions_of(column, positions, sample_stride, position_stride, RUN)
        tile = tl.where(mask, load_tile(x, channel, channel_stride, at, mask, RUN) - shift[:, None], 0.0)
        total += tile
        square += tile * tile

    sums = tl.sum(total, 1)
    delta = sums / (stop - start).to(tl.float32)
    slot = part.to(tl.int64) * channels + channel
    tl.store(shift_out + slot, shift, mask=real)
    tl.store(delta_out + slot, delta, mask=real)
    tl.store(square_out + slot, tl.sum(square, 1) - sums * delta, mask=real)


@triton.jit(do_not_specialize=["columns"])
def partial_channel_cross(
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions,
    x, sample_stride, channel_stride, position_stride, positions, mean, channels, columns, chunk,
    sum_y_out, sum_x_out, cross_out,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, Y_RUN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute sum y, sum (x - mean) and sum y (x - mean) of one part of the columns.

    A missing mean counts as zero, and sum x is left out then; without x, only sum y is computed.
    """
    part = tl.program_id(1)
    channel, offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = channel < channels
    start, stop = bounds(part, chunk, columns, WIDE, RUN if RUN < Y_RUN else Y_RUN)
    shift = tl.zeros((ROWS,), tl.float32)
    if mean is not None:
        shift = tl.load(mean + channel, mask=real, other=0.0)

    sum_y = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_x, cross = sum_y, sum_y
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = real[:, None] & (column < stop)[None, :]
        at = positions_of(column, y_positions, y_sample_stride, y_position_stride, Y_RUN)
        left = load_tile(y, channel, y_channel_stride, at, mask, Y_RUN)
        sum_y += left
        if x is not None:
            at = positions_of(column, positions, sample_stride, position_stride, RUN)
            right = tl.where(mask, load_tile(x, channel, channel_stride, at, mask, RUN) - shift[:, None], 0.0)
            cross += left * right
            if mean is not None:
                sum_x += right

    slot = part.to(tl.int64) * channels + channel
    tl.store(sum_y_out + slot, tl.sum(sum_y, 1), mask=real)
    if x is not None:
        tl.store(cross_out + slot, tl.sum(cross, 1), mask=real)
        if mean is not None:
            tl.store(sum_x_out + slot, tl.sum(sum_x, 1), mask=real)


# --- merge ----------------------------------------------------------------------------------------------------------


@triton.jit
def merged_moments(
    shift, delta, square, parts, chunk, columns, channels, channel, ROWS: tl.constexpr, BATCH: tl.constexpr
):
    """Return mean in float32, what its rounding left out (the exact mean is their sum), and variance (Chan's formula).

    All is relative to the first part's shift: its difference to another part's is exact to its own rounding. So float32
    is enough, and float64, which is 64 times slower on GPUs for desktops, is not needed.
    """
    real = channel < channels
    m = columns.to(tl.float32)
    pivot = tl.load(shift + channel, mask=real, other=0.0)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, parts, BATCH):
        part = first + tl.arange(0, BATCH)
        count = count_of(part, parts, chunk, columns).to(tl.float32)
        total += count[None, :] * from_pivot(shift, delta, pivot, part, parts, channels, channel)
    offset = tl.sum(total, 1) / m

    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, parts, BATCH):
        part = first + tl.arange(0, BATCH)
        count = count_of(part, parts, chunk, columns).to(tl.float32)
        between = from_pivot(shift, delta, pivot, part, parts, channels, channel) - offset[:, None]
        at, mask = slots(part, parts, channels, channel)
        total += tl.load(square + at, mask=mask, other=0.0) + count[None, :] * between * between
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
def from_pivot(shift, delta, pivot, part, parts, channels, channel):
    """Return the parts' means minus the pivot; zero beyond the last part."""
    at, mask = slots(part, parts, channels, channel)
    apart = tl.load(shift + at, mask=mask, other=0.0) - pivot[:, None] + tl.load(delta + at, mask=mask, other=0.0)
    return tl.where(mask, apart, 0.0)


@triton.jit
def merged_sums(partial, parts, channels, channel, ROWS: tl.constexpr, BATCH: tl.constexpr):
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for first in range(0, parts, BATCH):
        at, mask = slots(first + tl.arange(0, BATCH), parts, channels, channel)
        total += tl.load(partial + at, mask=mask, other=0.0)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["columns"])
def finish_channel_moments(
    shift, delta, square, parts, chunk, columns, channels, mean_out, remainder_out, var_out,
    ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, remainder, var = merged_moments(
        shift, delta, square, parts, chunk, columns, channels, channel, ROWS, BATCH
    )  # fmt: skip
    real = channel < channels
    tl.store(mean_out + channel, mean, mask=real)
    tl.store(remainder_out + channel, remainder, mask=real)
    tl.store(var_out + channel, var, mask=real)


@triton.jit
def finish_channel_cross(
    sum_y, sum_x, cross, parts, channels, sum_y_out, sum_x_out, cross_out, ROWS: tl.constexpr, BATCH: tl.constexpr
):
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = channel < channels
    tl.store(sum_y_out + channel, merged_sums(sum_y, parts, channels, channel, ROWS, BATCH), mask=real)
    tl.store(sum_x_out + channel, merged_sums(sum_x, parts, channels, channel, ROWS, BATCH), mask=real)
    tl.store(cross_out + channel, merged_sums(cross, parts, channels, channel, ROWS, BATCH), mask=real)


# --- map ------------------------------------------------------------------------------------------------------------


@triton.jit
def map_columns(
    x, sample_stride, channel_stride, position_stride, positions, shift, factor,
    x2, sample_stride2, channel_stride2, position_stride2, positions2, shift2, factor2, constant,
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, channel, channels, columns, chunk,
    BLOCK: tl.constexpr, RUN: tl.constexpr, RUN2: tl.constexpr, Y_RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Set y = factor (x - shift) + factor2 (x2 - shift2) + constant on the program's part of the columns.

    x2 may be None. The vectors have an entry for each of the program's channels.
    """
    offset = tl.arange(0, BLOCK)
    start, stop = bounds(tl.program_id(1), chunk, columns, WIDE, Y_RUN)
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = (channel < channels)[:, None] & (column < stop)[None, :]
        at = positions_of(column, positions, sample_stride, position_stride, RUN)
        tile = load_tile(x, channel, channel_stride, at, mask, RUN)
        mapped = factor[:, None] * (tile - shift[:, None]) + constant[:, None]
        if x2 is not None:
            at = positions_of(column, positions2, sample_stride2, position_stride2, RUN2)
            tile = load_tile(x2, channel, channel_stride2, at, mask, RUN2)
            mapped += factor2[:, None] * (tile - shift2[:, None])
        at = positions_of(column, y_positions, y_sample_stride, y_position_stride, Y_RUN)
        target = pointers(y, channel, y_channel_stride, at, Y_RUN)
        tl.store(target, mapped.to(y.dtype.element_ty), mask=mask)


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
    x, sample_stride, channel_stride, position_stride, positions, shift,
    x2, sample_stride2, channel_stride2, position_stride2, positions2, shift2,
    factors, factors_stride, second, weight, bias,
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, channels, columns, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUN2: tl.constexpr, Y_RUN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Set y = weight (factor (x - shift) + factor2 (x2 - shift2)) + bias.

    shift, x2 and shift2, weight, and bias may be None; second: where the second factors begin.
    """
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gamma = of_channels(weight, channel, channels, 1.0)
    entries = factors + channel.to(tl.int64) * factors_stride
    factor = gamma * tl.load(entries, mask=channel < channels, other=0.0).to(tl.float32)
    factor2 = factor
    if x2 is not None:
        factor2 = gamma * tl.load(entries + second, mask=channel < channels, other=0.0).to(tl.float32)
    map_columns(
        x, sample_stride, channel_stride, position_stride, positions,
        of_channels(shift, channel, channels, 0.0), factor,
        x2, sample_stride2, channel_stride2, position_stride2, positions2,
        of_channels(shift2, channel, channels, 0.0), factor2, of_channels(bias, channel, channels, 0.0),
        y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, channel, channels, columns, chunk,
        BLOCK, RUN, RUN2, Y_RUN, WIDE,
    )  # fmt: skip


# --- launchers ------------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """The results of a pass: three vectors (parts, C), and how it was cut."""

    vectors: Tensor
    cut: Split
    columns: int


def prepared(kernel: str, x: Tensor) -> tuple[Config, int, Split]:
    """Return the configuration, the number of blocks of channels, and how the columns are cut."""
    seen = columns(x)
    config = configuration(kernel, 1, seen.layout, x.dtype, architecture(x.device))
    blocks = triton.cdiv(x.shape[1], config.rows)
    return config, blocks, split(seen.total, blocks, config.block, x.device, WARPS // config.warps)


def reduce_moments(x: Tensor) -> Partials:
    seen = columns(x)
    config, blocks, cut = prepared("moments", x)
    vectors = x.new_empty((3, cut.parts, x.shape[1]), dtype=torch.float32)
    launch(
        partial_channel_moments, (blocks, cut.parts), *seen.arguments, x.shape[1], seen.total, cut.chunk, *vectors,
        ROWS=config.rows, BLOCK=config.block, RUN=seen.run, WIDE=seen.wide, config=config, device=x.device,
    )  # fmt: skip
    return Partials(vectors, cut, seen.total)


def reduce_cross(y: Tensor, x: Tensor | None, mean: Tensor | None) -> Partials:
    """Run the pass for sum y (x - mean); without a mean, and without x, some of the vectors are not written."""
    left = columns(y)
    right = left if x is None else columns(x)
    config, blocks, cut = prepared("cross_moments", y if x is None else x)
    vectors = y.new_empty((3, cut.parts, y.shape[1]), dtype=torch.float32)
    launch(
        partial_channel_cross, (blocks, cut.parts), *left.arguments,
        *((None, 0, 0, 0, 1) if x is None else right.arguments), mean, y.shape[1], left.total, cut.chunk, *vectors,
        ROWS=config.rows, BLOCK=config.block, Y_RUN=left.run, RUN=right.run, WIDE=left.wide,
        config=config, device=y.device,
    )  # fmt: skip
    return Partials(vectors, cut, left.total)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), what rounding the mean left out (C,), and variance (C, 1, 1)."""
    partials, channels = reduce_moments(x), x.shape[1]
    mean, remainder = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    var = x.new_empty((channels, 1, 1), dtype=torch.float32)
    config = configuration("merge", 1, "", torch.float32, architecture(x.device))
    launch(
        finish_channel_moments, (triton.cdiv(channels, config.rows),),
        *partials.vectors, *partials.cut, partials.columns, channels, mean, remainder, var,
        ROWS=config.rows, BATCH=BATCH, config=config, device=x.device,
    )  # fmt: skip
    return mean, remainder, var


def merge_channel_cross(y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum y (x - mean) (C, 1, 1), sum y (C,) and sum (x - mean) (C,), in float32."""
    partials, channels = reduce_cross(y, x, mean), x.shape[1]
    sum_y, sum_x, cross = torch.empty_like(mean), torch.empty_like(mean), mean.new_empty((channels, 1, 1))
    config = configuration("merge", 1, "", torch.float32, architecture(x.device))
    launch(
        finish_channel_cross, (triton.cdiv(channels, config.rows),),
        *partials.vectors, partials.cut.parts, channels, sum_y, sum_x, cross,
        ROWS=config.rows, BATCH=BATCH, config=config, device=x.device,
    )  # fmt: skip
    return cross, sum_y, sum_x


class Map(NamedTuple):
    """The arguments of every kernel that ends with ``map_columns``: sources, the result, its columns; grid and rest."""

    sources: list[tuple[Any, ...]]
    result: tuple[Any, ...]
    grid: tuple[int, int]
    meta: dict[str, Any]


def mapping(sources: list[Tensor], result: Tensor) -> Map:
    """Return the arguments for a map of one or two sources; those of a second one that is not there are None."""
    seen, out = [columns(source) for source in sources], columns(result)
    config, blocks, cut = prepared("mix" if len(sources) == 1 else "stacked_mix", result)
    absent: list[tuple[Any, ...]] = [(None, 0, 0, 0, 1)]
    meta = {
        "ROWS": config.rows, "BLOCK": config.block, "RUN": seen[0].run, "RUN2": seen[-1].run, "Y_RUN": out.run,
        "WIDE": out.wide, "config": config, "device": result.device,
    }  # fmt: skip
    return Map(
        [source.arguments for source in seen] + absent[: 2 - len(seen)],
        (*out.arguments, result.shape[1], out.total, cut.chunk),
        (blocks, cut.parts),
        meta,
    )


def map_channels(
    sources: list[tuple[Tensor, Tensor | None]],
    matrix: Tensor,
    bias: Tensor | None,
    like: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return weight (matrix @ [source - shift; ...]) + bias, as ``mix`` for any group size; matrix: (C, 1, sources)."""
    result = empty_output(like)
    given = mapping([source for source, _ in sources], result)
    (_, first_shift), (_, second_shift) = [*sources, (None, None)][:2]
    launch(
        channel_map, given.grid, *given.sources[0], first_shift, *given.sources[1], second_shift,
        matrix, matrix.stride(0), matrix.stride(2), weight, bias, *given.result, **given.meta,
    )  # fmt: skip
    return result
