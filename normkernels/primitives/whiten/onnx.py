"""whiten in operators that ONNX has."""

from __future__ import annotations

from torch import Tensor

from normkernels.primitives.whiten.eager import affine


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return A (x - mean) + beta. x is centred first, whatever the mean: A x + (c - A mean) may lose digits."""
    A = affine(W, weight)
    groups, d, _ = A.shape
    per_channel = (-1, *[1] * (x.dim() - 2))
    y = x.to(A.dtype) - mean.view(per_channel)
    y = y * A.view(per_channel) if d == 1 else (A @ y.reshape(x.shape[0], groups, d, -1)).reshape(x.shape)
    return (y if bias is None else y + bias.to(A.dtype).view(per_channel)).to(x.dtype)
