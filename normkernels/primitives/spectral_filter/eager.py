"""Plain PyTorch implementation of the filter on image planes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import statistics_dtype
from normkernels.eager.devices import has_fft, kept_on_device
from normkernels.eager.layouts import empty_output
from normkernels.eager.products import fast, times_columns, times_transposed
from normkernels.eager.tiles import tile_threads, workspace

# --- spectral_filter ----------------------------------------------------------------------------------------------

# A window is (start, step, count) of the positions of a plane along one dimension.
Window = Sequence[int]

TILE_ELEMENTS = 2**18  # for each thread in a tile of planes; 2**17 takes a sixth longer, 2**19 gains nothing

FFT_FACTOR = 13  # the largest prime factor for which torch.fft (MKL on a CPU) has its own code

SHORTEST_FFT, LONGEST_PRODUCT = 20, 128


@kept_on_device
def dft(n: int, window: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the columns of the real DFT matrix R_n at the positions of a window: (n, count). R_n is orthogonal.

    Its rows are cosines of the frequencies 0..n//2, then sines of 1..(n-1)//2.
    """
    start, step, count = window

    def row(wave: Callable[[float], float], u: int) -> list[float]:
        scale = math.sqrt((1 if 2 * u % n == 0 else 2) / n)
        return [scale * wave(2 * math.pi * (u * (start + step * i) % n) / n) for i in range(count)]

    rows = [row(math.cos, u) for u in range(n // 2 + 1)] + [row(math.sin, u) for u in range(1, (n - 1) // 2 + 1)]
    return torch.tensor(rows, dtype=dtype, device="cpu").to(device)


def negated(v: Tensor, dim: int) -> Tensor:
    """Return v at the negative frequencies of one dimension."""
    first, others = v.split((1, v.shape[dim] - 1), dim)
    return torch.cat((first, others.flip(dim)), dim)


def symmetric_half(v: Tensor) -> Tensor:
    """Return (v(f) + v(-f)) / 2 at the frequencies that rfft2 keeps."""
    half = v.shape[2] // 2 + 1
    return 0.5 * (v[..., :half] + negated(negated(v, 1), 2)[..., :half])


def coefficients(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (C, H, W) and B (C, (H-1)//2, (W-1)//2) of the filter in the basis of ``dft``.

    With l+ = v(u, w) and l- = v(u, -w): A = (l+ + l-) / 2 and B = (l- - l+) / 2 (DERIVATION.md). B vanishes where
    u or w has no sine. The real part of the result depends on v(f) + v(-f) only.
    """
    h, w = v.shape[1:]
    half_h, half_w = (h - 1) // 2, (w - 1) // 2
    plus = symmetric_half(v)
    minus = negated(plus, 1)  # v(u, -w) = v(-u, w)
    mean, difference = 0.5 * (plus + minus), 0.5 * (minus - plus)
    mean = torch.cat((mean[:, : h // 2 + 1], mean[:, 1 : half_h + 1]), 1)
    both = slice(1, half_h + 1), slice(1, half_w + 1)
    return torch.cat((mean, mean[:, :, 1 : half_w + 1]), 2), difference[:, both[0], both[1]].contiguous()


def multiply(Z: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Apply the filter between the transforms to Z (n, C, H, W).

    It couples cos cos with sin sin, and cos sin with sin cos.
    """
    h, w = Z.shape[2:]
    result = workspace(Z, Z.numel(), Z.dtype, "spectrum").view(Z.shape)
    torch.mul(Z, A, out=result)
    cos_h, sin_h = slice(1, (h - 1) // 2 + 1), slice(h // 2 + 1, h)
    cos_w, sin_w = slice(1, (w - 1) // 2 + 1), slice(w // 2 + 1, w)
    for rows, other_rows in ((cos_h, sin_h), (sin_h, cos_h)):
        for columns, other_columns in ((cos_w, sin_w), (sin_w, cos_w)):
            sign = 1 if (rows is cos_h) == (columns is cos_w) else -1
            result[..., rows, columns].addcmul_(B, Z[..., other_rows, other_columns], value=sign)
    return result


def rows_times(planes: Tensor, matrix: Tensor) -> Tensor:
    """Return planes (n, h, w) times matrix^T from the right, for a matrix (w', w)."""
    return times_transposed(planes.reshape(-1, planes.shape[2]), matrix).view(*planes.shape[:2], -1)


def times_rows(matrix: Tensor, planes: Tensor) -> Tensor:
    """Return matrix (h', h) times planes (n, h, w) from the left."""
    if planes.shape[1] == 1 and len(matrix) == 1:  # one-dimensional signals
        return planes * matrix
    return times_columns(matrix, planes)


def by_products(z: Tensor, h: int, w: int) -> bool:
    """Return whether planes of h x w are transformed by products with the real DFT matrix rather than by torch.fft.

    Time of the products / time of torch.fft (2 Zen 5 cores, float32, python -m bench.experiments.transforms): .5 to .9
    from 7 to 18; .7 at 34 = 2 * 17, .5 at 58 = 2 * 29, .95 at 114 = 2 * 3 * 19, 1.1 to 1.8 from 194 on; without such a
    large prime factor 1.2 to 1.6 from 32 to 130. In float64 and on other devices it is torch.fft.
    """
    if not fast(z) or max(h, w) > LONGEST_PRODUCT:
        return False
    return max(h, w) < SHORTEST_FFT or any(largest_prime_factor(n) > FFT_FACTOR for n in (h, w))


@functools.lru_cache
def largest_prime_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


def plane_tiles(z: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and channels of about TILE_ELEMENTS of work for each thread; off the CPU all at once."""
    n, channels = z.shape[:2]
    planes = max(1, TILE_ELEMENTS * tile_threads() // size)
    if z.device.type != "cpu":
        planes = n * channels
    samples, step = max(1, planes // channels), min(planes, channels)
    for i in range(0, n, samples):
        for k in range(0, channels, step):
            yield slice(i, i + samples), slice(k, k + step)


def spectral_filter(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    h, w = v.shape[1:]
    a, b = target[2], target[5]
    rows, columns = (*source[:2], z.shape[2]), (*source[2:], z.shape[3])
    y = empty_output(z, (a, b))
    if y.numel() == 0:
        return y
    if z.numel() == 0:
        return y.zero_()
    if not has_fft(z.device):
        return y.copy_(spectral_filter(z.cpu(), v.cpu(), source, target))
    products = by_products(v, h, w)
    if products:
        A, B = coefficients(v)
        forward = [dft(n, window, v.dtype, v.device) for n, window in ((h, rows), (w, columns))]
        inverse = [
            dft(n, tuple(window), v.dtype, v.device).t().contiguous()
            for n, window in ((h, target[:3]), (w, target[3:]))
        ]
    else:
        half = symmetric_half(v)
    for samples, channels in plane_tiles(z, h * w):
        tile = z[samples, channels].to(v.dtype).contiguous()
        if products:
            Z = times_rows(forward[0], rows_times(tile.flatten(0, 1), forward[1]))
            Z = multiply(Z.view(*tile.shape[:2], h, w), A[channels], B[channels]).flatten(0, 1)
            filtered = rows_times(times_rows(inverse[0], Z), inverse[1]).view(*tile.shape[:2], a, b)
        else:
            Z = torch.fft.rfft2(on_plane(tile, (h, w), rows, columns))
            Z *= half[channels]
            filtered = torch.fft.irfft2(Z, s=(h, w))[positions(target[:3], target[3:])]
        y[samples, channels].copy_(filtered)
    return y


def on_plane(z: Tensor, size: tuple[int, int], rows: Window, columns: Window) -> Tensor:
    """Return z (n, C, h, w) at its window's positions of a plane of zeros."""
    if tuple(z.shape[2:]) == size:
        return z
    plane = z.new_zeros((*z.shape[:2], *size))
    plane[positions(rows, columns)] = z
    return plane


def positions(rows: Window, columns: Window) -> Any:
    """Return the index of a window of planes (n, C, H, W)."""
    return (..., *(slice(start, start + step * count, step) for start, step, count in (rows, columns)))


def cross_spectrum(y: Tensor, z: Tensor, size: Sequence[int], of_y: Sequence[int], of_z: Sequence[int]) -> Tensor:
    """Return sum_n Re(conj(Y) Z) / (H W) (C, H, W): the gradient of the filter in v, for dL/dy = y."""
    h, w = size
    dtype = statistics_dtype(z.dtype)
    if not has_fft(z.device):
        return cross_spectrum(y.cpu(), z.cpu(), size, of_y, of_z).to(z.device)
    half = w // 2 + 1
    result = z.new_zeros((z.shape[1], h, half), dtype=dtype)
    if z.numel() and y.numel():
        for samples, channels in plane_tiles(z, h * w):
            Y, Z = (
                torch.fft.rfft2(
                    on_plane(t[samples, channels].to(dtype), (h, w), (*at[:2], t.shape[2]), (*at[2:], t.shape[3]))
                )
                for t, at in ((y, of_y), (z, of_z))
            )
            result[channels] += (Y.real * Z.real + Y.imag * Z.imag).sum(0)
    result /= h * w
    left_out = negated(result, 1)[..., 1 : (w - 1) // 2 + 1].flip(2)  # rfft2 leaves out -f of those it keeps
    return torch.cat((result, left_out), 2)
