"""Evaluation in operators that ONNX has: torch.onnx.export traces these functions instead of the opaque ops.

Rejected: these functions in torch._decomp's table, where torch's exporter looks, too. With an entry there Inductor
refuses an op wherever the environment has CI set, and its fake with symbolic sizes is no longer the op's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normkernels._torch import constant
from normkernels.ops._checks import statistics_dtype
from normkernels.ops._devices import in_float64
from normkernels.ops.spectral import eager as spectral
from normkernels.ops.whiten.eager import affine

CPU = torch.device("cpu")


@constant  # while Dynamo traces, with which torch.onnx.export tries a second time, the answer would be no
def exporting() -> bool:
    """Return whether torch.onnx.export traces. The first test costs 20 ns, the second a microsecond."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def check_running_statistics() -> None:
    """Raise in an export: functions that use a batch's statistics call this. Exports of them would fail later."""
    if exporting():
        raise ValueError(
            "torch.onnx.export: expected layers in evaluation mode with running statistics, got one that uses the "
            "batch's; call model.eval(), and leave track_running_stats=True"
        )


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return A (x - mean) + beta. x is centred first, whatever the mean: A x + (c - A mean) may lose digits."""
    A = affine(W, weight)
    groups, d, _ = A.shape
    per_channel = (-1, *[1] * (x.dim() - 2))
    y = x.to(A.dtype) - mean.view(per_channel)
    y = y * A.view(per_channel) if d == 1 else (A @ y.reshape(x.shape[0], groups, d, -1)).reshape(x.shape)
    return (y if bias is None else y + bias.to(A.dtype).view(per_channel)).to(x.dtype)


def kernel_spectrum(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Tensor:
    dtype, exact = statistics_dtype(weight.dtype), in_float64(weight)
    rows, columns = (
        waves(n, (1 - k, 1, 2 * k - 1), step, exact.device)
        for n, k, step in zip(size, weight.shape[2:], dilation, strict=True)
    )
    return spectral.spectrum(exact, (rows, columns), eps).clamp(max=torch.finfo(dtype).max).to(dtype).to(weight.device)


def spectral_filter(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Return H (v H z) / (h w) with the two-dimensional Hartley transform H, which diagonalizes even filters.

    The real part of the result depends only on the filter's even part. Rejected: the blocks of spectral/eager.py. They
    take half the products, but depend on whether lengths are even, and here lengths may be unknown.
    """
    h, w = v.shape[1:]
    rows, columns = (*source[:2], z.shape[2]), (*source[2:], z.shape[3])
    Z = hartley(z.to(v.dtype), waves(h, rows), waves(w, columns))
    even = 0.5 * (v + spectral.negated(spectral.negated(v, 1), 2)) / (h * w)
    (cos_h, sin_h), (cos_w, sin_w) = waves(h, target[:3]), waves(w, target[3:])
    return hartley(Z * even, (cos_h.T, sin_h.T), (cos_w.T, sin_w.T)).to(z.dtype)


def waves(n: int, window: spectral.Window, dilation: int = 1, device: torch.device = CPU) -> spectral.Waves:
    """Return cos and sin of 2 pi u t / n for frequencies u, dilated positions t of a window: (n, count), float64.

    They are made on the CPU: not every device has float64, and in the exported graph there are no devices.
    """
    start, step, count = window
    position = (torch.arange(count, dtype=torch.float64, device=CPU) * step + start) * dilation
    angle = torch.outer(torch.arange(n, dtype=torch.float64, device=CPU), position)
    angle = angle.remainder(n) * (2 * math.pi / n)
    return angle.cos().to(device), angle.sin().to(device)


def hartley(z: Tensor, rows: spectral.Waves, columns: spectral.Waves) -> Tensor:
    """Return the sum of z(s, t) (cos + sin)(u s + w t): cos u s (cos + sin)(w t) + sin u s (cos - sin)(w t)."""
    (cos_h, sin_h), (cos_w, sin_w) = rows, columns
    plus, minus, cos_h, sin_h = (
        wave.to(z.dtype).to(z.device) for wave in ((cos_w + sin_w).T, (cos_w - sin_w).T, cos_h, sin_h)
    )
    return cos_h @ (z @ plus) + sin_h @ (z @ minus)
