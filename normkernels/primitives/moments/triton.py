"""Triton implementation of the reductions: one pass over the data in parts, then the parts merged in fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.primitives.moments import eager
from normkernels.triton.arguments import Moments, Products, Statistics
from normkernels.triton.configs import Config, configuration, padded, single_channels
from normkernels.triton.diagonal import merge_channel_cross, merge_channel_moments
from normkernels.triton.launch import Columns, Split, columns, launch, split
from normkernels.triton.support import architecture, check_supported
from normkernels.triton.tiles import bounds, count_of, load_tile

MATRIX_BATCH = 16  # parts that a program merges at a time


@triton.jit(do_not_specialize=["columns"])
def partial_moments(
    x, columns, chunk, out,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute arguments.Moments of one part of the columns.

    The shift is the mean of the part's first tile. gram = sum (x - mean)(x - mean)^T.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    row, offset = tl.arange(0, D), tl.arange(0, BLOCK)
    channel = group * d + row
    start, stop = bounds(part, chunk, columns, WIDE, x.run)
    real = (row < d)[:, None]

    column = start + offset
    tile = load_tile(x, channel, column, real & (column < stop)[None, :])
    shift = tl.sum(tile, 1) / tl.minimum(stop - start, BLOCK).to(tl.float32)

    total = tl.zeros((D,), tl.float32)
    gram = tl.zeros((D, D), tl.float32)
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = real & (column < stop)[None, :]
        tile = tl.where(mask, load_tile(x, channel, column, mask) - shift[:, None], 0.0)
        total += tl.sum(tile, 1)
        gram = tl.dot(tile, tl.trans(tile), gram, input_precision=PRECISION)

    delta = total / (stop - start).to(tl.float32)
    gram -= total[:, None] * delta[None, :]
    slot = group.to(tl.int64) * tl.num_programs(1) + part
    tl.store(out.shift + slot * D + row, shift)
    tl.store(out.delta + slot * D + row, delta)
    # Split products are symmetric only up to rounding.
    tl.store(out.square + slot * D * D + row[:, None] * D + row[None, :], 0.5 * (gram + tl.trans(gram)))
    if part == 0:
        tl.store(out.ticket + group, 0)


@triton.jit(do_not_specialize=["columns"])
def partial_cross(
    y, x, mean, columns, chunk, out,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute arguments.Products of one part of the columns."""
    group, part = tl.program_id(0), tl.program_id(1)
    row, offset = tl.arange(0, D), tl.arange(0, BLOCK)
    channel = group * d + row
    start, stop = bounds(part, chunk, columns, WIDE, x.run if x.run < y.run else y.run)
    real = (row < d)[:, None]
    shift = tl.load(mean + channel, mask=row < d, other=0.0)

    sum_y, sum_x = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    cross = tl.zeros((D, D), tl.float32)
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = real & (column < stop)[None, :]
        left = load_tile(y, channel, column, mask)
        right = tl.where(mask, load_tile(x, channel, column, mask) - shift[:, None], 0.0)
        sum_y += tl.sum(left, 1)
        sum_x += tl.sum(right, 1)
        cross = tl.dot(left, tl.trans(right), cross, input_precision=PRECISION)

    slot = group.to(tl.int64) * tl.num_programs(1) + part
    tl.store(out.sum_y + slot * D + row, sum_y)
    tl.store(out.sum_x + slot * D + row, sum_x)
    tl.store(out.cross + slot * D * D + row[:, None] * D + row[None, :], cross)
    if part == 0:
        tl.store(out.ticket + group, 0)


@triton.jit
def merged_sum(partial, group, parts, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return the sum over the parts, in float64: entries ``row`` of vectors (G, parts, D)."""
    total = tl.zeros(row.shape, tl.float64)
    for start in range(0, parts, BATCH):
        part = start + tl.arange(0, BATCH)
        at = (group.to(tl.int64) * parts + part)[:, None] * D + row[None, :]
        total += tl.sum(tl.load(partial + at, mask=(part < parts)[:, None], other=0.0).to(tl.float64), 0)
    return total


@triton.jit
def merged_mean(partial, group, cut, columns, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return the average of the parts' means shift + delta, weighted by their counts, in float64."""
    total = tl.zeros(row.shape, tl.float64)
    for start in range(0, cut.parts, BATCH):
        part = start + tl.arange(0, BATCH)
        at = (group.to(tl.int64) * cut.parts + part)[:, None] * D + row[None, :]
        mask = (part < cut.parts)[:, None]
        mean = tl.load(partial.shift + at, mask=mask, other=0.0).to(tl.float64)
        mean += tl.load(partial.delta + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(mean * count_of(part, cut, columns).to(tl.float64)[:, None], 0)
    return total / columns.to(tl.float64)


@triton.jit
def merged_covariance(partial, group, cut, columns, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return rows ``row`` of the covariance (Chan's formula), and the mean of all D channels in float64.

    m Sigma = sum over the parts of square + count (mean of the part - mean)(mean of the part - mean)^T.
    """
    every = tl.arange(0, D)
    mean = merged_mean(partial, group, cut, columns, every, D, BATCH)
    mean_of_row = merged_mean(partial, group, cut, columns, row, D, BATCH)
    total = tl.zeros((row.shape[0], D), tl.float32)
    for start in range(0, cut.parts, BATCH):
        part = start + tl.arange(0, BATCH)
        mask = (part < cut.parts)[:, None]
        slot = group.to(tl.int64) * cut.parts + part
        left = deviation(partial, slot[:, None] * D + row[None, :], mask, mean_of_row)
        right = deviation(partial, slot[:, None] * D + every[None, :], mask, mean)
        at = slot[:, None, None] * (D * D) + row[None, :, None] * D + every[None, None, :]
        within = tl.load(partial.square + at, mask=mask[:, :, None], other=0.0)
        count = count_of(part, cut, columns).to(tl.float32)
        between = count[:, None, None] * (left[:, :, None] * right[:, None, :])  # symmetric bit by bit
        total += tl.sum(within + between, 0)
    return total / columns.to(tl.float32), mean


@triton.jit
def deviation(partial, at, mask, mean):
    """Return the parts' means minus the mean; zero beyond the last part."""
    shift = tl.load(partial.shift + at, mask=mask, other=0.0).to(tl.float64)
    delta = tl.load(partial.delta + at, mask=mask, other=0.0).to(tl.float64)
    return tl.where(mask, shift - mean[None, :] + delta, 0.0).to(tl.float32)


@triton.jit
def merged_matrix(cross, group, parts, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return rows ``row`` of the sum over the parts."""
    every = tl.arange(0, D)
    total = tl.zeros((row.shape[0], D), tl.float32)
    for start in range(0, parts, BATCH):
        part = start + tl.arange(0, BATCH)
        slot = group.to(tl.int64) * parts + part
        at = slot[:, None, None] * (D * D) + row[None, :, None] * D + every[None, None, :]
        total += tl.sum(tl.load(cross + at, mask=(part < parts)[:, None, None], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["columns"])
def finish_moments(
    partial, cut, columns, out, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr
):
    """Compute arguments.Statistics of all columns from those of the parts."""
    group, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, D)
    cov, mean = merged_covariance(partial, group, cut, columns, row, D, BATCH)
    at = group.to(tl.int64) * d * d + row[:, None] * d + every[None, :]
    tl.store(out.cov + at, cov, mask=(row < d)[:, None] & (every < d)[None, :])
    if tl.program_id(1) == 0:
        rounded = mean.to(tl.float32)
        tl.store(out.mean + group * d + every, rounded, mask=every < d)
        tl.store(out.remainder + group * d + every, (mean - rounded.to(tl.float64)).to(tl.float32), mask=every < d)


@triton.jit
def finish_cross(partial, parts, out, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Add the products of the parts."""
    group, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, D)
    total = merged_matrix(partial.cross, group, parts, row, D, BATCH)
    at = group.to(tl.int64) * d * d + row[:, None] * d + every[None, :]
    tl.store(out.cross + at, total, mask=(row < d)[:, None] & (every < d)[None, :])
    if tl.program_id(1) == 0:
        left = merged_sum(partial.sum_y, group, parts, every, D, BATCH)
        right = merged_sum(partial.sum_x, group, parts, every, D, BATCH)
        tl.store(out.sum_y + group * d + every, left.to(tl.float32), mask=every < d)
        tl.store(out.sum_x + group * d + every, right.to(tl.float32), mask=every < d)


# --- launchers ------------------------------------------------------------------------------------------------------


def prepared(kernel: str, seen: Columns, group_size: int) -> tuple[Config, Split, tuple[Tensor, ...]]:
    """Return the configuration, how the columns are cut, and memory for Moments or Products of each group and part."""
    x, size = seen.data, padded(group_size)
    groups = x.shape[1] // group_size
    config = configuration(kernel, size, seen.layout, x.dtype, architecture(x.device))
    cut = split(seen.total, groups, config.block, x.device)
    shape = (groups, cut.parts, size)
    first, second, matrix = (x.new_empty(each, dtype=torch.float32) for each in (shape, shape, (*shape, size)))
    return config, cut, (first, second, matrix, x.new_empty(groups, dtype=torch.int32))


def reduce_moments(x: Tensor, group_size: int) -> tuple[Moments, Split]:
    seen = columns(x)
    config, cut, memory = prepared("moments", seen, group_size)
    partial = Moments(*memory)
    launch(
        partial_moments, (x.shape[1] // group_size, cut.parts), seen, seen.total, cut.chunk, partial,
        d=group_size, D=partial.shift.shape[2], BLOCK=config.block, WIDE=seen.wide, PRECISION=config.precision,
        config=config, device=x.device,
    )  # fmt: skip
    return partial, cut


def reduce_cross(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Products, Split]:
    seen = columns(x)
    config, cut, memory = prepared("cross_moments", seen, group_size)
    partial = Products(*memory)
    launch(
        partial_cross, (x.shape[1] // group_size, cut.parts), columns(y), seen, mean, seen.total, cut.chunk, partial,
        d=group_size, D=partial.sum_y.shape[2], BLOCK=config.block, WIDE=seen.wide, PRECISION=config.precision,
        config=config, device=x.device,
    )  # fmt: skip
    return partial, cut


def summed_products(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum y (x - mean)^T (G, d, d), sum y (C,) and sum (x - mean) (C,), in float32."""
    cross = mean.new_empty((len(mean) // group_size, group_size, group_size))
    total = Products(torch.empty_like(mean), torch.empty_like(mean), cross)
    if single_channels(group_size):
        merge_channel_cross(y, x, mean, total)
    else:
        partial, cut = reduce_cross(y, x, mean, group_size)
        merge(finish_cross, partial.sum_y, (partial, cut.parts, total), group_size)
    return total.cross, total.sum_y, total.sum_x


def merge(kernel: triton.JITFunction, vector: Tensor, arguments: tuple[object, ...], group_size: int) -> None:
    """Launch the kernel that merges partial results, among them this vector (G, parts, D)."""
    groups, _, size = vector.shape
    config = configuration("merge", size, "", torch.float32, architecture(vector.device))
    launch(
        kernel, (groups, size // config.block), *arguments,
        d=group_size, D=size, ROWS=config.block, BATCH=MATRIX_BATCH, config=config, device=vector.device,
    )  # fmt: skip


def moments(x: Tensor, group_size: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_supported(x, group_size=group_size)
    if exact or x.numel() == 0:  # tensor cores do not add as exactly as an eigendecomposition needs
        return full_precision(eager.moments)(x, group_size, exact)
    channels = x.shape[1]
    shapes = ((channels,), (channels,), (channels // group_size, group_size, group_size))
    out = Statistics(*(x.new_empty(shape, dtype=torch.float32) for shape in shapes))
    if single_channels(group_size):
        merge_channel_moments(x, out)
    else:
        partial, cut = reduce_moments(x, group_size)
        merge(finish_moments, partial.shift, (partial, cut, x.numel() // channels, out), group_size)
    return out


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    check_supported(x, group_size=group_size)
    if x.numel() == 0:
        return eager.cross_moments(y, x, mean, group_size)
    cross, sum_y, _ = summed_products(y, x, mean.contiguous(), group_size)
    return cross, sum_y
