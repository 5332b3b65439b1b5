"""inverse_sqrt and its adjoint as the papers write them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.moments.reference import ROUNDOFF


def inverse_sqrt(
    cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool
) -> tuple[Tensor | None, ...]:
    """Compute IterNorm, eq. 14, 15 and 17, or DBN (eq. 2 there), and S with its scale, or the roots of eigenvalues."""
    sigma = cov + eps * torch.eye(cov.shape[1], dtype=cov.dtype)
    if eigh:
        return root_by_eigenvalues(sigma), None, torch.linalg.eigvalsh(sigma).sqrt()
    W, S, scale = root_by_newton(sigma, num_iterations, frobenius)
    return W, S, scale.view(-1, 1)


def root_by_newton(sigma: Tensor, num_iterations: int, frobenius: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, S and the scale of covariances that have eps I."""
    scale = torch.linalg.matrix_norm(sigma) if frobenius else sigma.diagonal(dim1=1, dim2=2).sum(1)
    scale = scale.view(-1, 1, 1)
    S = sigma / scale
    P = torch.eye(sigma.shape[1], dtype=sigma.dtype).expand_as(sigma)
    for _ in range(num_iterations):
        P = 1.5 * P - 0.5 * P @ P @ P @ S
    return P / scale.sqrt(), S, scale


def root_by_eigenvalues(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    return vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT


def covariance_of(saved_matrix: Tensor, saved_scale: Tensor, eigh: bool) -> Tensor:
    """Return the covariance with eps I that an op has saved for its backward."""
    if eigh:
        return saved_matrix @ torch.diag_embed(saved_scale.square()) @ saved_matrix.mT
    return saved_matrix * saved_scale.unsqueeze(2)


def inverse_sqrt_backward(
    grad: Tensor, W: Tensor, saved_matrix: Tensor, saved_scale: Tensor, num_iterations: int, frobenius: bool, eigh: bool
) -> tuple[Tensor, ...]:
    """Differentiate the equations; the op's gradient is that of a symmetric argument."""
    sigma = covariance_of(saved_matrix, saved_scale, eigh).requires_grad_()
    root = root_by_eigenvalues(sigma) if eigh else root_by_newton(sigma, num_iterations, frobenius)[0]
    (gradient,) = torch.autograd.grad(root, sigma, grad)
    return ((gradient + gradient.mT) / 2,)


def condition(sigma: Tensor) -> float:
    return float(torch.linalg.cond(sigma.cpu().double()).max())


def error_of(sigma: Tensor, num_iterations: int) -> float:
    """Return the condition number times 3 T d roundoffs.

    A relative error of the covariance grows by at most its condition number on the way to the inverse square root, and
    each of Newton's T steps has three products of length d.
    """
    steps = 3 * max(num_iterations, 1) * sigma.shape[1]
    return steps * condition(sigma) * ROUNDOFF


def tolerance(cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool) -> float:
    return error_of(cov + eps * torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device), num_iterations)


def backward_tolerance(
    grad: Tensor, W: Tensor, saved_matrix: Tensor, saved_scale: Tensor, num_iterations: int, frobenius: bool, eigh: bool
) -> float:
    """Return twice as much: every factor in a gradient has been rounded once before."""
    return 2 * error_of(covariance_of(saved_matrix, saved_scale, eigh), num_iterations)


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    _, _, cov = torch.ops.normkernels.moments(x, group_size, False)
    for frobenius, eigh in ((False, False), (True, False), (False, True)):
        yield cov, 5, 1e-3, frobenius, eigh


def backward_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for cov, num_iterations, eps, frobenius, eigh in samples(x, group_size):
        saved = torch.ops.normkernels.inverse_sqrt(cov, num_iterations, eps, frobenius, eigh)
        yield cov - 0.5 * cov.flip(1), *saved, num_iterations, frobenius, eigh
