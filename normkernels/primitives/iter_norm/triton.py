"""Triton implementation of the fused training op: three launches forward and three backward.

reduce (parts of the data) -> finish (merge the parts, small matrix function) -> mix, in both directions. The second
launch has several programs for each group, which merge some rows each; the last of them to arrive goes on to
the small matrix function. Merging by one program would read the parts at the speed of one multiprocessor, and take
longer than the pass over a small batch. For method="eigh", and for groups of one channel, whose matrices are numbers,
plain PyTorch computes the small matrix function between our passes; for eigh the covariance, too (moments/triton.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.primitives.inverse_sqrt.triton import (
    BACKWARD_MATRICES,
    FORWARD_MATRICES,
    add_transposed,
    check_iterations,
    covariance_adjoint,
    entries,
    read_group,
    whitening_matrix,
)
from normkernels.primitives.iter_norm import eager
from normkernels.primitives.moments.triton import (
    MATRIX_BATCH,
    merged_covariance,
    merged_matrix,
    merged_sum,
    moments,
    reduce_cross,
    reduce_moments,
    summed_products,
)
from normkernels.primitives.whiten.triton import mix
from normkernels.triton.arguments import Affine, Whitening
from normkernels.triton.configs import configuration, single_channels
from normkernels.triton.launch import launch
from normkernels.triton.support import architecture, check_supported

ROWS = 4  # rows of a matrix that one program merges


@triton.jit
def last_of_group(ticket, group):
    """Return whether all other programs of the group have finished writing before this one came here."""
    tl.debug_barrier()  # all threads of this program have written
    arrived = tl.atomic_add(ticket + group, 1, sem="acq_rel", scope="gpu")
    return arrived == tl.num_programs(1) - 1


@triton.jit
def vector(values, start, row, d: tl.constexpr, default: tl.constexpr):
    """Return values[start + row] in float32, or a default where there is no vector or no row."""
    if values is None:  # an early return would not compile: the code after it is compiled all the same
        result = tl.full(row.shape, default, tl.float32)
    else:
        result = tl.load(values + start + row, mask=row < d, other=default).to(tl.float32)
    return result


@triton.jit(do_not_specialize=["columns"])
def finish_forward(
    partial, cut, columns, affine, scratch, mean_out, out, constant_out, T, eps,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
    MATRICES: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute mean, arguments.Whitening, and constant = bias + A (mean - exact mean); A = diag(weight) W."""
    group, own, index = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    scratch += group.to(tl.int64) * (MATRICES * D * D)
    rows, exact = merged_covariance(partial, group, cut, columns, own, D, BATCH)
    tl.store(scratch + own[:, None] * D + index[None, :], rows)
    if last_of_group(partial.ticket, group):
        real, channel, mean = index < d, group * d + index, exact.to(tl.float32)
        tl.store(mean_out + channel, mean, mask=real)
        tl.debug_barrier()
        whitening_matrix(scratch, out, group, T, eps, d, D, FROBENIUS, STEP, PRECISION)
        read_group(scratch, 1.0, out.W, group, d, D)
        left_out = (mean.to(tl.float64) - exact).to(tl.float32)
        for first in range(0, D, BLOCK):
            here, column = entries(first, BLOCK, D)
            constant = tl.sum(tl.load(scratch + here * D + column) * left_out[None, :], 1)
            row = first + tl.arange(0, BLOCK)
            constant *= vector(affine.weight, group * d, row, d, 1.0)
            constant += vector(affine.bias, group * d, row, d, 0.0)
            tl.store(constant_out + group * d + row, constant, mask=row < d)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["columns"])
def finish_backward(
    partial, parts, columns, weight, saved, scratch, matrix_out, constant_out, grad_out, T,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
    MATRICES: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute [A^T | B] and the constant of dx = A^T dy + B (x - mean) + constant, and gradients of weight and bias."""
    group, own, index = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    scratch += group.to(tl.int64) * (MATRICES * D * D)
    B, E = scratch + 2 * D * D, scratch + 7 * D * D
    tl.store(E + own[:, None] * D + index[None, :], merged_matrix(partial.cross, group, parts, own, D, BATCH))
    if last_of_group(partial.ticket, group):
        m = columns.to(tl.float32)
        f = merged_sum(partial.sum_y, group, parts, index, D, BATCH).to(tl.float32)
        # The rounding of the mean leaves an offset in x - mean, which is taken out of everything linear in x - mean.
        offset = merged_sum(partial.sum_x, group, parts, index, D, BATCH).to(tl.float32) / m
        tl.store(grad_out.bias + group * d + index, f, mask=index < d)
        tl.debug_barrier()
        for first in range(0, D, BLOCK):
            row = first + tl.arange(0, BLOCK)
            here, column = entries(first, BLOCK, D)
            # .cg: what other programs have written is in the second-level cache, which all share
            centred = tl.load(E + here * D + column, cache_modifier=".cg")
            centred -= vector(grad_out.bias, group * d, row, d, 0.0)[:, None] * offset[None, :]
            at = group.to(tl.int64) * d * d + here * d + column
            grad_weight = tl.sum(centred * tl.load(saved.W + at, mask=(here < d) & (column < d), other=0.0), 1)
            scaled = vector(weight, group * d, row, d, 1.0)[:, None] * centred
            tl.store(grad_out.weight + group * d + row, grad_weight, mask=row < d)
            tl.store(scratch + here * D + column, scaled)
            tl.debug_barrier()
        add_transposed(E, 0.0, None, 0.5, scratch, 0.5, D)
        covariance_adjoint(scratch, saved, 2.0 / m, group, T, d, D, FROBENIUS, STEP, PRECISION)

        gamma = vector(weight, group * d, index, d, 1.0)
        for first in range(0, D, BLOCK):
            row = first + tl.arange(0, BLOCK)
            here, column = entries(first, BLOCK, D)
            real = (here < d) & (column < d)
            A_T = tl.load(saved.W + group.to(tl.int64) * d * d + column * d + here, mask=real, other=0.0)
            A_T *= gamma[None, :]
            B_here = tl.load(B + here * D + column)
            out = matrix_out + group.to(tl.int64) * d * 2 * d + here * (2 * d) + column
            tl.store(out, A_T, mask=real)
            tl.store(out + d, B_here, mask=real)
            constant = tl.sum(A_T * f[None, :], 1) / m + tl.sum(B_here * offset[None, :], 1)
            tl.store(constant_out + group * d + row, -constant, mask=row < d)
            tl.debug_barrier()


def fused(group_size: int, eigh: bool) -> bool:
    """Return whether the kernels of this module serve a call, or those of the primitives that it is made of."""
    return not eigh and not single_channels(group_size)


def finish(kernel: triton.JITFunction, vector: Tensor, arguments: tuple[object, ...], d: int, frobenius: bool) -> None:
    """Launch one of the kernels above, which merge partial results, among them this vector (G, parts, D)."""
    groups, _, size = vector.shape
    config = configuration("newton", size, "", torch.float32, architecture(vector.device))
    launch(
        kernel, (groups, size // ROWS), *arguments, d=d, D=size, BLOCK=min(size, 64), ROWS=ROWS,
        BATCH=MATRIX_BATCH, MATRICES=FORWARD_MATRICES if kernel is finish_forward else BACKWARD_MATRICES,
        FROBENIUS=frobenius, STEP=config.block, PRECISION=config.precision, config=config, device=vector.device,
    )  # fmt: skip


def iter_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    num_iterations: int,
    eps: float,
    frobenius: bool,
    eigh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_supported(x, group_size=group_size)
    if not eigh:
        check_iterations(num_iterations)
    if x.numel() == 0:
        return full_precision(eager.iter_norm)(x, weight, bias, group_size, num_iterations, eps, frobenius, eigh)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    if not fused(group_size, eigh):
        return full_precision(eager.iter_norm)(
            x, weight, bias, group_size, num_iterations, eps, frobenius, eigh, reduce=moments, mix=mix
        )
    partial, cut = reduce_moments(x, group_size)
    groups, _, size = partial.shift.shape
    mean, constant = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    matrices = (groups, group_size, group_size)
    out = Whitening(*(x.new_empty(shape, dtype=torch.float32) for shape in (matrices, matrices, (groups, 1))))
    scratch = x.new_empty(groups * FORWARD_MATRICES * size * size, dtype=torch.float32)
    m = x.numel() // x.shape[1]
    arguments = (partial, cut, m, Affine(weight, bias), scratch, mean, out, constant, num_iterations, eps)
    finish(finish_forward, partial.shift, arguments, group_size, frobenius)
    return mix([(x, mean)], out.W, constant, like=x, weight=weight), mean, *out


def iter_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    W: Tensor,
    saved_matrix: Tensor,
    saved_scale: Tensor,
    num_iterations: int,
    frobenius: bool,
    eigh: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, d, _ = W.shape
    check_supported(x, group_size=d)
    if not eigh:
        check_iterations(num_iterations)
    if x.numel() == 0:
        return full_precision(eager.iter_norm_backward)(
            grad, x, weight, mean, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh
        )
    weight = None if weight is None else weight.contiguous()
    mean, W, saved_matrix, saved_scale = (value.contiguous() for value in (mean, W, saved_matrix, saved_scale))
    if not fused(d, eigh):
        return full_precision(eager.iter_norm_backward)(
            grad, x, weight, mean, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh,
            reduce=summed_products, mix=mix,
        )  # fmt: skip
    partial, cut = reduce_cross(grad, x, mean, d)
    size = partial.sum_y.shape[2]
    matrix = W.new_empty((groups, d, 2 * d))
    constant, grad_weight, grad_bias = (torch.empty_like(mean) for _ in range(3))
    out, saved = Affine(grad_weight, grad_bias), Whitening(W, saved_matrix, saved_scale)
    scratch = W.new_empty(groups * BACKWARD_MATRICES * size * size)
    m = x.numel() // x.shape[1]
    arguments = (partial, cut.parts, m, weight, saved, scratch, matrix, constant, out, num_iterations)
    finish(finish_backward, partial.sum_y, arguments, d, frobenius)
    return mix([(grad, None), (x, mean)], matrix, constant, like=x), grad_weight, grad_bias
