"""Plain PyTorch implementation of the spectrum of a kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from normkernels._checks import statistics_dtype
from normkernels.eager import digits
from normkernels.eager.devices import kept_on_device, widest

# --- kernel_spectrum ----------------------------------------------------------------------------------------------

CHUNK_ELEMENTS = 2**18  # float64 numbers of one chunk of channels: 2 MiB

FLOOR = torch.finfo(torch.float64).eps  # times E: rounding leaves so much of a spectral zero; less power is not used

Waves = tuple[Tensor, Tensor]


@kept_on_device
def waves(n: int, reach: int, dilation: int, device: torch.device) -> Waves:
    """Return cos and sin of 2 pi u t / n for frequencies u, dilated lags t = -reach..reach: float64 (n, 2 reach + 1).

    Both have this shape.
    """
    lags = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device) * dilation
    # The remainder, exact in float64, keeps the argument small.
    angle = torch.outer(torch.arange(n, dtype=torch.float64, device=device), lags).remainder(n) * (2 * math.pi / n)
    return angle.cos(), angle.sin()


def both_waves(weight: Tensor, size: Sequence[int], dilation: Sequence[int]) -> tuple[Waves, Waves]:
    rows, columns = (
        waves(n, k - 1, step, weight.device) for n, k, step in zip(size, weight.shape[2:], dilation, strict=True)
    )
    return rows, columns


def autocorrelation(weight: Tensor) -> Tensor:
    """Return R[t] = sum_i sum_s a_i[s] a_i[s + t] of each output channel: (C_O, 2 kh - 1, 2 kw - 1).

    It is computed from the Gram matrix of the taps, whose entries (s, s') belong to lag s' - s.
    """
    taps = weight.flatten(2)
    return along_lags(torch.bmm(taps.mT, taps), *weight.shape[2:])


def along_lags(gram: Tensor, kh: int, kw: int) -> Tensor:
    """Return the sums of the entries (s, s') of Gram matrices (C_O, k, k) for each lag s' - s."""
    gram = gram.unflatten(2, (kh, kw))
    shifted = [pad(gram[:, i * kw + j], (kw - 1 - j, j, kh - 1 - i, i)) for i in range(kh) for j in range(kw)]
    return functools.reduce(torch.add, shifted)


def from_lags(R: Tensor, kh: int, kw: int) -> Tensor:
    """Apply the adjoint of ``along_lags``: return the matrices (C_O, k, k) whose entry (s, s') is R[s' - s]."""
    windows = [R[:, kh - 1 - i : 2 * kh - 1 - i, kw - 1 - j : 2 * kw - 1 - j] for i in range(kh) for j in range(kw)]
    return torch.stack([window.flatten(1) for window in windows], 1)


def power_spectrum(R: Tensor, rows: Waves, columns: Waves) -> tuple[Tensor, Tensor]:
    """Return the cosine transform of the autocorrelation (C_O, H, W), and its mean E = R[0] (C_O, 1, 1)."""
    (cos_h, sin_h), (cos_w, sin_w) = rows, columns
    power = cos_h @ R @ cos_w.T - sin_h @ R @ sin_w.T
    return power, R[:, R.shape[1] // 2, R.shape[2] // 2, None, None]


def inverse_root(R: Tensor, rows: Waves, columns: Waves, eps: float) -> Tensor:
    """Return (power + eps E)^(-1/2); 1 for a channel of zeros."""
    power, energy = power_spectrum(R, rows, columns)
    square = torch.maximum(power, FLOOR * energy) + eps * energy
    return torch.where(energy == 0, 1.0, square).rsqrt()  # masked before, or the gradient would be 0 times infinity


def scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return kernels in float64 divided by the largest tap of their output channel, and that tap (C_O, 1, 1).

    v is homogeneous, v(w) = v(w / s) / s, and with this s no square over- or underflows. Its gradient may treat s as a
    constant for the same reason.
    """
    exact = weight.double()
    largest = exact.detach().abs().amax((1, 2, 3)).view(-1, 1, 1)
    largest = torch.where(largest == 0, 1.0, largest)
    return exact / largest.unsqueeze(-1), largest


def spectrum(weight: Tensor, waves: tuple[Waves, Waves], eps: float) -> Tensor:
    """Return v in float64, differentiable."""
    kernels, scale = scaled(weight)
    return inverse_root(autocorrelation(kernels), *waves, eps) / scale


def chunks(weight: Tensor, size: Sequence[int]) -> Iterator[slice]:
    """Yield slices of output channels, so that float64 intermediates stay small whatever the layer."""
    channels = weight.shape[0]
    taps = weight.shape[2] * weight.shape[3]
    largest = max(weight[0].numel(), size[0] * size[1], 4 * taps * taps)
    elements = CHUNK_ELEMENTS if weight.device.type == "cpu" else 4 * CHUNK_ELEMENTS  # elsewhere launches count
    step = max(1, elements // largest)
    return (slice(i, i + step) for i in range(0, channels, step))


def kernel_spectrum(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Tensor:
    dtype = statistics_dtype(weight.dtype)
    v = weight.new_empty((weight.shape[0], *size), dtype=dtype)
    if widest(weight) == torch.float32:
        for chunk in chunks(weight, size):
            v[chunk] = in_float32(weight[chunk], size, eps, dilation)
        return v
    waves = both_waves(weight, size, dilation)
    for chunk in chunks(weight, size):
        v[chunk] = spectrum(weight[chunk], waves, eps).clamp(max=torch.finfo(dtype).max)
    return v


def kernel_spectrum_backward(grad: Tensor, weight: Tensor, eps: float, dilation: Sequence[int]) -> Tensor:
    """Return the gradient of the weight.

    dL/dR is the cosine transform of dL/dpower = -v^3 dv / 2, and R is quadratic in the taps (DERIVATION.md).
    """
    kh, kw = weight.shape[2:]
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if widest(weight) == torch.float32:
        for chunk in chunks(weight, grad.shape[1:]):
            d_taps = in_float32(weight[chunk], grad.shape[1:], eps, dilation, grad[chunk])
            result[chunk] = d_taps.view_as(result[chunk])
        return result
    waves = both_waves(weight, grad.shape[1:], dilation)
    (cos_h, sin_h), (cos_w, sin_w) = waves
    for chunk in chunks(weight, grad.shape[1:]):
        kernels, scale = scaled(weight[chunk])
        R = autocorrelation(kernels)
        power, energy = power_spectrum(R, *waves)
        v = inverse_root(R, *waves, eps)
        d_square = -0.5 * (grad[chunk].double() / scale) * v**3
        d_power = torch.where(power > FLOOR * energy, d_square, 0.0)
        dR = cos_h.T @ d_power @ cos_w - sin_h.T @ d_power @ sin_w
        dR[:, kh - 1, kw - 1] += (eps * d_square + FLOOR * (d_square - d_power)).sum((1, 2))  # dE
        d_taps = torch.bmm(kernels.flatten(2), from_lags(dR, kh, kw))
        result[chunk] = (2 * d_taps / scale).view_as(result[chunk])
    return result


# The same without float64: products are those of ``digits`` where numbers cancel, and in float32 where they do not.


def in_float32(
    weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int], grad: Tensor | None = None
) -> Tensor:
    """Return v (C_O, H, W) in float32 or, with ``grad``, that of v, the gradient (C_O, C_I k) of the weight."""
    kh, kw = weight.shape[2:]
    rows, columns = (
        digits.waves(n, k - 1, step, weight.device) for n, k, step in zip(size, (kh, kw), dilation, strict=True)
    )
    kernels, over_scale = scaled_in_float32(weight)
    taps = kernels.flatten(2)
    R = digits.product((taps.mT,), (taps,), lambda gram: along_lags(gram, kh, kw), folded=kh * kw)
    power, energy = digits.cosine_transform(R, rows, columns)[0], R[0][:, kh - 1, kw - 1, None, None]
    square = torch.maximum(power, FLOOR * energy) + eps * energy
    v = torch.where(energy == 0, 1.0, square).rsqrt()
    if grad is None:
        return over_scale(v).clamp(max=torch.finfo(torch.float32).max)
    d_square = -0.5 * over_scale(grad.float()) * v**3
    d_power = torch.where(power > FLOOR * energy, d_square, 0.0)
    dR = digits.cosine_transform((d_power,), digits.transposed(rows), digits.transposed(columns))
    d_energy = (eps * d_square + FLOOR * (d_square - d_power)).sum((1, 2))
    dR = digits.renormalized(digits.plus(dR, pad(d_energy[:, None, None], (kw - 1, kw - 1, kh - 1, kh - 1))))
    d_taps = digits.product((taps,), tuple(from_lags(part, kh, kw) for part in dR))[0]
    return over_scale(2 * d_taps)


def scaled_in_float32(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return kernels in float32, exactly divided by a power of two for each output channel, and a division by that."""
    flat = weight.float().flatten(1).unsqueeze(1)
    largest = flat.abs().amax(2, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    # Two factors: denormal numbers and the largest ones have no power of two beside them whose inverse is normal.
    lift = torch.where(largest < 2.0**-60, 2.0**64, torch.where(largest > 2.0**60, 2.0**-64, 1.0))
    _, inverse = digits.powers_of_two(largest * lift)
    return (flat * lift * inverse).view(weight.shape), lambda value: value * lift * inverse
