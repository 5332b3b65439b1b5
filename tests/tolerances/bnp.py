"""Floors of BNP: of preconditioned gradients, and of statistics that are merged.

Gw  (Gw - mu Gb) / (q2 v~): seven roundings (v~ has three operations, q2 v~ and its reciprocal two, difference and
    product one each) of the terms' sizes, 8 u (|Gw| + |mu Gb|) / (q2 v~), and the rounding of the result.
Gb  Gb / q2 - sum of n = I k terms mu Gw: each has the error of Gw and one more product, and sums of n terms in
    any order u (4 + sqrt(n)); the rounding of the result.
Results below the smallest normal number are rounded to multiples of 2 u times that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.plain import stat_dtype
from tests.tolerances.common import largest, unit
from tests.tolerances.moments import cov_floor, mean_floor


def precondition_floors(
    Gw: Tensor, Gb: Tensor | None, mean: Tensor, var: Tensor, q2: float, exact_w: Tensor, exact_b: Tensor | None,
    eps1: float = 1e-2, eps2: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the floors entry by entry; Gw, Gb are in the type of the test, exact_w, exact_b the oracle's results."""
    u, n, groups = unit(stat_dtype(Gw.dtype)), Gw[0].numel(), len(mean) // Gw.shape[1]
    var, mean = (value.double().view(groups, -1) for value in (var, mean))
    factor = 1 / (q2 * (var + eps1 * var.amax(1, keepdim=True) + eps2))
    one = [1] * (Gw.dim() - 2)
    factor, mu = (
        value.repeat_interleave(len(Gw) // groups, 0).view(*Gw.shape[:2], *one) for value in (factor, mean.abs())
    )
    taken = 0.0 if Gb is None else mu * Gb.double().abs().view(-1, 1, *one)
    floor_w = 8 * u * (Gw.double().abs() + taken) * factor
    u_out, smallest = unit(Gw.dtype), torch.finfo(Gw.dtype).smallest_normal
    rounded_w = floor_w + u_out * exact_w.abs().clamp(min=smallest)
    if Gb is None or exact_b is None:
        return rounded_w, None
    terms = (mu * (floor_w / u * (1 + n**0.5 / 4) + 2 * exact_w.abs())).flatten(1).sum(1)
    floor_b = u * (terms + 4 * Gb.double().abs() / q2 + exact_b.abs())
    return rounded_w, floor_b + u_out * exact_b.abs().clamp(min=smallest)


def merged_floors(x: Tensor, var: Tensor, merges: int) -> tuple[float, Tensor]:
    """Return the floors of mean, and variance of each channel, of x merged so often by Chan's formula.

    x is in the type of the test.

    Each merge rounds the mean, e = 2 u |x|_max. Two means that are off by e make their difference delta off by 2 e, and
    t (1 - t) delta^2, which is at most the variance, by 4 e sqrt(t (1 - t) var) <= 2 e sqrt(var).
    """
    e = 2 * unit(stat_dtype(x.dtype)) * largest(x.double())
    cov = cov_floor(x, var.view(-1, 1, 1)).flatten()
    return mean_floor(x) + merges * e, cov + merges * (2 * e * var.sqrt() + e**2)
