"""pop_norm and its backward as the paper writes them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.moments.reference import gradients_like, rows_of, tolerance
from normkernels.primitives.whiten.reference import affine

__all__ = ["backward_samples", "pop_norm", "pop_norm_backward", "samples", "tolerance"]


def pop_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kappa: float,
    eps: float,
    center: bool,
    scale: bool,
) -> tuple[Tensor, ...]:
    """Compute POP-Norm, eq. 11, 12, 18 and 19."""
    rows = rows_of(x, 1)
    mean = rows.mean(2, keepdim=True)
    y = rows - mean if center else rows
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if scale:
        y = y / (kappa * (y.square().mean(2, keepdim=True) + eps).sqrt())
    if weight is not None:
        y = weight.view(-1, 1, 1) * y
    y = y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    return y, mean.flatten(), (rows - mean).square().mean(2).flatten()


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
) -> tuple[Tensor | None, ...]:
    """Differentiate the equations in x, weight and bias, as far as the options have these."""
    leaves = x.clone(), torch.ones_like(mean), torch.zeros_like(mean)
    x, gamma, beta = (leaf.requires_grad_() for leaf in leaves)
    if weight is not None:
        gamma = weight.clone().requires_grad_()
    if bias is not None:
        beta = bias.clone().requires_grad_()
    y = pop_norm(x, gamma if scale else None, beta if center else None, kappa, eps, center, scale)[0]
    return torch.autograd.grad(y, (x, gamma, beta), grad, allow_unused=True)


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    weight, bias = affine(x)
    for center, scale in ((True, True), (True, False), (False, True)):
        yield x, weight if scale else None, bias if center else None, 4.0, 1e-3, center, scale
    yield x, None, None, 4.0, 1e-3, True, True


def backward_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for arguments in samples(x, group_size):
        _, mean, var = torch.ops.normkernels.pop_norm(*arguments)
        for grad in gradients_like(x):
            yield grad, *arguments[:3], mean, var, *arguments[3:]
