"""Floors of POP-Norm.

    r   the root of the second moment of x~ plus eps, a = gamma / (kappa r), y = a x~; |x~| its largest value
    e   2 u |x|_max, the rounding of the mean, which all of x - mean may be off by

    r       The second moment is a sum of m terms, relative to itself u (4 + sqrt(m)), and half of it for the root;
            a mean that is off by e changes it by e^2.
    y       a (x - mean + beta): the rounding of the difference, 2 u |x~| + e, and the relative error of a.
    dx      a dy - a f / m - a <dy, x~> (x - mean) / (m r^2): |<dy, x~>| <= m |dy| r, so the last term is at most
            a |dy| t with t = |x~| / r, the first two 2 a |dy|. Errors: those of a in all of them, of two sums of m
            terms, and of x~ in the sum and beside it: (e / r + 2 u t)(1 + t).
    dgamma  sum dy x~ / (kappa r).
    dbeta   a (f - beta <dy, x~> / r^2): sums of m terms, with |beta| <= r.

With running statistics r is theirs, and x - mean and beta, which are summed apart then, may cancel: |x - mean| +
|beta| takes the place of |x~|. dx is only a dy, and dbeta's <dy, x~> is at most |x~| sum |dy|: the bounds above hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles import popnorm
from tests.oracles.plain import stat_dtype
from tests.tolerances.common import largest, unit


def pop_norm_floors(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool,
    scale: bool, oracle: Sequence[Tensor | None], running: tuple[Tensor, Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Return the floors of y and the gradients of x, weight and bias, whose values ``oracle`` has.

    x is in the type of the test.

    running: mean and variance, in evaluation.
    """
    u = unit(stat_dtype(x.dtype))
    m, e = x.numel() // x.shape[1], 2 * u * largest(x.double())
    beta = torch.zeros(x.shape[1], dtype=torch.float64) if bias is None else bias.double()
    if running is None:
        rows = popnorm.pop_norm(x.double(), None, beta, 1.0, eps, center, False)[0].movedim(1, 0).flatten(1)
        second = rows.square().mean(1)
    else:
        mean, var = (value.double() for value in running)
        second = var + (beta if center else mean).square()
        rows = (x.double().movedim(1, 0).flatten(1) - mean[:, None] * center).abs() + beta.abs()[:, None]
    r = (second + eps).sqrt() if scale else torch.ones_like(second)
    peak, gamma = rows.abs().amax(1), torch.ones_like(r) if weight is None else weight.double().abs()
    a = gamma / (kappa * r) if scale else torch.ones_like(r)
    t = peak / r
    relative = u * (4 + m**0.5) + (e / r) ** 2
    of_x = e + 2 * u * peak
    sum_dy = dy.double().abs().movedim(1, 0).flatten(1).sum(1)
    floors = [
        a * (of_x + relative * peak),
        a * largest(dy.double()) * (2 * relative * (2 + t) + (of_x / r) * (1 + t)),
        sum_dy * (of_x + 2 * relative * peak) / (kappa * r),
        a * sum_dy * (2 * relative * (1 + t) + of_x / r),
    ]
    types = (x, x, weight, bias)
    return [
        floor.max().item() + (0.0 if exact is None or like is None else (unit(like.dtype) + u) * largest(exact))
        for floor, exact, like in zip(floors, oracle, types, strict=True)
    ]


def dbeta_error(x: Tensor, beta: float) -> float:
    """Return the error of dbeta relative to it, for a constant dy.

    dbeta has f sigma^2 - beta D, where D is zero but for its rounding.

    D is a sum of m terms of size sigma, off by u (4 + sqrt(m)) m sigma; relative to f sigma^2 = m sigma^2 that is
    beta / sigma times u (4 + sqrt(m)), of the deviation of the channel that has the smallest. The variance has u
    (4 + sqrt(m)), the other factors 8 u.
    """
    m = x.numel() // x.shape[1]
    sigma = x.double().movedim(1, 0).flatten(1).std(1, unbiased=False).min().item()
    return unit(stat_dtype(x.dtype)) * (8 + (4 + m**0.5) * (1 + beta / sigma))
