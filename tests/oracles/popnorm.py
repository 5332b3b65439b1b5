"""POP-Norm: equations 11 and 12, and 18 and 19 for convolutions.

They are from "POP-Norm: A Theoretically Justified and More Accelerated Normalization Approach". eps under the root is
BatchNorm's; the paper has none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of x (N, C, ...), over samples and positions."""
    rows = x.movedim(1, 0).flatten(1)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().mean(1)


def channelwise(v: Tensor, x: Tensor) -> Tensor:
    """Return v (C,) in a shape that broadcasts with x (N, C, ...)."""
    return v.view(-1, *[1] * (x.ndim - 2))


def pop_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kappa: float = 4.0,
    eps: float = 1e-5,
    center: bool = True,
    scale: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and variance, in x's type."""
    mean, var = statistics(x)
    x_tilde = x
    if center:  # eq. 11
        x_tilde = x - channelwise(mean, x)
        if bias is not None:
            x_tilde = x_tilde + channelwise(bias, x)
    if not scale:
        return x_tilde, mean, var
    rms = (x_tilde.movedim(1, 0).flatten(1).square().mean(1) + eps).sqrt()  # eq. 12
    y = x_tilde / (kappa * channelwise(rms, x))
    return (y if weight is None else y * channelwise(weight, x)), mean, var


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float,
    center: bool, scale: bool,
) -> Tensor:  # fmt: skip
    """Return y with a mean and a variance from elsewhere.

    For an x that has them, x~ has the mean square var + (mean of x~)^2.
    """
    shift = torch.zeros_like(mean) if not center else mean if bias is None else mean - bias
    x_tilde = x - channelwise(shift, x)
    if not scale:
        return x_tilde
    y = x_tilde / (kappa * channelwise((var + (mean - shift).square() + eps).sqrt(), x))
    return y if weight is None else y * channelwise(weight, x)


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same in the type of the statistics, y in x's type: what somebody would write with autograd."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    y, mean, var = pop_norm(x.to(dtype), weight, bias, *options)  # type: ignore[arg-type]
    return y.to(x.dtype), mean, var
