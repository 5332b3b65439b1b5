"""whiten and stacked_mix as the paper writes them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.moments.reference import ROUNDOFF, gradients_like, rows_of


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Compute IterNorm, eq. 16, with the scale and shift of section 3.3."""
    d = W.shape[1]
    columns = (W @ (rows_of(x, d) - mean.view(-1, d, 1))).flatten(0, 1)
    if weight is not None:
        columns = weight.view(-1, 1) * columns
    if bias is not None:
        columns = columns + bias.view(-1, 1)
    return (columns.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1),)


def stacked_mix(
    grad: Tensor, x: Tensor, grad_mean: Tensor, mean: Tensor, matrix: Tensor, constant: Tensor
) -> tuple[Tensor, ...]:
    d = matrix.shape[1]
    (of_grad,), (of_x,) = (
        whiten(grad, grad_mean, matrix[..., :d], None, None),
        whiten(x, mean, matrix[..., d:], None, constant),
    )
    return (of_grad + of_x,)


def whiten_tolerance(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> float:
    """Return d + 4 roundoffs of the largest sum of magnitudes: d products, mean, scale, shift and result."""
    magnitudes = whiten(x.abs(), -mean.abs(), W.abs(), *(None if p is None else p.abs() for p in (weight, bias)))[0]
    y = whiten(x, mean, W, weight, bias)[0]
    return (W.shape[1] + 4) * float(magnitudes.max() / y.abs().max()) * ROUNDOFF


def stacked_mix_tolerance(*arguments: Tensor) -> float:
    """Return that of ``whiten`` for 2 d products and two means."""
    grad, x, grad_mean, mean, matrix, constant = (argument.abs() for argument in arguments)
    magnitudes = stacked_mix(grad, x, -grad_mean, -mean, matrix, constant)[0]
    return (2 * matrix.shape[1] + 4) * float(magnitudes.max() / stacked_mix(*arguments)[0].abs().max()) * ROUNDOFF


def whiten_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    mean, W = statistics(x, group_size)
    yield x, mean, W, *affine(x)
    yield x, mean, W, None, None


def stacked_mix_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    mean, W = statistics(x, group_size)
    for grad in gradients_like(x):
        yield grad, x, 0.5 * mean, mean, torch.cat((W.flip(2), W), 2), 0.25 * mean


def statistics(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return a mean and a whitening matrix for x."""
    mean, _, cov = torch.ops.normkernels.moments(x, group_size, False)
    return mean, torch.ops.normkernels.inverse_sqrt(cov, 5, 1e-3, False, False)[0]


def affine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias for x."""
    like: Any = {"dtype": x.dtype, "device": x.device}
    return torch.linspace(0.5, 1.5, x.shape[1], **like), torch.linspace(-1, 1, x.shape[1], **like)
