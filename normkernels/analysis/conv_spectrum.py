"""Spectra of convolutions on a torus: all singular values, and what ConvNorm does to them (its Figure 2).

On a torus of the plane's size a convolution is block-diagonal in the Fourier basis: one (C_O, C_I) matrix for each
frequency, the DFT of the kernel there (Sedghi et al., 2018). A strided convolution is not circular, so the stride is
left out, as in the paper; zero padding changes the border only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import DTYPES, check_integer, check_like, check_tensor, statistics_dtype
from normkernels.eager.devices import with_float64

# The size of the matrices, one for each frequency, that exist at a time. The decomposition needs about three times as
# much, and all matrices of a 512 x 512 layer on 32 x 32 would take 2 GiB.
CHUNK_BYTES = 2**26


def conv_singular_values(
    weight: Tensor,
    size: int | tuple[int, ...],
    *,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    spectrum: Tensor | None = None,
) -> Tensor:
    r"""Return all singular values of a circular convolution (Sedghi et al., 2018).

    .. math:: \sigma(u, v) = \mathrm{svd}\left(\mathrm{diag}(s(u, v)) \, \hat K(u, v)\right), \quad
        \hat K(u, v) = \sum_{a, b} K_{ab} e^{-2 \pi i (u a / H + v b / W)}

    Args:
        weight: (C_O, C_I / groups, k_H, k_W), or with one or three kernel dimensions; any floating-point type.
        size: (H, W) of the plane, or one int for all dimensions.
        groups: of the convolution.
        dilation: of the convolution.
        spectrum: s (C_O, H, W), real, in fft2's order: a circular filter after each output channel, as in
            ConvNorm. Of an odd part, s(f) - s(-f), a real image keeps nothing. None for no filter.

    Returns:
        (H, W, groups * min(C_O, C_I) / groups), in descending order, for several groups in each of them, one
        after the other; at [u, v] those of frequency (u, v). float32, or float64 for float64 weights; no gradient.

    Raises:
        TypeError: weight is not a floating-point tensor, spectrum has another type or an option is no int.
        ValueError: weight or spectrum has another shape or is not finite, groups does not divide C_O, or the dilated
            kernel is larger than the plane.
    """
    given = weight
    weight, planes, steps, spectrum = _check(weight, size, groups, dilation, spectrum)
    values = weight.new_empty(*planes, groups * min(weight.shape[0] // groups, weight.shape[1]))
    for index, mirror, K in _frequencies(weight, planes, steps, groups, spectrum):
        values[index] = values[mirror] = torch.linalg.svdvals(K).flatten(1)
    return values.to(given.device)


def channel_condition(
    weight: Tensor,
    size: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    spectrum: Tensor | None = None,
) -> Tensor:
    r"""Return the condition number of each channel's operator [C_ak1, ..., C_akCI] (ConvNorm, eq. 6; Figure 2, left).

    .. math:: \kappa_k = \sqrt{\max_{u, v} p_k / \min_{u, v} p_k}, \quad
        p_k(u, v) = s_k(u, v)^2 \sum_i \lvert \hat a_{ki}(u, v) \rvert^2

    It is 1 for a tight frame, which ConvNorm makes of an output channel with s = (sum |a^|^2)^(-1/2). It is infinite
    where some frequency does not pass: where every |a^| is within rounding of zero, in float64 whatever the weight's
    type.

    Args, raises: as conv_singular_values. Groups change nothing, because only the inputs of each channel count.

    Returns: (C_O,), float32, or float64 for float64 weights; no gradient.
    """
    given = weight
    weight, planes, steps, spectrum = _check(weight, size, 1, dilation, spectrum)
    weight = weight.double()
    scale = weight.abs().flatten(1).amax(1)  # the condition number does not depend on it, and squares may underflow
    weight = weight / torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (weight.dim() - 1))
    taps = weight[0, 0].numel()
    # A sum of `taps` terms, each with a rounded factor: |error of a^|^2 <= (taps + 1)^2 u^2 (sum |a|)^2.
    rounding = (taps + 1) * torch.finfo(weight.dtype).eps
    zero = weight.abs().flatten(2).sum(2).square().sum(1) * rounding**2
    low, high = torch.full_like(zero, math.inf), torch.zeros_like(zero)
    for index, _, K in _frequencies(weight, planes, steps, 1, None):
        power = torch.view_as_real(K[:, 0]).square().sum((2, 3))  # (frequencies, C_O)
        power = torch.where(power > zero, power, 0.0)
        if spectrum is not None:
            power = power * _at(spectrum, index).double().square()
        low, high = torch.minimum(low, power.amin(0)), torch.maximum(high, power.amax(0))
    return torch.where(low > 0, high / low, math.inf).sqrt().to(statistics_dtype(given.dtype)).to(given.device)


def layer_spectral_norm(
    weight: Tensor,
    size: int | tuple[int, ...],
    *,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    spectrum: Tensor | None = None,
) -> Tensor:
    """Return the largest of conv_singular_values, with its arguments and errors (ConvNorm, Figure 2, right). A scalar.

    It is computed from the eigenvalues of the smaller Gram matrix, which is several times cheaper: squaring costs small
    singular values their digits, but not the largest.
    """
    given = weight
    weight, planes, steps, spectrum = _check(weight, size, groups, dilation, spectrum)
    scale = _magnitude(weight)
    weight = weight / scale
    if spectrum is not None:
        spectrum = spectrum.double()
        scale = scale * _magnitude(spectrum)
        spectrum = spectrum / _magnitude(spectrum)
    largest = weight.new_zeros(())
    for _, _, K in _frequencies(weight, planes, steps, groups, spectrum):
        gram = K @ K.mH if K.shape[-2] <= K.shape[-1] else K.mH @ K
        largest = torch.maximum(largest, torch.linalg.eigvalsh(gram).amax())
    return (largest.sqrt() * scale).to(weight.dtype).to(given.device)


Index = tuple[Tensor, ...]


def _frequencies(
    weight: Tensor, planes: tuple[int, ...], steps: tuple[int, ...], groups: int, spectrum: Tensor | None
) -> Iterator[tuple[Index, Index, Tensor]]:
    """Yield chunks of frequencies f: where they are, where their mirror images are, and K^ (f, g, C_O / g, C_I / g).

    Weights are real, so K^ at -f is the conjugate of that at f, with the same singular values. Therefore only about
    half of the frequencies, those of a real FFT, are formed, each as a product with the few taps that the kernel has.
    """
    c_out, c_in, *kernel = weight.shape
    device = weight.device
    complex_dtype = torch.complex128 if weight.dtype == torch.float64 else torch.complex64
    taps = weight.flatten(2).permute(2, 0, 1).flatten(1).to(complex_dtype)  # (taps, C_O C_I)
    ranges = [torch.arange(n, device=device) for n in planes]
    ranges[-1] = ranges[-1][: planes[-1] // 2 + 1]
    grid = torch.cartesian_prod(*ranges).view(-1, len(planes))
    places = list(itertools.product(*(range(0, k * step, step) for k, step in zip(kernel, steps, strict=True))))
    places_of_taps = torch.tensor(places, device=device).view(-1, len(planes))
    count = max(1, CHUNK_BYTES // (c_out * c_in * complex_dtype.itemsize))
    for chunk in grid.split(count):
        angle = torch.zeros(len(chunk), len(places), dtype=torch.float64, device=device)
        for dim, n in enumerate(planes):  # whole turns are subtracted as integers, so that they cost no digits
            angle += (chunk[:, dim, None] * places_of_taps[:, dim] % n).double() / n
        waves = torch.polar(torch.ones_like(angle), -2 * math.pi * angle).to(complex_dtype)
        K = (waves @ taps).view(-1, groups, c_out // groups, c_in)
        index = chunk.unbind(1)
        if spectrum is not None:
            K = K * _at(spectrum, index).to(weight.dtype).reshape(*K.shape[:3], 1)
        yield index, tuple(-i % n for i, n in zip(index, planes, strict=True)), K


def _at(spectrum: Tensor, index: Index) -> Tensor:
    """Return a spectrum (C_O, H, W) at a chunk of frequencies: (frequencies, C_O)."""
    everything: Any = slice(None)
    return spectrum[(everything, *index)].T


def _magnitude(value: Tensor) -> Tensor:
    """Return the largest absolute value, 1 where that is 0. Squares of values that it divides do not overflow."""
    largest = value.abs().amax()
    return torch.where(largest > 0, largest, 1.0)


def _check(
    weight: Tensor,
    size: int | tuple[int, ...],
    groups: int,
    dilation: int | tuple[int, ...],
    spectrum: Tensor | None,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], Tensor | None]:
    """Check the arguments, and return weight, size, dilation and spectrum as the computation needs them.

    The tensors are on its device and in its type, without gradients; size and dilation have one int for each dimension.
    """
    check_tensor("weight", weight)
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected float16, bfloat16, float32 or float64, got {weight.dtype}")
    if weight.dim() not in (3, 4, 5) or weight.numel() == 0:
        raise ValueError(f"weight: expected a non-empty shape (C_O, C_I / groups, *k), got {tuple(weight.shape)}")
    rank = weight.dim() - 2
    planes, steps = _each("size", size, rank), _each("dilation", dilation, rank)
    for n, k, step in zip(planes, weight.shape[2:], steps, strict=True):
        if (k - 1) * step >= n:
            raise ValueError(
                f"size: expected at least the dilated kernel's "
                f"{tuple((k - 1) * step + 1 for k, step in zip(weight.shape[2:], steps, strict=True))}, got {planes}"
            )
    check_integer("groups", groups, minimum=1)
    if weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups}")
    weight = weight.detach()
    if spectrum is not None:
        # The spectrum may have any type, whatever the weight's: a filter may well be kept in more digits.
        check_like("spectrum", spectrum, (weight.shape[0], *planes), (*DTYPES,), weight)
        spectrum = spectrum.detach()
    for name, value in (("weight", weight), ("spectrum", spectrum)):
        if value is not None and not value.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got {int((~value.isfinite()).sum())} that are not")
    if spectrum is not None:
        dims = tuple(range(1, spectrum.dim()))
        spectrum = with_float64(spectrum.to(statistics_dtype(spectrum.dtype)))
        spectrum = 0.5 * spectrum + 0.5 * spectrum.flip(dims).roll([1] * rank, dims)
    return with_float64(weight.to(statistics_dtype(weight.dtype))), planes, steps, spectrum


def _each(name: str, value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return one int for each kernel dimension."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name}: expected an int or {rank} for a kernel of {rank} dimensions, got {value}")
    for item in values:
        check_integer(name, item, minimum=1)
    return values
