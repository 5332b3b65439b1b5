"""spectral_filter in operators that ONNX has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normkernels.primitives.kernel_spectrum.eager import Waves
from normkernels.primitives.spectral_filter import eager

CPU = torch.device("cpu")


def spectral_filter(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Return H (v H z) / (h w) with the two-dimensional Hartley transform H, which diagonalizes even filters.

    The real part of the result depends only on the filter's even part. Rejected: the blocks of eager.py. They
    take half the products, but depend on whether lengths are even, and here lengths may be unknown.
    """
    h, w = v.shape[1:]
    rows, columns = (*source[:2], z.shape[2]), (*source[2:], z.shape[3])
    Z = hartley(z.to(v.dtype), waves(h, rows), waves(w, columns))
    even = 0.5 * (v + eager.negated(eager.negated(v, 1), 2)) / (h * w)
    (cos_h, sin_h), (cos_w, sin_w) = waves(h, target[:3]), waves(w, target[3:])
    return hartley(Z * even, (cos_h.T, sin_h.T), (cos_w.T, sin_w.T)).to(z.dtype)


def waves(n: int, window: eager.Window, dilation: int = 1, device: torch.device = CPU) -> Waves:
    """Return cos and sin of 2 pi u t / n for frequencies u, dilated positions t of a window: (n, count), float64.

    They are made on the CPU: not every device has float64, and in the exported graph there are no devices.
    """
    start, step, count = window
    position = (torch.arange(count, dtype=torch.float64, device=CPU) * step + start) * dilation
    angle = torch.outer(torch.arange(n, dtype=torch.float64, device=CPU), position)
    angle = angle.remainder(n) * (2 * math.pi / n)
    return angle.cos().to(device), angle.sin().to(device)


def hartley(z: Tensor, rows: Waves, columns: Waves) -> Tensor:
    """Return the sum of z(s, t) (cos + sin)(u s + w t): cos u s (cos + sin)(w t) + sin u s (cos - sin)(w t)."""
    (cos_h, sin_h), (cos_w, sin_w) = rows, columns
    plus, minus, cos_h, sin_h = (
        wave.to(z.dtype).to(z.device) for wave in ((cos_w + sin_w).T, (cos_w - sin_w).T, cos_h, sin_h)
    )
    return cos_h @ (z @ plus) + sin_h @ (z @ minus)
