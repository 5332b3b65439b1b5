"""Triton implementation of the spectrum of a kernel: one program for each output channel, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.devices import has_float64
from normkernels.primitives.kernel_spectrum import eager
from normkernels.triton.arguments import Matrix
from normkernels.triton.configs import configuration
from normkernels.triton.launch import launch, within_32_bits
from normkernels.triton.support import Unsupported, architecture, check_supported

FLOOR = tl.constexpr(eager.FLOOR)
LAGS = 4  # lags of the autocorrelation at a time
FREQUENCIES = 32, 64  # the most rows and columns of the plane that a program works on at a time


@triton.jit
def tap(index, start, weight, kw: tl.constexpr, T: tl.constexpr):
    """Return where the entries of a channel's kernels are, from ``start`` on, numbered as in (C_I, kh, kw)."""
    s = index % T
    start += (index // T).to(tl.int64) * weight.input_stride
    return start + s // kw * weight.row_stride + s % kw * weight.column_stride


@triton.jit
def largest_tap(start, weight, kw: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest absolute value of a channel's kernels, 1 for a channel of zeros."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, weight.entries, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        at = tap(index, start, weight, kw, T)
        largest = tl.maximum(largest, tl.abs(tl.load(at, mask=index < weight.entries, other=0.0).to(tl.float64)))
    result = tl.max(largest, 0)
    return tl.where(result == 0, 1.0, result)


@triton.jit
def autocorrelation(
    start, weight, inverse, R, lags, kh: tl.constexpr, kw: tl.constexpr, BLOCK: tl.constexpr, LAGS: tl.constexpr
):
    """Compute R (lags). For each pair of lags t and -t it has the later one, from t = 0 on."""
    T: tl.constexpr = kh * kw
    for begin in range(0, lags, LAGS):
        lag = begin + tl.arange(0, LAGS)
        t_h, t_w = split_lag(lag, kw)
        total = tl.zeros((LAGS,), tl.float64)
        for first in range(0, weight.entries, BLOCK):
            index = first + tl.arange(0, BLOCK)
            mask = index < weight.entries
            at = tap(index, start, weight, kw, T)
            here = tl.load(at, mask=mask, other=0.0).to(tl.float64) * inverse
            row, column = (index % T // kw)[None, :] + t_h[:, None], (index % kw)[None, :] + t_w[:, None]
            inside = (row < kh) & (column >= 0) & (column < kw) & mask[None, :] & (lag < lags)[:, None]
            shift = t_h * weight.row_stride + t_w * weight.column_stride
            there = tl.load(at[None, :] + shift[:, None], mask=inside, other=0.0).to(tl.float64) * inverse
            total += tl.sum(here[None, :] * there, 1)
        tl.store(R + lag, total, mask=lag < lags)


@triton.jit
def split_lag(lag, kw: tl.constexpr):
    """Return (t_h, t_w) of the later half of the lags, numbered from (0, 0) in rows of 2 kw - 1."""
    t_h = (lag + kw - 1) // (2 * kw - 1)
    return t_h, lag - t_h * (2 * kw - 1)


@triton.jit
def wave_of_lag(lag, rows, columns, H: tl.constexpr, W: tl.constexpr, waves, kh: tl.constexpr, kw: tl.constexpr):
    """Return cos 2 pi (u t_h / H + w t_w / W) for a tile of frequencies."""
    t_h, t_w = split_lag(lag, kw)
    at_h, at_w = rows * (2 * kh - 1) + kh - 1 + t_h, columns * (2 * kw - 1) + kw - 1 + t_w
    cos_h = tl.load(waves.cos_h + at_h, mask=rows < H, other=0.0)
    sin_h = tl.load(waves.sin_h + at_h, mask=rows < H, other=0.0)
    cos_w = tl.load(waves.cos_w + at_w, mask=columns < W, other=0.0)
    sin_w = tl.load(waves.sin_w + at_w, mask=columns < W, other=0.0)
    return cos_h[:, None] * cos_w[None, :] - sin_h[:, None] * sin_w[None, :]


@triton.jit
def power(R, lags, rows, columns, H: tl.constexpr, W: tl.constexpr, waves, kh: tl.constexpr, kw: tl.constexpr):
    """Return the cosine transform of the autocorrelation at a tile of frequencies."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float64) + tl.load(R)
    for lag in range(1, lags):
        total += 2 * tl.load(R + lag) * wave_of_lag(lag, rows, columns, H, W, waves, kh, kw)
    return total


@triton.jit
def inverse_root(power, energy, EPS: tl.constexpr):
    """Return (power + eps E)^(-1/2); 1 for a channel of zeros. NaN stays NaN."""
    square = tl.where(power < energy * FLOOR, energy * FLOOR, power) + EPS * energy
    return 1.0 / tl.sqrt(tl.where(energy == 0, 1.0, square))


@triton.jit
def spectrum_of_kernels(
    weight, R, lags, waves, v,
    H: tl.constexpr, W: tl.constexpr, kh: tl.constexpr, kw: tl.constexpr, EPS: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute v of one output channel. R is the program's own memory."""
    channel = tl.program_id(0).to(tl.int64)
    start = weight.data + channel * weight.channel_stride
    R += channel * lags
    scale = largest_tap(start, weight, kw, kh * kw, BLOCK)
    autocorrelation(start, weight, 1.0 / scale, R, lags, kh, kw, BLOCK, LAGS)
    tl.debug_barrier()  # every thread reads what others wrote to R
    energy = tl.load(R)
    for top in range(0, H, ROWS):
        for left in range(0, W, COLUMNS):
            rows, columns = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
            result = inverse_root(power(R, lags, rows, columns, H, W, waves, kh, kw), energy, EPS) / scale
            result = tl.where(result > LARGEST, LARGEST, result)
            mask = (rows < H)[:, None] & (columns < W)[None, :]
            tl.store(v + channel * (H * W) + rows[:, None] * W + columns[None, :], result.to(tl.float32), mask=mask)


@triton.jit
def gradient_of_kernels(
    grad, weight, R, dR, lags, waves, out,
    H: tl.constexpr, W: tl.constexpr, kh: tl.constexpr, kw: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dL/dweight of one output channel: dL/dpower = -v^3 dv / 2 gives dL/dR, and R is quadratic in the taps."""
    T: tl.constexpr = kh * kw
    channel = tl.program_id(0).to(tl.int64)
    start = weight.data + channel * weight.channel_stride
    R += channel * lags
    dR += channel * lags
    scale = largest_tap(start, weight, kw, T, BLOCK)
    inverse = 1.0 / scale
    autocorrelation(start, weight, inverse, R, lags, kh, kw, BLOCK, LAGS)
    for begin in range(0, lags, LAGS):
        lag = begin + tl.arange(0, LAGS)
        tl.store(dR + lag, tl.zeros((LAGS,), tl.float64), mask=lag < lags)
    tl.debug_barrier()  # every thread reads what others wrote to R and dR
    energy = tl.load(R)
    for top in range(0, H, ROWS):
        for left in range(0, W, COLUMNS):
            rows, columns = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
            mask = (rows < H)[:, None] & (columns < W)[None, :]
            p = power(R, lags, rows, columns, H, W, waves, kh, kw)
            v = inverse_root(p, energy, EPS)
            at = channel * grad.group_stride + rows.to(tl.int64)[:, None] * grad.row_stride
            at += columns.to(tl.int64)[None, :] * grad.column_stride
            dv = tl.load(grad.data + at, mask=mask, other=0.0).to(tl.float64) * inverse
            d_square = -0.5 * dv * v * v * v
            d_power = tl.where(p > energy * FLOOR, d_square, 0.0)
            for lag in range(0, lags):
                total = tl.sum(tl.sum(d_power * wave_of_lag(lag, rows, columns, H, W, waves, kh, kw), 1), 0)
                if lag == 0:  # R(0) is the energy too
                    total += tl.sum(tl.sum(EPS * d_square + (d_square - d_power) * FLOOR, 1), 0)
                tl.store(dR + lag, tl.load(dR + lag) + total)
            tl.debug_barrier()  # before the next tile, or the last loop, reads dR

    entries = weight.entries
    for first in range(0, entries, BLOCK):
        index = first + tl.arange(0, BLOCK)
        own = index % T // kw * (2 * kw - 1) + index % kw  # differences of these are the numbers of lags
        total = tl.zeros((BLOCK,), tl.float64)
        for s in range(0, T):
            entry = index - index % T + s
            at = tap(entry, start, weight, kw, T)
            value = tl.load(at, mask=index < entries, other=0.0).to(tl.float64) * inverse
            lag = tl.abs(s // kw * (2 * kw - 1) + s % kw - own)
            total += tl.load(dR + lag) * value
        result = (2 * inverse * total).to(tl.float32)
        tl.store(out + channel * entries + index, result.to(out.dtype.element_ty), mask=index < entries)


# --- launchers ------------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """A convolution's weight (C_O, C_I, kh, kw) with its strides; an output channel has ``entries`` C_I kh kw."""

    data: Tensor
    entries: int
    channel_stride: int
    input_stride: int
    row_stride: int
    column_stride: int


class Waves(NamedTuple):
    """Cosine and sine of each frequency and lag, of rows (H, 2 kh - 1) and of columns (W, 2 kw - 1)."""

    cos_h: Tensor
    sin_h: Tensor
    cos_w: Tensor
    sin_w: Tensor


class Plan(NamedTuple):
    """Arguments and options that both kernels share.

    R is memory (C_O, lags), in which the program of an output channel stores the autocorrelation of its kernels.
    """

    weight: Kernels
    R: Tensor
    lags: int
    waves: Waves
    meta: dict[str, Any]


def plan(kernel: str, weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Plan:
    """Return what one of the two kernels, named as in the table of configurations, is launched with."""
    h, w = size
    weight = within_32_bits(weight)
    channels, inputs, kh, kw = weight.shape
    config = configuration(kernel, FREQUENCIES[1], "", torch.float32, architecture(weight.device))
    waves = Waves(*(wave for pair in eager.both_waves(weight, size, dilation) for wave in pair))
    rows, columns = (min(most, triton.next_power_of_2(n)) for most, n in zip(FREQUENCIES, (h, w), strict=True))
    meta = {
        "H": h, "W": w, "kh": kh, "kw": kw, "EPS": eps, "BLOCK": config.block, "LAGS": LAGS,
        "ROWS": rows, "COLUMNS": columns, "config": config, "device": weight.device,
    }  # fmt: skip
    lags = ((2 * kh - 1) * (2 * kw - 1) + 1) // 2
    R = weight.new_empty((channels, lags), dtype=torch.float64)
    return Plan(Kernels(weight, inputs * kh * kw, *weight.stride()), R, lags, waves, meta)


def check(weight: Tensor) -> None:
    check_supported(weight)
    if not has_float64(weight.device):
        raise Unsupported("expected a device with float64, got one without")


def kernel_spectrum(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Tensor:
    check(weight)
    if weight.numel() == 0:
        return eager.kernel_spectrum(weight, size, eps, dilation)
    v = weight.new_empty((weight.shape[0], *size), dtype=torch.float32)
    kernels, R, lags, waves, meta = plan("kernel_spectrum", weight, size, eps, dilation)
    launch(
        spectrum_of_kernels, (weight.shape[0],), kernels, R, lags, waves, v,
        LARGEST=torch.finfo(torch.float32).max, **meta,
    )  # fmt: skip
    return v


def kernel_spectrum_backward(grad: Tensor, weight: Tensor, eps: float, dilation: Sequence[int]) -> Tensor:
    check(weight)
    if weight.numel() == 0:
        return eager.kernel_spectrum_backward(grad, weight, eps, dilation)
    grad, result = within_32_bits(grad), torch.empty_like(weight, memory_format=torch.contiguous_format)
    kernels, R, lags, waves, meta = plan("kernel_spectrum_backward", weight, grad.shape[1:], eps, dilation)
    launch(
        gradient_of_kernels, (weight.shape[0],),
        Matrix(grad, *grad.stride()), kernels, R, torch.empty_like(R), lags, waves, result, **meta,
    )  # fmt: skip
    return result
