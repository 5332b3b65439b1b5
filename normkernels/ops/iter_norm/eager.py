"""Plain PyTorch implementation of the fused training op: reduce, small matrix, mix, and the same back."""

from __future__ import annotations

import torch
from torch import Tensor

from normkernels.ops._products import matmul
from normkernels.ops._tiles import as_groups
from normkernels.ops.inverse_sqrt.eager import inverse_sqrt, inverse_sqrt_adjoint
from normkernels.ops.moments.eager import shifted_moments, summed_products
from normkernels.ops.whiten.eager import affine, mix, per_group


def iter_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    num_iterations: int,
    eps: float,
    scaling: str,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = as_groups(x, group_size)
    exact_mean, cov = shifted_moments(groups)
    W, residual, scale = inverse_sqrt(cov, num_iterations, eps, scaling, method)
    mean = exact_mean.to(cov.dtype)
    A = affine(W, weight)
    # x - mean is exact to the rounding of the mean, which goes into the shift: at a mean of 1e5 standard
    # deviations it would show in the third decimal of y.
    shift = matmul(A, (mean - exact_mean).to(A.dtype).unsqueeze(2)).squeeze(2)
    beta = per_group(bias, W)
    y = mix([(groups, mean)], A, shift if beta is None else shift + beta, like=x)
    return y, mean.flatten(), W, residual, scale


def iter_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    W: Tensor,
    residual: Tensor,
    scale: Tensor,
    num_iterations: int,
    scaling: str,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d = W.shape[1]
    m = max(x.numel() // x.shape[1], 1)
    grads, groups, centre = as_groups(grad, d), as_groups(x, d), mean.view(-1, d)
    D, sum_grad, sum_centred = summed_products(grads, groups, centre)
    # What the rounding of the mean left in x - mean is taken out of everything linear in it.
    offset = (sum_centred / m).to(W.dtype).unsqueeze(2)
    f = sum_grad.to(W.dtype).unsqueeze(2)
    D = D - f * offset.mT

    A = affine(W, weight).mT
    B = inverse_sqrt_adjoint(affine(D, weight), W, residual, scale, num_iterations, scaling, method) * (2 / m)
    constant = -(matmul(A, f) / m + matmul(B, offset)).squeeze(2)
    grad_x = mix([(grads, None), (groups, centre)], torch.cat((A, B), dim=2), constant, like=x)
    return grad_x, (D * W).sum(2).flatten(), f.flatten()
