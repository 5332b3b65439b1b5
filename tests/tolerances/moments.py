"""Floors of mean and covariance, and of their gradients.

Derivation
    covariance  x - mean is exact up to the rounding of the mean: two-pass and shifted sums agree with it. A mean
                that is off by e = 2 u |x|_max shifts the covariance by e e^T, quadratically; so

                    |dSigma_ij| <= u (4 + sqrt(m)) sqrt(Sigma_ii Sigma_jj) + e^2

                sqrt(m) u is the probabilistic bound (Higham and Mary 2019) for a sum of m rounded terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.plain import stat_dtype
from tests.tolerances.common import largest, row_sum, unit


def mean_floor(x: Tensor) -> float:
    """Return u (2 + log2 m) |x|_max: pairwise summation, the division and the rounding of the result."""
    m = x.numel() // x.shape[1]
    return unit(stat_dtype(x.dtype)) * (2 + torch.tensor(float(max(m, 1))).log2().item()) * largest(x.double())


def cov_floor(x: Tensor, cov: Tensor) -> Tensor:
    """Return the floor of cov entry by entry, (G, d, d)."""
    u, m = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1]
    std = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    return u * (4 + m**0.5) * std[..., :, None] * std[..., None, :] + (2 * u * largest(x.double())) ** 2


def moments_gradient_floor(x: Tensor, dmean: Tensor, dcov: Tensor) -> float:
    """Return the floor of dx = dmean / m + (dcov + dcov^T) x_c / m.

    It is a product over d terms of x_c, which is good to e = 2 u |x|_max.
    """
    u, m, d = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1], dcov.shape[-1]
    centered = largest(x.double() - x.double().movedim(1, -1).flatten(0, -2).mean(0).view(-1, *[1] * (x.ndim - 2)))
    row = row_sum((dcov + dcov.mT).double())
    size = (row * centered + largest(dmean)) / m
    return u * (4 + d**0.5) * size + row * 2 * u * largest(x.double()) / m + unit(x.dtype) * size


def cross_floor(y: Tensor, x: Tensor, mean: Tensor) -> tuple[float, float]:
    """Return the floors of sum y (x - mean)^T and sum y.

    They are sqrt(m) u of the sum of absolute values, and 2 u |x| for each x - mean.
    """
    u, m = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1]
    sum_y = y.double().abs().movedim(1, 0).flatten(1).sum(1).max().item()
    size = largest(x.double()) + largest(mean)
    return u * (2 + m**0.5) * sum_y * size, u * (2 + m**0.5) * sum_y


def assert_within_remainder(mean: Tensor, remainder: Tensor, exact: Tensor, x: Tensor) -> None:
    """Check mean + remainder: a mean is the first tile's, plus one of differences to it, which float32 rounds.

    m differences, of no more than the range of x, are off by sqrt(m) u of it at most (Higham and Mary, 2019).
    """
    m, spread = x.numel() // x.shape[1], (x.double() - exact.view(1, -1, *[1] * (x.dim() - 2))).abs().max()
    error = (mean.double() + remainder.double() - exact).abs().max()
    assert error <= (4 + m**0.5) * unit(torch.float32) * spread, f"off by {error:.2g}"
