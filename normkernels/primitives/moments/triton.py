"""Triton implementation of the reductions: one pass over the data in parts, then the parts merged in fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.primitives.moments import eager
from normkernels.triton.configs import configuration, padded
from normkernels.triton.diagonal import channel_moments, merge_channel_cross
from normkernels.triton.launch import Split, columns, launch, split
from normkernels.triton.support import architecture, check_supported
from normkernels.triton.tiles import bounds, count_of, load_tile, positions_of

BATCH = 16  # parts that a program merges at a time


@triton.jit(do_not_specialize=["columns"])
def partial_moments(
    x, sample_stride, channel_stride, position_stride, positions, columns, chunk,
    shift_out, delta_out, gram_out, ticket,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the mean of one part of the columns, in two numbers shift + delta, and the sum of squares about it.

    The shift is the mean of the part's first tile. gram = sum (x - mean)(x - mean)^T.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    row, offset = tl.arange(0, D), tl.arange(0, BLOCK)
    channel = group * d + row
    start, stop = bounds(part, chunk, columns, WIDE, RUN)
    real = (row < d)[:, None]

    column = start + offset
    at = positions_of(column, positions, sample_stride, position_stride, RUN)
    tile = load_tile(x, channel, channel_stride, at, real & (column < stop)[None, :], RUN)
    shift = tl.sum(tile, 1) / tl.minimum(stop - start, BLOCK).to(tl.float32)

    total = tl.zeros((D,), tl.float32)
    gram = tl.zeros((D, D), tl.float32)
    for first in range(start, stop, BLOCK):
        column = first + offset
        at = positions_of(column, positions, sample_stride, position_stride, RUN)
        mask = real & (column < stop)[None, :]
        tile = tl.where(mask, load_tile(x, channel, channel_stride, at, mask, RUN) - shift[:, None], 0.0)
        total += tl.sum(tile, 1)
        gram = tl.dot(tile, tl.trans(tile), gram, input_precision=PRECISION)

    delta = total / (stop - start).to(tl.float32)
    gram -= total[:, None] * delta[None, :]
    slot = group.to(tl.int64) * tl.num_programs(1) + part
    tl.store(shift_out + slot * D + row, shift)
    tl.store(delta_out + slot * D + row, delta)
    # Split products are symmetric only up to rounding.
    tl.store(gram_out + slot * D * D + row[:, None] * D + row[None, :], 0.5 * (gram + tl.trans(gram)))
    if part == 0:
        tl.store(ticket + group, 0)


@triton.jit(do_not_specialize=["columns"])
def partial_cross(
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions,
    x, sample_stride, channel_stride, position_stride, positions, mean, columns, chunk,
    sum_y_out, sum_x_out, cross_out, ticket,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, Y_RUN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute sum y (x - mean)^T, sum y and sum (x - mean) of one part of the columns."""
    group, part = tl.program_id(0), tl.program_id(1)
    row, offset = tl.arange(0, D), tl.arange(0, BLOCK)
    channel = group * d + row
    start, stop = bounds(part, chunk, columns, WIDE, RUN if RUN < Y_RUN else Y_RUN)
    real = (row < d)[:, None]
    shift = tl.load(mean + channel, mask=row < d, other=0.0)

    sum_y, sum_x = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    cross = tl.zeros((D, D), tl.float32)
    for first in range(start, stop, BLOCK):
        column = first + offset
        mask = real & (column < stop)[None, :]
        y_at = positions_of(column, y_positions, y_sample_stride, y_position_stride, Y_RUN)
        left = load_tile(y, channel, y_channel_stride, y_at, mask, Y_RUN)
        at = positions_of(column, positions, sample_stride, position_stride, RUN)
        right = tl.where(mask, load_tile(x, channel, channel_stride, at, mask, RUN) - shift[:, None], 0.0)
        sum_y += tl.sum(left, 1)
        sum_x += tl.sum(right, 1)
        cross = tl.dot(left, tl.trans(right), cross, input_precision=PRECISION)

    slot = group.to(tl.int64) * tl.num_programs(1) + part
    tl.store(sum_y_out + slot * D + row, sum_y)
    tl.store(sum_x_out + slot * D + row, sum_x)
    tl.store(cross_out + slot * D * D + row[:, None] * D + row[None, :], cross)
    if part == 0:
        tl.store(ticket + group, 0)


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
def merged_mean(shift, delta, group, parts, chunk, columns, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return the average of the parts' means shift + delta, weighted by their counts, in float64."""
    total = tl.zeros(row.shape, tl.float64)
    for start in range(0, parts, BATCH):
        part = start + tl.arange(0, BATCH)
        at = (group.to(tl.int64) * parts + part)[:, None] * D + row[None, :]
        mask = (part < parts)[:, None]
        mean = tl.load(shift + at, mask=mask, other=0.0).to(tl.float64)
        mean += tl.load(delta + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(mean * count_of(part, parts, chunk, columns).to(tl.float64)[:, None], 0)
    return total / columns.to(tl.float64)


@triton.jit
def merged_covariance(shift, delta, gram, group, parts, chunk, columns, row, D: tl.constexpr, BATCH: tl.constexpr):
    """Return rows ``row`` of the covariance (Chan's formula), and the mean of all D channels in float64.

    m Sigma = sum over the parts of gram + count (mean of the part - mean)(mean of the part - mean)^T.
    """
    every = tl.arange(0, D)
    mean = merged_mean(shift, delta, group, parts, chunk, columns, every, D, BATCH)
    mean_of_row = merged_mean(shift, delta, group, parts, chunk, columns, row, D, BATCH)
    total = tl.zeros((row.shape[0], D), tl.float32)
    for start in range(0, parts, BATCH):
        part = start + tl.arange(0, BATCH)
        mask = (part < parts)[:, None]
        slot = group.to(tl.int64) * parts + part
        left = deviation(shift, delta, slot[:, None] * D + row[None, :], mask, mean_of_row)
        right = deviation(shift, delta, slot[:, None] * D + every[None, :], mask, mean)
        at = slot[:, None, None] * (D * D) + row[None, :, None] * D + every[None, None, :]
        within = tl.load(gram + at, mask=mask[:, :, None], other=0.0)
        count = count_of(part, parts, chunk, columns).to(tl.float32)
        between = count[:, None, None] * (left[:, :, None] * right[:, None, :])  # symmetric bit by bit
        total += tl.sum(within + between, 0)
    return total / columns.to(tl.float32), mean


@triton.jit
def deviation(shift, delta, at, mask, mean):
    """Return the parts' means minus the mean; zero beyond the last part."""
    shift = tl.load(shift + at, mask=mask, other=0.0).to(tl.float64)
    delta = tl.load(delta + at, mask=mask, other=0.0).to(tl.float64)
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
    shift, delta, gram, parts, chunk, columns, mean_out, remainder_out, cov_out,
    d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Compute the mean, what rounding the mean left out, and the covariance."""
    group, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, D)
    cov, mean = merged_covariance(shift, delta, gram, group, parts, chunk, columns, row, D, BATCH)
    at = group.to(tl.int64) * d * d + row[:, None] * d + every[None, :]
    tl.store(cov_out + at, cov, mask=(row < d)[:, None] & (every < d)[None, :])
    if tl.program_id(1) == 0:
        rounded = mean.to(tl.float32)
        tl.store(mean_out + group * d + every, rounded, mask=every < d)
        tl.store(remainder_out + group * d + every, (mean - rounded.to(tl.float64)).to(tl.float32), mask=every < d)


@triton.jit
def finish_cross(
    sum_y, sum_x, cross, parts, sum_y_out, sum_x_out, cross_out,
    d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    every = tl.arange(0, D)
    total = merged_matrix(cross, group, parts, row, D, BATCH)
    at = group.to(tl.int64) * d * d + row[:, None] * d + every[None, :]
    tl.store(cross_out + at, total, mask=(row < d)[:, None] & (every < d)[None, :])
    if tl.program_id(1) == 0:
        left = merged_sum(sum_y, group, parts, every, D, BATCH)
        right = merged_sum(sum_x, group, parts, every, D, BATCH)
        tl.store(sum_y_out + group * d + every, left.to(tl.float32), mask=every < d)
        tl.store(sum_x_out + group * d + every, right.to(tl.float32), mask=every < d)


# --- launchers ------------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """The first pass's results for each group and part: two vectors (G, parts, D) and a matrix (G, parts, D, D).

    ticket (G,) is zero: it counts the programs of a kernel that finish with a group (see iter_norm/triton.py).
    """

    vectors: tuple[Tensor, Tensor]
    matrix: Tensor
    ticket: Tensor
    cut: Split
    columns: int


def allocate(x: Tensor, groups: int, size: int, cut: Split, count: int) -> Partials:
    shape = (groups, cut.parts, size)
    vectors = (x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32))
    matrix = x.new_empty((*shape, size), dtype=torch.float32)
    return Partials(vectors, matrix, x.new_empty(groups, dtype=torch.int32), cut, count)


def reduce_moments(x: Tensor, group_size: int) -> Partials:
    seen, size = columns(x), padded(group_size)
    config = configuration("moments", size, seen.layout, x.dtype, architecture(x.device))
    groups = x.shape[1] // group_size
    cut = split(seen.total, groups, config.block, x.device)
    partials = allocate(x, groups, size, cut, seen.total)
    launch(
        partial_moments, (groups, cut.parts),
        *seen.arguments, seen.total, cut.chunk, *partials.vectors, partials.matrix, partials.ticket,
        d=group_size, D=size, BLOCK=config.block, RUN=seen.run, WIDE=seen.wide, PRECISION=config.precision,
        config=config, device=x.device,
    )  # fmt: skip
    return partials


def reduce_cross(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> Partials:
    left, seen, size = columns(y), columns(x), padded(group_size)
    config = configuration("cross_moments", size, seen.layout, x.dtype, architecture(x.device))
    groups = x.shape[1] // group_size
    cut = split(seen.total, groups, config.block, x.device)
    partials = allocate(x, groups, size, cut, seen.total)
    launch(
        partial_cross, (groups, cut.parts),
        *left.arguments, *seen.arguments, mean, seen.total, cut.chunk,
        *partials.vectors, partials.matrix, partials.ticket,
        d=group_size, D=size, BLOCK=config.block, Y_RUN=left.run, RUN=seen.run, WIDE=seen.wide,
        PRECISION=config.precision, config=config, device=x.device,
    )  # fmt: skip
    return partials


def summed_products(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum y (x - mean)^T (G, d, d), sum y (C,) and sum (x - mean) (C,), in float32."""
    if group_size == 1:
        return merge_channel_cross(y, x, mean)
    partials = reduce_cross(y, x, mean, group_size)
    groups, _, size = partials.vectors[0].shape
    sum_y, sum_x = torch.empty_like(mean), torch.empty_like(mean)
    cross = mean.new_empty((groups, group_size, group_size))
    config = configuration("merge", size, "", torch.float32, architecture(x.device))
    launch(
        finish_cross, (groups, size // config.block),
        *partials.vectors, partials.matrix, partials.cut.parts, sum_y, sum_x, cross,
        d=group_size, D=size, ROWS=config.block, BATCH=BATCH, config=config, device=x.device,
    )  # fmt: skip
    return cross, sum_y, sum_x


def moments(x: Tensor, group_size: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_supported(x, group_size=group_size)
    if exact or x.numel() == 0:  # tensor cores do not add as exactly as an eigendecomposition needs
        return full_precision(eager.moments)(x, group_size, exact)
    if group_size == 1:
        return channel_moments(x)
    partials = reduce_moments(x, group_size)
    groups, _, size = partials.vectors[0].shape
    mean, remainder = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    cov = x.new_empty((groups, group_size, group_size), dtype=torch.float32)
    config = configuration("merge", size, "", torch.float32, architecture(x.device))
    launch(
        finish_moments, (groups, size // config.block),
        *partials.vectors, partials.matrix, partials.cut.parts, partials.cut.chunk, partials.columns,
        mean, remainder, cov, d=group_size, D=size, ROWS=config.block, BATCH=BATCH, config=config, device=x.device,
    )  # fmt: skip
    return mean, remainder, cov


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    check_supported(x, group_size=group_size)
    if x.numel() == 0:
        return eager.cross_moments(y, x, mean, group_size)
    cross, sum_y, _ = summed_products(y, x, mean.contiguous(), group_size)
    return cross, sum_y
