"""The plain PyTorch path: what somebody would write with autograd, in the input's type.

Two-pass mean and covariance, one centered copy, Newton's iteration (or eigh) differentiated by autograd. Half types
are computed in float32, as any careful user would. The tolerance rule allows twice its error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dbn, iternorm


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_sqrt(
    cov: Tensor, num_iterations: int, eps: float, scaling: str = "trace", method: str = "newton"
) -> Tensor:
    """Return W, for autograd through eq. 14, 15 and 17, or through eigh, in cov's type."""
    sigma = iternorm.add_eps(cov, eps)
    if method == "eigh":
        return dbn.zca(sigma)
    t = iternorm.size(sigma, scaling)
    return iternorm.newton(sigma / t, num_iterations) / t.sqrt()


def whiten(x: Tensor, mean: Tensor, w: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return weight * (W (x - mean)) + bias, computed in the type of the statistics, in x's type."""
    dtype = stat_dtype(x.dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return iternorm.whiten(x.to(dtype), mean.to(dtype), w.to(dtype), weight, bias).to(x.dtype)


def iter_norm(
    x: Tensor,
    group_size: int,
    num_iterations: int,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: str = "trace",
    method: str = "newton",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in x's type, mean (C,) and W (G, d, d) in the type of the statistics."""
    mean, cov = iternorm.moments(x.to(stat_dtype(x.dtype)), group_size)
    w = inverse_sqrt(cov, num_iterations, eps, scaling, method)
    return whiten(x, mean, w, weight, bias), mean, w
