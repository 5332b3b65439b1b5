"""Plain PyTorch implementation of the fused training op: the reductions and the mix, for groups of one channel."""

from __future__ import annotations

import torch
from torch import Tensor

from normkernels.primitives.moments.eager import moments, summed_products
from normkernels.primitives.whiten.eager import mix


def factors(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool,
    scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return a = gamma / (kappa r), r = sqrt(mean of x~^2 + eps) and beta, each (C,) in the statistics' type.

    The second moment is that of x~ = x - mean + beta, or of x: var + beta^2, or var + mean^2.
    """
    beta = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    if not scale:
        return torch.ones_like(mean), torch.ones_like(mean), beta
    r = (var + (beta if center else mean).square() + eps).sqrt()
    a = 1 / (kappa * r)
    return a if weight is None else a * weight.to(a.dtype), r, beta


def pop_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool, scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, remainder, cov = moments(x, 1)
    var = cov.flatten()
    a, _, beta = factors(mean, var, weight, bias, kappa, eps, center, scale)
    matrix = a.view(-1, 1, 1)
    if not center:
        return mix([(x, None)], matrix, None, like=x), mean, var
    # x - mean is exact to the rounding of the mean, whose remainder goes into the constant.
    constant = a * (beta - remainder)
    return mix([(x, mean)], matrix, constant, like=x), mean, var


def pop_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    kappa: float,
    eps: float,
    center: bool,
    scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    m = max(x.numel() // x.shape[1], 1)
    a, r, beta = factors(mean, var, weight, bias, kappa, eps, center, scale)
    shift = mean if center else torch.zeros_like(mean)
    D, sum_grad, sum_shifted = summed_products(grad, x, shift, 1)
    D, f = D.flatten(), sum_grad.to(mean.dtype)
    # The rounding of the mean leaves an offset in x - mean, which is taken out of everything linear in x - mean.
    offset = (sum_shifted / m).to(mean.dtype) if center else torch.zeros_like(mean)
    D = D - f * offset
    e = D + beta * f  # sum dy x~
    q = -a * e / (m * r * r) if scale else torch.zeros_like(a)
    if center:
        constant = -(a * f / m + q * offset)
        # Rejected: f - beta e / r^2, which loses (beta / sigma)^2 of its digits.
        grad_bias = a * (f * (var + eps) - beta * D) / (r * r) if scale else f
    else:
        constant, grad_bias = None, torch.zeros_like(f)
    matrix = torch.stack((a, q), dim=1).unsqueeze(1)
    grad_x = mix([(grad, None), (x, shift)], matrix, constant, like=x)
    return grad_x, e / (kappa * r) if scale else torch.zeros_like(e), grad_bias
