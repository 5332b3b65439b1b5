"""Triton implementation of the mix y = A (x - mean) + bias, the second and last pass over the activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.layouts import empty_output
from normkernels.triton.arguments import Affine, Matrix, sources_of
from normkernels.triton.configs import configuration, padded, single_channels
from normkernels.triton.diagonal import map_channels
from normkernels.triton.launch import columns, launch, split, within_32_bits
from normkernels.triton.support import architecture, check_supported, tf32_allowed
from normkernels.triton.tiles import bounds, load_tile, pointers


@triton.jit(do_not_specialize=["columns"])
def mix_kernel(
    x, shift, x2, shift2, matrix, affine, y, columns, chunk,
    d: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Set y = diag(weight) (matrix [x - shift; x2 - shift2]) + bias: OUT rows of a group, on one part of the columns.

    shift, x2 and shift2, weight, and bias may be None.
    """
    BLOCKS: tl.constexpr = D // OUT
    block, group, part = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, tl.program_id(1)
    row, inner, offset = block * OUT + tl.arange(0, OUT), tl.arange(0, D), tl.arange(0, BLOCK)
    channel, source = group * d + row, group * d + inner
    start, stop = bounds(part, chunk, columns, WIDE, y.run)

    entries = matrix.data + group.to(tl.int64) * matrix.group_stride
    entries = entries + row[:, None] * matrix.row_stride + inner[None, :] * matrix.column_stride
    real = (row < d)[:, None] & (inner < d)[None, :]
    A = tl.load(entries, mask=real, other=0.0).to(tl.float32)
    constant = tl.zeros((OUT,), tl.float32)
    if affine.bias is not None:
        constant = tl.load(affine.bias + channel, mask=row < d, other=0.0).to(tl.float32)
    if affine.weight is not None:
        A *= tl.load(affine.weight + channel, mask=row < d, other=0.0).to(tl.float32)[:, None]
    if shift is not None:
        center = tl.load(shift + source, mask=inner < d, other=0.0)[:, None]
    if x2 is not None:
        B = tl.load(entries + d * matrix.column_stride, mask=real, other=0.0).to(tl.float32)
        if shift2 is not None:
            center2 = tl.load(shift2 + source, mask=inner < d, other=0.0)[:, None]

    for begin in range(start, stop, BLOCK):
        column = begin + offset
        within = (column < stop)[None, :]
        mask = (inner < d)[:, None] & within
        tile = load_tile(x, source, column, mask)
        if shift is not None:
            tile -= center
        mixed = tl.dot(A, tile, input_precision=PRECISION)
        if x2 is not None:
            tile = load_tile(x2, source, column, mask)
            if shift2 is not None:
                tile -= center2
            mixed = tl.dot(B, tile, mixed, input_precision=PRECISION)
        mixed += constant[:, None]
        target = pointers(y, channel, column)
        tl.store(target, mixed.to(y.data.dtype.element_ty), mask=(row < d)[:, None] & within)


def mix(
    sources: list[tuple[Tensor, Tensor | None]],
    matrix: Tensor,
    bias: Tensor | None,
    like: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return diag(weight) matrix @ [source - shift; ...] + bias for one or two stacked sources, in one launch."""
    groups, d, _ = matrix.shape
    if single_channels(d):
        return map_channels(sources, matrix, bias, like, weight)
    matrix, result = within_32_bits(matrix), empty_output(like)
    out, size = columns(result), padded(d)
    kernel = "mix" if len(sources) == 1 else "stacked_mix"
    config = configuration(kernel, size, out.layout, like.dtype, architecture(like.device))
    # The matrix is split into two parts for its products; those of 128 rows do not fit shared memory. The programs of
    # the same columns are neighbours and find x in the second-level cache.
    out_rows = min(size, config.rows)
    precision = "tf32" if like.dtype == torch.float32 and tf32_allowed() else config.precision
    cut = split(out.total, groups, config.block, like.device)
    launch(
        mix_kernel, (size // out_rows * groups, cut.parts),
        *sources_of(sources), Matrix(matrix, *matrix.stride()), Affine(weight, bias), out, out.total, cut.chunk,
        d=d, D=size, OUT=out_rows, BLOCK=config.block, WIDE=out.wide, PRECISION=precision, config=config,
        device=like.device,
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
