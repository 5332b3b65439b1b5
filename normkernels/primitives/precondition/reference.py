"""precondition as the paper writes it, for float64, and samples of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import statistics_dtype
from normkernels.primitives.moments.reference import ROUNDOFF


def precondition(weight_grads: Sequence[Tensor], bias_grads: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    """Compute BNP, Algorithm 3, steps 3 to 5: no row is left, then the new gradients of all weights and biases."""
    *layers, eps1, eps2 = options
    weights, biases = [], []
    for Gw, Gb, mean, var, count, square in zip(weight_grads, bias_grads, *layers, strict=True):
        outputs = Gw.shape[0] // count
        mu, sigma2 = (
            value.view(count, 1, -1).expand(-1, outputs, -1).reshape(*Gw.shape[:2], *[1] * (Gw.dim() - 2))
            for value in (mean, var)
        )
        largest = var.view(count, -1).amax(1).repeat_interleave(outputs).view(-1, *[1] * (Gw.dim() - 1))
        bias = Gb if Gb.numel() else Gw.new_zeros(Gw.shape[0])
        of_bias = mu * bias.view(-1, *[1] * (Gw.dim() - 1)) if Gb.numel() else 0.0
        new = (Gw - of_bias) / (square * (sigma2 + eps1 * largest + eps2))
        weights.append(new)
        biases.append(Gb / square - (mu * new).flatten(1).sum(1) if Gb.numel() else Gb)
    return torch.zeros(len(weight_grads)), *weights, *biases


def tolerance(weight_grads: Sequence[Tensor], *_: Any) -> float:
    """Return as many roundoffs as the longest row has weights."""
    return max(Gw[0].numel() for Gw in weight_grads) * ROUNDOFF


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    """Yield two layers, whose weights have x's shape: a dense one, and one of groups that has no bias."""
    outputs, channels = x.shape[:2]
    groups = next(count for count in range(min(outputs, 3), 0, -1) if outputs % count == 0)
    like: Any = {"dtype": statistics_dtype(x.dtype), "device": x.device}
    means = [torch.linspace(-1, 1, channels * count, **like) for count in (1, groups)]
    variances = [torch.linspace(0.5, 2, channels * count, **like) for count in (1, groups)]
    biases = [torch.linspace(-1, 1, outputs, dtype=x.dtype, device=x.device), x.new_empty(0)]
    yield [x.clone(), x.flip(0)], biases, means, variances, [1, groups], [1.0, 1.5], 1e-2, 1e-4
