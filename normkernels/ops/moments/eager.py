"""Plain PyTorch implementation of the reductions. Views (N, G, d, L) of the data come from _tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from normkernels.ops._checks import statistics_dtype
from normkernels.ops._products import products
from normkernels.ops._tiles import Scratch, as_groups, tiles


def shifted_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (G, d) in float64 and biased covariance (G, d, d) of x (N, G, d, L), in one pass.

    Sums are taken of x - s, with s the mean of the first tile, and corrected once at the end:
    mean = s + delta and cov = sum (x - s)(x - s)^T / m - delta delta^T, with delta = sum (x - s) / m.
    Nothing cancels: |delta|^2 is at most the variance times the number of tiles, however large the mean is.
    """
    n, g, d, positions = x.shape
    dtype = statistics_dtype(x.dtype)
    gram = torch.zeros(g, d, d, dtype=dtype, device=x.device)
    total = torch.zeros(g, d, dtype=torch.float64, device=x.device)
    m = n * positions
    if m == 0:  # the neutral element when moments are merged over processes
        return total, gram
    shift = None
    scratch = Scratch(x, dtype)
    for samples, at in tiles(x):
        tile = x[samples, :, :, at]
        if shift is None:
            shift = tile.mean((0, 3), dtype=dtype)
        centred = scratch.fill((tile, shift))
        total += centred.sum(-1)
        for groups, product in products(centred, centred.mT):
            gram[groups] += product
    assert shift is not None
    delta = total / m
    cov = gram.double() / m - delta.unsqueeze(-1) * delta.unsqueeze(-2)
    return shift + delta, (0.5 * (cov + cov.mT)).to(dtype)


def summed_products(y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum y (x - mean)^T (G, d, d), sum y (G, d) and sum (x - mean) (G, d), in one pass over both.

    The last one is zero but for the rounding of ``mean``; the fused backward corrects with it.
    """
    _, g, d, _ = x.shape
    dtype = mean.dtype
    cross = torch.zeros(g, d, d, dtype=dtype, device=x.device)
    sum_y = torch.zeros(g, d, dtype=torch.float64, device=x.device)
    sum_x = torch.zeros_like(sum_y)
    scratch_y, scratch_x = Scratch(x, dtype, slot=0), Scratch(x, dtype, slot=1)
    for samples, at in tiles(x):
        left = scratch_y.fill((y[samples, :, :, at], None))
        right = scratch_x.fill((x[samples, :, :, at], mean))
        sum_y += left.sum(-1)
        sum_x += right.sum(-1)
        for groups, product in products(left, right.mT):
            cross[groups] += product
    return cross, sum_y, sum_x


def moments(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    mean, cov = shifted_moments(as_groups(x, group_size))
    return mean.flatten().to(cov.dtype), cov


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    cross, sum_y, _ = summed_products(as_groups(y, group_size), as_groups(x, group_size), mean.view(-1, group_size))
    return cross, sum_y.flatten().to(mean.dtype)
