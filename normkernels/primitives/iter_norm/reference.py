"""iter_norm and its backward as the papers write them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.inverse_sqrt.reference import (
    condition,
    covariance_of,
    error_of,
    inverse_sqrt,
    root_by_eigenvalues,
    root_by_newton,
)
from normkernels.primitives.moments.reference import ROUNDOFF, gradients_like, moments
from normkernels.primitives.whiten.reference import affine, whiten


def iter_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    num_iterations: int,
    eps: float,
    frobenius: bool,
    eigh: bool,
) -> tuple[Tensor | None, ...]:
    """Compute Algorithm 1 of IterNorm, or DBN."""
    mean, _, cov = moments(x, group_size, eigh)
    assert mean is not None and cov is not None
    W, saved_matrix, saved_scale = inverse_sqrt(cov, num_iterations, eps, frobenius, eigh)
    assert W is not None
    return whiten(x, mean, W, weight, bias)[0], mean, W, saved_matrix, saved_scale


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
) -> tuple[Tensor, ...]:
    """Differentiate the equations in x, weight and bias; eps I is what the saved covariance has more than x's."""
    leaves = x.clone(), torch.ones_like(mean) if weight is None else weight.clone(), torch.zeros_like(mean)
    x, gamma, beta = (leaf.requires_grad_() for leaf in leaves)
    center, _, cov = moments(x, W.shape[1], eigh)
    assert center is not None and cov is not None
    sigma = cov + (covariance_of(saved_matrix, saved_scale, eigh) - cov).detach()
    root = root_by_eigenvalues(sigma) if eigh else root_by_newton(sigma, num_iterations, frobenius)[0]
    return torch.autograd.grad(whiten(x, center, root, gamma, beta)[0], (x, gamma, beta), grad)


def whole_error(x: Tensor, sigma: Tensor, num_iterations: int) -> float:
    """Return the error of inverse_sqrt, and of the sums of m and d products that go into it and come after it."""
    samples, d = x.numel() // x.shape[1], sigma.shape[1]
    return error_of(sigma, num_iterations) + (samples + d) * condition(sigma) * ROUNDOFF


def tolerance(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, group_size: int, num_iterations: int, eps: float, *_: bool
) -> float:
    cov = moments(x, group_size, False)[2]
    assert cov is not None
    return whole_error(x, cov + eps * torch.eye(group_size, dtype=cov.dtype, device=cov.device), num_iterations)


def backward_tolerance(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, W: Tensor, saved_matrix: Tensor, *rest: Any
) -> float:
    """Return twice as much: every factor in a gradient has been rounded once before."""
    saved_scale, num_iterations, _, eigh = rest
    return 2 * whole_error(x, covariance_of(saved_matrix, saved_scale, eigh), num_iterations)


OPTIONS = ((True, False, False), (False, True, False), (True, False, True))  # affine, frobenius, eigh


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for with_affine, *options in OPTIONS:
        weight, bias = affine(x) if with_affine else (None, None)
        yield x, weight, bias, group_size, 5, 1e-3, *options


def backward_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for arguments in samples(x, group_size):
        _, *saved = torch.ops.normkernels.iter_norm(*arguments)
        weight, options = arguments[1], arguments[-2:]
        for grad in gradients_like(x):
            yield grad, x, weight, *saved, 5, *options
