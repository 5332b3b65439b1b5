"""Triton implementation of the small matrix function and its adjoint: one program for each group.

The matrices of the recursions live in memory (``scratch``: a few of (D, D) for each group), and a multiprocessor's
cache holds all of them; registers hold at most 64 rows of a result. With everything in registers the compiler spills
from 64 x 64 on. A barrier follows every store, so that all threads read what it wrote (`make kernels` checks that).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.primitives.inverse_sqrt import eager
from normkernels.triton.arguments import Whitening
from normkernels.triton.configs import configuration, padded
from normkernels.triton.launch import launch
from normkernels.triton.support import Unsupported, architecture, check_supported

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
MOST_ITERATIONS = 15  # later ones may have to stop (eager.stopped), for which the kernels have no registers left
FORWARD_MATRICES, BACKWARD_MATRICES = 3, 8  # (D, D) each, in memory, for each group; backward with E


@triton.jit
def entries(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column numbers of a block of whole rows."""
    return (first + tl.arange(0, ROWS))[:, None], tl.arange(0, COLUMNS)[None, :]


@triton.jit
def multiply_add(
    out, alpha, left, right, beta, B, gamma, C, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """Set out = alpha left right + beta B + gamma C; B and C may be None, out any but ``right``."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        total = tl.zeros((ROWS, D), tl.float32)
        for start in range(0, D, STEP):
            inner = start + tl.arange(0, STEP)
            a = tl.load(left + row * D + inner[None, :])
            b = tl.load(right + inner[:, None] * D + column)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        total *= alpha
        if B is not None:
            total += beta * tl.load(B + row * D + column)
        if C is not None:
            total += gamma * tl.load(C + row * D + column)
        tl.debug_barrier()  # all threads have read what this replaces
        tl.store(out + row * D + column, total)
        tl.debug_barrier()


@triton.jit
def add_transposed(out, alpha, A, beta, X, gamma, D: tl.constexpr):
    """Set out = alpha A + beta X + gamma X^T; A may be None, out any but X."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        total = beta * tl.load(X + row * D + column) + gamma * tl.load(X + column * D + row)
        if A is not None:
            total += alpha * tl.load(A + row * D + column)
        tl.debug_barrier()
        tl.store(out + row * D + column, total)
        tl.debug_barrier()


@triton.jit
def combine(out, alpha, beta, A, gamma, B, D: tl.constexpr):
    """Set out = alpha I + beta A + gamma B; B may be None."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        total = tl.where(row == column, alpha, 0.0) + beta * tl.load(A + row * D + column)
        if B is not None:
            total += gamma * tl.load(B + row * D + column)
        tl.store(out + row * D + column, total)
        tl.debug_barrier()


@triton.jit
def inner_product(A, B, D: tl.constexpr):
    """Return <A, B>, the sum of the products of their entries."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    total = 0.0
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        total += tl.sum(tl.sum(tl.load(A + row * D + column) * tl.load(B + row * D + column), 1), 0)
    tl.debug_barrier()
    return total


@triton.jit
def read_group(out, factor, matrix, group, d: tl.constexpr, D: tl.constexpr):
    """Set out = factor times a group's matrix of (G, d, d), with zeros beyond d."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        at = group.to(tl.int64) * d * d + row * d + column
        tl.store(out + row * D + column, factor * tl.load(matrix + at, mask=(row < d) & (column < d), other=0.0))
        tl.debug_barrier()


@triton.jit
def write_group(matrix, factor, A, group, d: tl.constexpr, D: tl.constexpr):
    """Set a group's matrix of (G, d, d) to factor A."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    for first in range(0, D, ROWS):
        row, column = entries(first, ROWS, D)
        at = group.to(tl.int64) * d * d + row * d + column
        tl.store(matrix + at, factor * tl.load(A + row * D + column), mask=(row < d) & (column < d))
        tl.debug_barrier()


@triton.jit
def next_residual(M, square, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Replace M by M Q^2 = 2.25 M - 1.5 M^2 + .25 M^3, with Q = (3 I - M) / 2."""
    multiply_add(square, 1.0, M, M, 0.0, None, 0.0, None, D, STEP, PRECISION)
    multiply_add(M, 0.25, M, square, -1.5, square, 2.25, M, D, STEP, PRECISION)


@triton.jit
def newton(scratch, T, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Compute P_T -> S^(-1/2), eq. 17 in its residual form (DERIVATION.md).

    S is the first of 3 matrices, and P_T the last.
    """
    M, square, P = scratch, scratch + D * D, scratch + 2 * D * D
    combine(P, tl.where(T == 0, 1.0, 1.5), tl.where(T == 0, 0.0, -0.5), M, 0.0, None, D)
    for _ in range(1, T):
        next_residual(M, square, D, STEP, PRECISION)
        multiply_add(P, -0.5, P, M, 1.5, P, 0.0, None, D, STEP, PRECISION)  # P Q


@triton.jit
def newton_adjoint(scratch, T, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Compute sym dL/dS for E = sym dL/dP_T: the derivative of the recursion in the direction E.

    S is the first of 7 matrices, E the second, and the result the third.
    """
    M, dM, dP = scratch, scratch + D * D, scratch + 2 * D * D
    P, square = scratch + 3 * D * D, scratch + 4 * D * D
    X, Y = scratch + 5 * D * D, scratch + 6 * D * D
    combine(P, 1.5, -0.5, M, 0.0, None, D)
    combine(dP, 0.0, tl.where(T == 0, 0.0, -0.5), dM, 0.0, None, D)
    for _ in range(1, T):
        multiply_add(X, 1.0, dM, M, 0.0, None, 0.0, None, D, STEP, PRECISION)
        add_transposed(Y, 0.0, None, 0.5, X, 1.0, D)
        multiply_add(X, 0.25, M, Y, -1.5, X, 0.0, None, D, STEP, PRECISION)
        add_transposed(dM, 2.25, dM, 1.0, X, 1.0, D)
        next_residual(M, square, D, STEP, PRECISION)
        multiply_add(X, -0.5, dP, M, 1.5, dP, 0.0, None, D, STEP, PRECISION)  # dP Q - P dM / 2
        multiply_add(X, -0.5, P, dM, 1.0, X, 0.0, None, D, STEP, PRECISION)
        add_transposed(dP, 0.0, None, 0.5, X, 0.5, D)
        multiply_add(P, -0.5, P, M, 1.5, P, 0.0, None, D, STEP, PRECISION)


@triton.jit
def scale_of(cov, D: tl.constexpr, FROBENIUS: tl.constexpr):
    """Return the upper bound of the largest eigenvalue that eq. 14 divides by: trace or Frobenius norm."""
    ROWS: tl.constexpr = 64 if D > 64 else D
    scale = 0.0
    if FROBENIUS:
        largest = TINY
        for first in range(0, D, ROWS):
            row, column = entries(first, ROWS, D)
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(tl.load(cov + row * D + column)), 1), 0))
        for first in range(0, D, ROWS):
            row, column = entries(first, ROWS, D)
            relative = tl.load(cov + row * D + column) / largest  # squares do not underflow
            scale += tl.sum(tl.sum(relative * relative, 1), 0)
        scale = largest * tl.sqrt(scale)
    else:
        index = tl.arange(0, D)
        scale = tl.sum(tl.load(cov + index * D + index), 0)
    tl.debug_barrier()
    # eps = 0 and a constant batch: W stays finite. A covariance that is not finite: W is NaN.
    return tl.maximum(scale, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def whitening_matrix(
    scratch, out, group, T, eps,
    d: tl.constexpr, D: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute arguments.Whitening of a group's covariance.

    The covariance is the first of 3 matrices, zero beyond d.
    """
    cov, P = scratch, scratch + 2 * D * D
    index = tl.arange(0, D)
    diagonal = tl.load(cov + index * D + index)
    tl.debug_barrier()
    tl.store(cov + index * D + index, diagonal + eps, mask=index < d)
    tl.debug_barrier()
    scale = scale_of(cov, D, FROBENIUS)
    tl.store(out.scale + group, scale)
    tl.debug_barrier()
    combine(cov, 0.0, 1.0 / scale, cov, 0.0, None, D)
    write_group(out.S, 1.0, cov, group, d, D)
    newton(scratch, T, D, STEP, PRECISION)
    write_group(out.W, 1.0 / tl.sqrt(scale), P, group, d, D)


@triton.jit
def covariance_adjoint(
    scratch, saved, factor, group, T,
    d: tl.constexpr, D: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute factor sym dL/dcov for E = sym dL/dW: eq. 6, where both S and W depend on the scale.

    E is the last of 8 matrices, and the result the third.
    """
    M, dM, dS, E = scratch, scratch + D * D, scratch + 2 * D * D, scratch + 7 * D * D
    scale = tl.load(saved.scale + group)
    read_group(M, 1.0, saved.S, group, d, D)
    combine(dM, 0.0, 1.0 / tl.sqrt(scale), E, 0.0, None, D)
    newton_adjoint(scratch, T, D, STEP, PRECISION)
    read_group(M, 1.0, saved.W, group, d, D)
    along_W = inner_product(E, M, D)
    read_group(M, 1.0, saved.S, group, d, D)
    d_scale = -(inner_product(dS, M, D) + 0.5 * along_W) / scale
    if FROBENIUS:  # the gradient of the Frobenius norm is S, that of the trace is I
        combine(dS, 0.0, factor / scale, dS, factor * d_scale, M, D)
    else:
        combine(dS, factor * d_scale, factor / scale, dS, 0.0, None, D)


@triton.jit
def inverse_sqrt_kernel(
    cov, scratch, out, T, eps,
    d: tl.constexpr, D: tl.constexpr, MATRICES: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    scratch += group.to(tl.int64) * (MATRICES * D * D)
    read_group(scratch, 1.0, cov, group, d, D)
    whitening_matrix(scratch, out, group, T, eps, d, D, FROBENIUS, STEP, PRECISION)


@triton.jit
def inverse_sqrt_backward_kernel(
    grad, saved, scratch, grad_cov, T,
    d: tl.constexpr, D: tl.constexpr, MATRICES: tl.constexpr, FROBENIUS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    scratch += group.to(tl.int64) * (MATRICES * D * D)
    read_group(scratch, 1.0, grad, group, d, D)
    add_transposed(scratch + 7 * D * D, 0.0, None, 0.5, scratch, 0.5, D)
    covariance_adjoint(scratch, saved, 1.0, group, T, d, D, FROBENIUS, STEP, PRECISION)
    write_group(grad_cov, 1.0, scratch + 2 * D * D, group, d, D)


def check_iterations(num_iterations: int) -> None:
    if num_iterations > MOST_ITERATIONS:
        raise Unsupported(f"expected num_iterations of at most {MOST_ITERATIONS}, got {num_iterations}")


def inverse_sqrt(
    cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if eigh:  # a batched eigendecomposition has no product to fuse: the library's is used
        return full_precision(eager.inverse_sqrt)(cov, num_iterations, eps, frobenius, eigh)
    check_supported(cov, group_size=cov.shape[1])
    check_iterations(num_iterations)
    groups, d, _ = cov.shape
    size = padded(d)
    config = configuration("newton", size, "", torch.float32, architecture(cov.device))
    out = Whitening(cov.new_empty(cov.shape), cov.new_empty(cov.shape), cov.new_empty((groups, 1)))
    scratch = cov.new_empty(groups * FORWARD_MATRICES * size * size)
    launch(
        inverse_sqrt_kernel, (groups,), cov.contiguous(), scratch, out, num_iterations, eps,
        d=d, D=size, MATRICES=FORWARD_MATRICES, FROBENIUS=frobenius, STEP=config.block,
        PRECISION=config.precision, config=config, device=cov.device,
    )  # fmt: skip
    return out


def inverse_sqrt_backward(
    grad: Tensor, W: Tensor, saved_matrix: Tensor, saved_scale: Tensor, num_iterations: int, frobenius: bool, eigh: bool
) -> Tensor:
    if eigh:
        return full_precision(eager.inverse_sqrt_backward)(
            grad, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh
        )
    check_supported(W, group_size=W.shape[1])
    check_iterations(num_iterations)
    groups, d, _ = W.shape
    size = padded(d)
    config = configuration("newton", size, "", torch.float32, architecture(W.device))
    grad_cov = W.new_empty(W.shape)
    scratch = W.new_empty(groups * BACKWARD_MATRICES * size * size)
    saved = Whitening(*(value.contiguous() for value in (W, saved_matrix, saved_scale)))
    launch(
        inverse_sqrt_backward_kernel, (groups,), grad.contiguous(), saved, scratch, grad_cov, num_iterations,
        d=d, D=size, MATRICES=BACKWARD_MATRICES, FROBENIUS=frobenius, STEP=config.block,
        PRECISION=config.precision, config=config, device=W.device,
    )  # fmt: skip
    return grad_cov
