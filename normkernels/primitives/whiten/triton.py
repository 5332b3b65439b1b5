"""Triton implementation of the mix y = A (x - mean) + bias, the second and last pass over the activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.layouts import empty_output
from normkernels.triton.configs import configuration, padded
from normkernels.triton.diagonal import map_channels
from normkernels.triton.launch import columns, launch, split, within_32_bits
from normkernels.triton.support import architecture, check_supported, tf32_allowed
from normkernels.triton.tiles import bounds, load_tile, pointers, positions_of


@triton.jit(do_not_specialize=["columns"])
def mix_kernel(
    x, sample_stride, channel_stride, position_stride, positions, shift,
    x2, sample_stride2, channel_stride2, position_stride2, positions2, shift2,
    matrix, group_stride, row_stride, column_stride, weight, bias,
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, columns, chunk,
    d: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUN2: tl.constexpr,
    Y_RUN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Set y = diag(weight) (matrix [x - shift; x2 - shift2]) + bias: OUT rows of a group, on one part of the columns.

    shift, x2 and shift2, weight, and bias may be None.
    """
    BLOCKS: tl.constexpr = D // OUT
    block, group, part = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(1)
    row, inner, offset = block * OUT + tl.arange(0, OUT), tl.arange(0, D), tl.arange(0, BLOCK)
    channel, source = group * d + row, group * d + inner
    start, stop = bounds(part, chunk, columns, WIDE, Y_RUN)

    entries = matrix + group.to(tl.int64) * group_stride + row[:, None] * row_stride + inner[None, :] * column_stride
    real = (row < d)[:, None] & (inner < d)[None, :]
    A = tl.load(entries, mask=real, other=0.0).to(tl.float32)
    constant = tl.zeros((OUT,), tl.float32)
    if bias is not None:
        constant = tl.load(bias + channel, mask=row < d, other=0.0).to(tl.float32)
    if weight is not None:
        A *= tl.load(weight + channel, mask=row < d, other=0.0).to(tl.float32)[:, None]
    if shift is not None:
        center = tl.load(shift + source, mask=inner < d, other=0.0)[:, None]
    if x2 is not None:
        B = tl.load(entries + d * column_stride, mask=real, other=0.0).to(tl.float32)
    if shift2 is not None:
        center2 = tl.load(shift2 + source, mask=inner < d, other=0.0)[:, None]

    for first in range(start, stop, BLOCK):
        column = first + offset
        within = (column < stop)[None, :]
        mask = (inner < d)[:, None] & within
        at = positions_of(column, positions, sample_stride, position_stride, RUN)
        tile = load_tile(x, source, channel_stride, at, mask, RUN)
        if shift is not None:
            tile -= center
        mixed = tl.dot(A, tile, input_precision=PRECISION)
        if x2 is not None:
            at = positions_of(column, positions2, sample_stride2, position_stride2, RUN2)
            tile = load_tile(x2, source, channel_stride2, at, mask, RUN2)
            if shift2 is not None:
                tile -= center2
            mixed = tl.dot(B, tile, mixed, input_precision=PRECISION)
        mixed += constant[:, None]
        at = positions_of(column, y_positions, y_sample_stride, y_position_stride, Y_RUN)
        target = pointers(y, channel, y_channel_stride, at, Y_RUN)
        tl.store(target, mixed.to(y.dtype.element_ty), mask=(row < d)[:, None] & within)


def mix(
    sources: list[tuple[Tensor, Tensor | None]],
    matrix: Tensor,
    bias: Tensor | None,
    like: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return diag(weight) matrix @ [source - shift; ...] + bias for one or two stacked sources, in one launch."""
    groups, d, _ = matrix.shape
    if d == 1:
        return map_channels(sources, matrix, bias, like, weight)
    matrix, result = within_32_bits(matrix), empty_output(like)
    seen = [columns(source) for source, _ in sources]
    shifts = [shift for _, shift in sources]
    out, size = columns(result), padded(d)
    kernel = "mix" if len(sources) == 1 else "stacked_mix"
    config = configuration(kernel, size, out.layout, like.dtype, architecture(like.device))
    # The matrix is split into two parts for its products; those of 128 rows do not fit shared memory. The programs of
    # the same columns are neighbours and find x in the second-level cache.
    out_rows = min(size, config.rows)
    precision = "tf32" if like.dtype == torch.float32 and tf32_allowed() else config.precision
    cut = split(out.total, groups, config.block, like.device)
    second = (*seen[1].arguments, shifts[1]) if len(sources) == 2 else (None, 0, 0, 0, 1, None)
    launch(
        mix_kernel, (size // out_rows * groups, cut.parts),
        *seen[0].arguments, shifts[0], *second, matrix, *matrix.stride(), weight, bias,
        *out.arguments, out.total, cut.chunk,
        d=d, D=size, OUT=out_rows, BLOCK=config.block, RUN=seen[0].run, RUN2=seen[-1].run, Y_RUN=out.run, WIDE=out.wide,
        PRECISION=precision, config=config, device=like.device,
    )  # fmt: skip
    return result


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    check_supported(x, group_size=W.shape[1])
    if x.numel() == 0:
        return empty_output(x)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    return mix([(x, mean.contiguous())], W, bias, like=x, weight=weight)


def stacked_mix(grad: Tensor, x: Tensor, grad_mean: Tensor, mean: Tensor, matrix: Tensor, constant: Tensor) -> Tensor:
    check_supported(x, group_size=matrix.shape[1])
    if x.numel() == 0:
        return empty_output(x)
    grad_mean, mean, constant = (value.contiguous() for value in (grad_mean, mean, constant))
    return mix([(grad, grad_mean), (x, mean)], matrix, constant, like=x)
