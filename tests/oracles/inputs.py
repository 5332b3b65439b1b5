"""Inputs of known spectrum, mean and scale, and the same values in every memory layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Shapes (N, C, ...) for the three ranks a layer takes, with 8 channels and odd lengths, so that no tile divides them.
SHAPE_2D = (37, 8)
SHAPE_3D = (6, 8, 11)
SHAPE_4D = (6, 8, 5, 3)
SHAPE_5D = (4, 8, 3, 2, 3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(d: int, seed: int = 0) -> Tensor:
    """Draw a random orthogonal matrix (d, d), float64."""
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator(seed)))[0]


def covariance(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix (d, d) with these eigenvalues, exactly symmetric, float64."""
    q = rotation(len(eigenvalues), seed)
    cov = q @ (eigenvalues.double()[:, None] * q.T)
    return (cov + cov.T) / 2


def spectrum(d: int, condition: float) -> Tensor:
    """Return d eigenvalues from 1 down to 1 / condition, evenly spaced in their logarithm."""
    return torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64)


def gaussian(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    group_size: int = 8,
    condition: float = 3.0,
    mean: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Draw x (N, C, ...) whose groups have a covariance of this condition; mean and scale are in x's own units.

    The default mean is one standard deviation: a missing centering changes every digit.
    """
    channels = shape[1]
    d = min(group_size, channels)
    z = torch.randn(channels // d, d, shape[0] * max(1, torch.Size(shape[2:]).numel()),
                    dtype=torch.float64, generator=generator(seed))  # fmt: skip
    mix = torch.stack([covariance(spectrum(d, condition).sqrt(), seed + i) for i in range(channels // d)])
    x = scale * (mix @ z) + mean
    return x.reshape(channels, shape[0], *shape[2:]).movedim(0, 1).contiguous().to(dtype)


def _inside(values: Tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
    """Return a view with these values into a larger tensor that is NaN elsewhere: reading outside the view shows."""
    big = torch.full(shape, float("nan"), dtype=values.dtype)
    view = big[index]
    view.copy_(values)
    return view


def _samples_strided(v: Tensor) -> Tensor:
    return _inside(v, (2 * v.shape[0], *v.shape[1:]), (slice(None, None, 2),))


def _channels_sliced(v: Tensor) -> Tensor:
    return _inside(v, (v.shape[0], v.shape[1] + 5, *v.shape[2:]), (slice(None), slice(2, 2 + v.shape[1])))


def _channels_strided(v: Tensor) -> Tensor:
    return _inside(v, (v.shape[0], 2 * v.shape[1], *v.shape[2:]), (slice(None), slice(1, None, 2)))


def _cropped(v: Tensor) -> Tensor:
    shape = (*v.shape[:-1], v.shape[-1] + 3)
    return _inside(v, shape, (*[slice(None)] * (v.ndim - 1), slice(1, 1 + v.shape[-1])))


def _channels_innermost(v: Tensor) -> Tensor:
    """Lay v out with the strides of channels_last, for any rank."""
    return v.movedim(1, -1).contiguous().movedim(-1, 1)


def _samples_innermost(v: Tensor) -> Tensor:
    """Lay v out as a (C, ..., N) tensor: neither NCHW nor channels_last, but dense."""
    return v.movedim(0, -1).contiguous().movedim(-1, 0)


def _nhwc_slice(v: Tensor) -> Tensor:
    """Lay v out with channels innermost, where each position holds more channels than are looked at."""
    big = torch.full((v.shape[0], *v.shape[2:], v.shape[1] + 5), float("nan"), dtype=v.dtype)
    view = big[..., 2 : 2 + v.shape[1]].movedim(-1, 1)
    view.copy_(v)
    return view


def _offset(v: Tensor) -> Tensor:
    """Lay v out contiguous, but one element into its storage, so that it is not aligned."""
    return _inside(v.reshape(-1), (v.numel() + 1,), (slice(1, None),)).view(v.shape)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "NC": (SHAPE_2D, torch.Tensor.contiguous),
    "NC-transposed": (SHAPE_2D, _samples_innermost),
    "NC-every-other-sample": (SHAPE_2D, _samples_strided),
    "NC-channel-slice": (SHAPE_2D, _channels_sliced),
    "NCL": (SHAPE_3D, torch.Tensor.contiguous),
    "NLC": (SHAPE_3D, _channels_innermost),
    "NLC-channel-slice": (SHAPE_3D, _nhwc_slice),
    "NCHW": (SHAPE_4D, torch.Tensor.contiguous),
    "NCHW-unaligned": (SHAPE_4D, _offset),
    "NHWC": (SHAPE_4D, lambda v: v.contiguous(memory_format=torch.channels_last)),
    "NHWC-channel-slice": (SHAPE_4D, _nhwc_slice),
    "CHWN": (SHAPE_4D, _samples_innermost),
    "NCHW-every-other-sample": (SHAPE_4D, _samples_strided),
    "NCHW-channel-slice": (SHAPE_4D, _channels_sliced),
    "NCHW-every-other-channel": (SHAPE_4D, _channels_strided),
    "NCHW-cropped": (SHAPE_4D, _cropped),
    "NCDHW": (SHAPE_5D, torch.Tensor.contiguous),
    "NDHWC": (SHAPE_5D, lambda v: v.contiguous(memory_format=torch.channels_last_3d)),
    "NCHW-one-sample": ((1, 8, 7, 5), torch.Tensor.contiguous),
    "NCHW-1x1": ((35, 8, 1, 1), torch.Tensor.contiguous),
    "NHWC-1x1": ((35, 8, 1, 1), lambda v: v.contiguous(memory_format=torch.channels_last)),
}
"""Name -> (shape, function that lays values of that shape out). 1x1 planes and one sample have ambiguous strides."""
