"""kernel_spectrum and its backward as the paper writes them, for float64, and samples of their arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels.eager.devices import has_float64
from normkernels.primitives.moments.reference import ROUNDOFF


def kernel_spectrum(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> tuple[Tensor, ...]:
    """Compute ConvNorm, Algorithm 1 and eq. 6, with eps relative to the mean power."""
    dilated = weight.new_zeros((*weight.shape[:2], *size))
    rows, columns = (slice(0, step * k, step) for step, k in zip(dilation, weight.shape[2:], strict=True))
    dilated[..., rows, columns] = weight
    power = torch.fft.fft2(dilated).abs().square().sum(1)
    return ((power + eps * power.mean((1, 2), keepdim=True)).rsqrt(),)


def kernel_spectrum_backward(grad: Tensor, weight: Tensor, eps: float, dilation: Sequence[int]) -> tuple[Tensor, ...]:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(kernel_spectrum(leaf, grad.shape[1:], eps, dilation)[0], leaf, grad)


def tolerance(device: torch.device) -> float:
    """Return 2 roundoffs: a spectrum is accumulated in float64 and rounded once.

    Without float64 the inverse root is taken in float32, which costs 3.5 roundoffs more.
    """
    return (2 if has_float64(device) else 5.5) * ROUNDOFF


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    """Yield kernels of group_size inputs for each of x's channels: 3 x 2 taps, dilated ones, and 7 x 7 if these fit."""
    h, w = (1, 1, *x.shape[2:])[-2:]
    for taps, size, dilation in (
        ((3, 2), [max(h, 3), max(w, 2)], [1, 1]),
        ((3, 2), [max(h, 3), max(w, 3)], [1, 2]),
        ((7, 7), [h, w], [1, 1]),
    ):
        if taps[0] <= size[0] and taps[1] <= size[1]:
            shape = (x.shape[1], group_size, *taps)
            weight = torch.linspace(-3, 3, math.prod(shape), dtype=x.dtype, device=x.device).sin().view(shape)
            yield weight, size, 1e-3, dilation


def backward_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for weight, size, eps, dilation in samples(x, group_size):
        v = torch.ops.normkernels.kernel_spectrum(weight, size, eps, dilation)
        yield v - 0.5 * v.flip(1), weight, eps, dilation
