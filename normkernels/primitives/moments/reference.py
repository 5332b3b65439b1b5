"""moments and cross_moments as the paper writes them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROUNDOFF = 2.0**-24  # float32, round to nearest


def rows_of(x: Tensor, group_size: int) -> Tensor:
    """Return x (N, C, *) as (G, d, m)."""
    return x.transpose(0, 1).reshape(-1, group_size, x.numel() // x.shape[1])


def gradients_like(x: Tensor) -> Iterator[Tensor]:
    """Yield gradients of an output like x: one in its layout, and one that is expanded over its positions, if any."""
    dense = torch.empty_like(x).copy_(0.5 * x - 0.25 * x.flip(1))
    yield dense
    yield (dense.flatten(2)[..., :1] if x.dim() > 2 else dense).view(*x.shape[:2], *[1] * (x.dim() - 2)).expand(x.shape)


def moments(x: Tensor, group_size: int, exact: bool) -> tuple[Tensor | None, ...]:
    """Compute IterNorm, eq. 11 to 13, without eps I. The paper has no remainder of the mean."""
    rows = rows_of(x, group_size)
    mean = rows.mean(2)
    centred = rows - mean.unsqueeze(2)
    return mean.flatten(), None, centred @ centred.mT / rows.shape[2]


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, ...]:
    """Compute the sums of IterNorm, eq. 21 and Algorithm 2, step 5."""
    rows, centred = rows_of(y, group_size), rows_of(x, group_size) - mean.view(-1, group_size, 1)
    return rows @ centred.mT, rows.sum(2).flatten()


def tolerance(x: Tensor) -> float:
    """Return m roundoffs: a float32 sum of m products is off by at most that much of the sum of their magnitudes."""
    return x.numel() // x.shape[1] * ROUNDOFF


def moments_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for exact in (False, True):
        yield x, group_size, exact


def cross_moments_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    mean, _, _ = torch.ops.normkernels.moments(x, group_size, False)
    for y in gradients_like(x):
        yield y, x, mean, group_size
