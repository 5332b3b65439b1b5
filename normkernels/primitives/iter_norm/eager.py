"""Plain PyTorch implementation of the fused training op: reduce, small matrix, mix, and the same backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.inverse_sqrt.eager import inverse_sqrt, inverse_sqrt_backward
from normkernels.primitives.moments.eager import moments, summed_products
from normkernels.primitives.whiten.eager import affine
from normkernels.primitives.whiten.eager import mix as eager_mix

# The passes over the data; other backends bring their own, for method="eigh".
Pass = Callable[..., Any]


def iter_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    num_iterations: int,
    eps: float,
    frobenius: bool,
    eigh: bool,
    *,
    reduce: Pass = moments,
    mix: Pass = eager_mix,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, remainder, cov = reduce(x, group_size, eigh)
    small_matrix = inverse_sqrt(cov, num_iterations, eps, frobenius, eigh)
    W, saved_matrix, saved_scale = (value.to(mean) for value in small_matrix)
    A = affine(W, weight)
    # x - mean is exact to the rounding of the mean, whose remainder goes into the bias: at a mean of 1e5 standard
    # deviations it would show in the third decimal of y.
    beta = -torch.bmm(A, remainder.view(-1, group_size, 1)).flatten()
    if bias is not None:
        beta += bias
    return mix([(x, mean)], A, beta, like=x), mean, W, saved_matrix, saved_scale


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
    *,
    reduce: Pass = summed_products,
    mix: Pass = eager_mix,
) -> tuple[Tensor, Tensor, Tensor]:
    g, d, _ = W.shape
    m = max(x.numel() // x.shape[1], 1)
    D, sum_grad, sum_centred = reduce(grad, x, mean, d)
    # The rounding of the mean leaves an offset in x - mean, which is taken out of everything linear in x - mean.
    offset = (sum_centred / m).to(W.dtype).view(g, d, 1)
    f = sum_grad.to(W.dtype).view(g, d, 1)
    D = D - f * offset.mT

    A = affine(W, weight).mT
    dcov = inverse_sqrt_backward(affine(D, weight), W, saved_matrix, saved_scale, num_iterations, frobenius, eigh)
    B = dcov * (2 / m)
    constant = -(torch.bmm(A, f) / m + torch.bmm(B, offset)).flatten()
    grad_x = mix([(grad, None), (x, mean)], torch.cat((A, B), dim=2), constant, like=x)
    return grad_x, (D * W).sum(2).flatten(), f.flatten()
