"""ConvNorm: equations 6 to 8, Algorithm 1 and appendix B of "Convolutional Normalization", in one or two dimensions.

Letters: C_O, C_I output and input channels, k kernel size, n plane size, p padding, R = dilation (k - 1) the kernel's
reach. A plane is (H, W), or (L,) in one dimension.

Everything follows the type of its arguments. In float64 this is the oracle; in another type it is the plain PyTorch
path of the tolerance rule: half types convolve as they are, while the spectrum and the filter are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import stat_dtype


@dataclass(frozen=True)
class Config:
    """Options of nn.Conv2d besides channels and kernel, eps, and whether the gradient stops at the spectrum."""

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding_mode: str = "zeros"
    eps: float = 1e-8
    detach_spectrum: bool = True


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def spatial(t: Tensor) -> tuple[int, ...]:
    """Return the dimensions behind the first two."""
    return tuple(range(2, t.ndim))


# Spectrum and filter.


def embed(weight: Tensor, size: Sequence[int], dilation: int | Sequence[int] = 1) -> Tensor:
    """Put weight (C_O, C_I, *k), its taps dilation apart, in a corner of planes of zeros (C_O, C_I, *size)."""
    planes = weight.new_zeros(*weight.shape[:2], *size)
    steps = zip(weight.shape[2:], per_axis(dilation, len(size)), strict=True)
    taps = tuple(slice(0, d * (k - 1) + 1, d) for k, d in steps)
    planes[(slice(None), slice(None), *taps)] = weight
    return planes


def power(weight: Tensor, size: Sequence[int], dilation: int | Sequence[int] = 1) -> Tensor:
    """Return sum_i |a^_ki|^2 by an FFT of every padded kernel, (C_O, *size)."""
    a_hat = torch.fft.fftn(embed(weight, size, dilation), dim=spatial(weight))
    return (a_hat.real**2 + a_hat.imag**2).sum(1)


def mean_power(weight: Tensor) -> Tensor:
    """Return E_k (C_O, 1...), the sum of the squared taps.

    By Parseval it is the mean of sum_i |a^_ki|^2 over all frequencies.
    """
    return weight.square().sum(tuple(range(1, weight.ndim))).view(-1, *[1] * (weight.ndim - 2))


def kernel_spectrum(
    weight: Tensor, size: Sequence[int], eps: float = 1e-8, dilation: int | Sequence[int] = 1
) -> Tensor:
    """Return v^ of Algorithm 1 with eps relative to the channel's mean power, (C_O, *size); 1 for zeros."""
    e = mean_power(weight)
    v = torch.where(e == 0, 1, power(weight, size, dilation) + eps * e) ** -0.5
    return torch.where(e == 0, 1, v)


def spectral_filter(z: Tensor, v: Tensor) -> Tensor:
    """Return the real part of IFFT(FFT(z) v) of Algorithm 1, for z (N, C, *size) and v (C, *size)."""
    dims = spatial(z)
    return torch.fft.ifftn(torch.fft.fftn(z, dim=dims) * v, dim=dims).real


# The layer: appendix B.2 to B.5.


def padding_of(config: Config, kernel_size: Sequence[int]) -> list[tuple[int, int]]:
    """Return (before, after) for each axis.

    'same' keeps the plane's size; an odd total leaves the larger part behind.
    """
    if config.padding == "valid":
        return [(0, 0)] * len(kernel_size)
    if config.padding == "same":
        dilation = per_axis(config.dilation, len(kernel_size))
        reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    assert not isinstance(config.padding, str)
    return [(p, p) for p in per_axis(config.padding, len(kernel_size))]


def pad(x: Tensor, pads: list[tuple[int, int]], mode: str = "constant") -> Tensor:
    """Pad every axis; F.pad wants the last one first."""
    return F.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)


def correlate(x: Tensor, weight: Tensor, dilation: int | tuple[int, ...] = 1, groups: int = 1) -> Tensor:
    """Return the unstrided, unpadded cross-correlation of ConvNets."""
    if weight.ndim == 3:
        return F.conv1d(x, weight, dilation=dilation, groups=groups)
    return F.conv2d(x, weight, dilation=dilation, groups=groups)


def padded(x: Tensor, kernel_size: Sequence[int], config: Config) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return x with max(p, R) zeros on each side, and how many more these are than were asked for.

    This is B.2, step 1, and B.3.
    """
    pads = padding_of(config, kernel_size)
    if config.padding_mode != "zeros":
        x = pad(x, pads, config.padding_mode)
        pads = [(0, 0)] * len(pads)
    dilation = per_axis(config.dilation, len(kernel_size))
    extra = [
        (max(d * (k - 1) - before, 0), max(d * (k - 1) - after, 0))
        for (before, after), k, d in zip(pads, kernel_size, dilation, strict=True)
    ]
    total = [(p + e, q + f) for (p, q), (e, f) in zip(pads, extra, strict=True)]
    return pad(x, total), extra


def unstrided(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    """Return z, the convolution on the whole circle (B.2, step 2)."""
    x, _ = padded(x, weight.shape[2:], config)
    return correlate(x, weight, config.dilation, config.groups)


def cropped(y: Tensor, x: Tensor, kernel_size: Sequence[int], config: Config) -> Tensor:
    """Return y without what lies in x's extra zeros, then every stride-th of it (B.2, step 4, and B.4)."""
    _, extra = padded(x, kernel_size, config)
    strides = per_axis(config.stride, len(extra))
    kept = tuple(slice(e, n - f, s) for (e, f), n, s in zip(extra, y.shape[2:], strides, strict=True))
    return y[(slice(None), slice(None), *kept)]


def normalized(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    """Convolve unstrided, filter, crop, then stride (B.2, steps 1 to 4, and B.4)."""
    dtype = stat_dtype(x.dtype)
    z = unstrided(x, weight, config)
    v = kernel_spectrum(weight.to(dtype), z.shape[2:], config.eps, config.dilation)
    y = spectral_filter(z.to(dtype), v.detach() if config.detach_spectrum else v).to(x.dtype)
    return cropped(y, x, weight.shape[2:], config)


def affine(y: Tensor, affine_weight: Tensor) -> Tensor:
    """Return r_k * y_k of section 3.3, with zeros around y so that the size stays."""
    pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in affine_weight.shape[2:]]
    return correlate(pad(y, pads), affine_weight, groups=y.shape[1])


def conv_norm(
    x: Tensor, config: Config, weight: Tensor, bias: Tensor | None = None, affine_weight: Tensor | None = None
) -> Tensor:
    """Apply the whole layer to a batch x (N, C_I, *n): normalize, then affine, then bias."""
    y = normalized(x, weight, config)
    if affine_weight is not None:
        y = affine(y, affine_weight)
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


# Dense matrices, for the properties that the paper states about them.


def circulant(a: Tensor) -> Tensor:
    """Return C_a = [s_0[a] s_1[a] ...] of A.2, (n, n): the cyclic shifts of a plane of n elements as columns."""
    shifts = product(*(range(n) for n in a.shape))
    return torch.stack([a.roll(shift, tuple(range(a.ndim))).flatten() for shift in shifts], dim=1)


def channel_matrix(planes: Tensor) -> Tensor:
    """Return A_k = [C_ak1 ... C_akC_I] of section 3.2, (n, C_I n), for one channel's padded kernels (C_I, *size)."""
    return torch.cat([circulant(a) for a in planes], dim=1)


def preconditioner(a_k: Tensor, eps: float, mean_power: float) -> Tensor:
    """Return P_k = (A_k A_k^T)^(-1/2) of eq. 6, with eps E_k on the diagonal."""
    eigenvalues, vectors = torch.linalg.eigh(a_k @ a_k.T)
    return vectors / (eigenvalues + eps * mean_power).sqrt() @ vectors.T


def channels(weight: Tensor, groups: int) -> Tensor:
    """Return a grouped convolution's weight as that of a full one: zeros where a channel is not looked at."""
    c_out, width = weight.shape[:2]
    full = weight.new_zeros(c_out, groups * width, *weight.shape[2:])
    for k in range(c_out):
        g = k // (c_out // groups)
        full[k, g * width : (g + 1) * width] = weight[k]
    return full
