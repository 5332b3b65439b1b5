"""spectral_filter and cross_spectrum as the paper writes them, for float64, and samples of their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels.primitives.moments.reference import ROUNDOFF


def positions(rows: Sequence[int], columns: Sequence[int]) -> Any:
    """Return the index of windows (start, step, count) in planes."""
    return (..., *(slice(start, start + step * count, step) for start, step, count in (rows, columns)))


def on_plane(z: Tensor, window: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return z at its window of planes of zeros; window: start and step of rows, then of columns."""
    plane = z.new_zeros((*z.shape[:2], *size))
    plane[positions((*window[:2], z.shape[2]), (*window[2:], z.shape[3]))] = z
    return plane


def spectral_filter(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> tuple[Tensor, ...]:
    """Compute ConvNorm, eq. 7."""
    y = torch.fft.ifft2(torch.fft.fft2(on_plane(z, source, v.shape[1:])) * v).real
    return (y[positions(target[:3], target[3:])],)


def cross_spectrum(
    y: Tensor, z: Tensor, size: Sequence[int], of_y: Sequence[int], of_z: Sequence[int]
) -> tuple[Tensor, ...]:
    """Compute the gradient of the filter in v."""
    Y, Z = torch.fft.fft2(on_plane(y, of_y, size)), torch.fft.fft2(on_plane(z, of_z, size))
    return ((Y.conj() * Z).real.sum(0) / (size[0] * size[1]),)


def transform_error(size: Sequence[int]) -> float:
    """Return 4 (H + W) roundoffs.

    A transform adds up at most a row and a column, and there are two transforms: 2 (H + W) roundoffs of the largest
    number, and as many for the products between them.
    """
    return 4 * sum(size) * ROUNDOFF


def tolerance(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> float:
    """Return the error of the transforms, which is relative to the largest v times the largest z."""
    scale = float(v.max() * z.abs().max() / spectral_filter(z, v, source, target)[0].abs().max())
    return transform_error(v.shape[1:]) * max(1.0, scale)


def samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    """Yield x as planes, all of them and with a window that leaves out a border and every other column."""
    z = x if x.dim() == 4 else x.flatten(2).unsqueeze(2) if x.dim() > 2 else x[..., None, None]
    h, w = max(z.shape[2], 3), max(z.shape[3], 3)
    channels = z.shape[1]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    v = torch.linspace(0.25, 2, channels * h * w, dtype=dtype, device=z.device).view(channels, h, w)
    for target in ([1, 1, h - 1, 0, 2, (w + 1) // 2], [0, 1, h, 0, 1, w]):
        yield z, v, [0, 1, 0, 1], target


def cross_samples(x: Tensor, group_size: int) -> Iterator[tuple[Any, ...]]:
    for z, v, source, target in samples(x, group_size):
        y = torch.ops.normkernels.spectral_filter(z, v, source, target)
        yield y, z, list(v.shape[1:]), [*target[:2], *target[3:5]], source
