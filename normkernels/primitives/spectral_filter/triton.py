"""Triton implementation of the filter on image planes; kernel_spectrum/triton.py has the spectrum.

Letters: n a side of the plane, j a position of its first half, with mirror image n - 1 - j; K the padded half side;
u, w slots of frequencies along rows and columns; c, s cosine and sine; e, o even and odd part. A program works on
``P`` neighbouring channels at a time. The transform is that of DERIVATION.md, "Triton implementation".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.eager.devices import kept_on_device
from normkernels.eager.layouts import channels_innermost, empty_output
from normkernels.primitives.spectral_filter import eager
from normkernels.triton.arguments import Matrix
from normkernels.triton.configs import Config, configuration, padded
from normkernels.triton.launch import launch, within_32_bits
from normkernels.triton.support import architecture, check_supported, properties

# --- planes ---------------------------------------------------------------------------------------------------------


@triton.jit
def on_window(position, start, count, STEP: tl.constexpr):
    """Return the index in a window of a position of the plane, and whether the window has it."""
    index = position - start
    inside = index >= 0
    if STEP > 1:
        inside = inside & (index % STEP == 0)
        index = index // STEP
    return index, inside & (index < count)


@triton.jit
def halves(start, count, STRIDE: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return offsets and masks of the first half of a line of n positions, and of its mirror image.

    The middle of an odd n is its own mirror image: it is in the first half only.
    """
    position = tl.arange(0, K)
    near, near_mask = on_window(position, start, count, STEP)
    far, far_mask = on_window(N - 1 - position, start, count, STEP)
    near_mask = near_mask & (position < (N + 1) // 2)
    far_mask = far_mask & (position < N // 2)
    if N * STRIDE >= 2**30:
        near, far = near.to(tl.int64), far.to(tl.int64)
    return near * STRIDE, near_mask, far * STRIDE, far_mask


@triton.jit
def both_halves(x, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Return the halves of the rows, and of the columns, of Planes."""
    rows = halves(x.top, x.height, x.row_stride, x.step_h, H, KH)
    return rows, halves(x.left, x.width, x.column_stride, x.step_w, W, KW)


@triton.jit
def quarter(planes, channel_mask, row, row_mask, column, column_mask, INNERMOST: tl.constexpr):
    """Return pointers and mask of a quarter of P planes: (KH, KW, P) if channels are innermost, else (KH, P, KW)."""
    if INNERMOST:
        at = planes[None, None, :] + (row[:, None, None] + column[None, :, None])
        mask = row_mask[:, None, None] & column_mask[None, :, None] & channel_mask[None, None, :]
    else:
        at = planes[None, :, None] + (row[:, None, None] + column[None, None, :])
        mask = row_mask[:, None, None] & channel_mask[None, :, None] & column_mask[None, None, :]
    return at, mask


@triton.jit
def load_quarter(planes, channel_mask, row, row_mask, column, column_mask, INNERMOST: tl.constexpr):
    """Return a quarter of P planes, (KH P, KW), in float32."""
    at, mask = quarter(planes, channel_mask, row, row_mask, column, column_mask, INNERMOST)
    tile = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if INNERMOST:
        tile = tl.permute(tile, (0, 2, 1))
    return tl.reshape(tile, (tile.shape[0] * tile.shape[1], tile.shape[2]))


@triton.jit
def store_quarter(planes, tile, channel_mask, row, row_mask, column, column_mask, INNERMOST: tl.constexpr):
    at, mask = quarter(planes, channel_mask, row, row_mask, column, column_mask, INNERMOST)
    tile = tl.reshape(tile, (row.shape[0], planes.shape[0], column.shape[0]))
    if INNERMOST:
        tile = tl.permute(tile, (0, 2, 1))
    tl.store(at, tile.to(planes.dtype.element_ty), mask=mask)


@triton.jit
def load_halves(planes, channel_mask, rows, columns, INNERMOST: tl.constexpr):
    """Return sum and difference of the upper and the lower half, on the left and mirrored on the right: (KH P, KW)."""
    up, up_mask, down, down_mask = rows
    left, left_mask, right, right_mask = columns
    a = load_quarter(planes, channel_mask, up, up_mask, left, left_mask, INNERMOST)
    b = load_quarter(planes, channel_mask, up, up_mask, right, right_mask, INNERMOST)
    c = load_quarter(planes, channel_mask, down, down_mask, left, left_mask, INNERMOST)
    d = load_quarter(planes, channel_mask, down, down_mask, right, right_mask, INNERMOST)
    return a + c, b + d, a - c, b - d


# --- the transform --------------------------------------------------------------------------------------------------


@triton.jit
def exchanged(tile, ROWS: tl.constexpr):
    """Transpose P matrices (ROWS, columns): (ROWS P, columns) -> (columns P, ROWS)."""
    columns: tl.constexpr = tile.shape[1]
    P: tl.constexpr = tile.shape[0] // ROWS
    return tl.reshape(tl.permute(tl.reshape(tile, (ROWS, P, columns)), (2, 1, 0)), (columns * P, ROWS))


@triton.jit
def product(left, waves, which, K: tl.constexpr, PRECISION: tl.constexpr):
    """Return left times matrix number ``which`` (see half_waves), by its even columns and its odd ones.

    Every warp needs the whole right operand, in two or three parts for the precision: at K = 32 half of it fits into
    registers beside the rest. The data is always the left operand, of which a warp has its rows only.
    """
    at = waves + which * (K * K) + tl.arange(0, K)[:, None] * K + tl.arange(0, K // 2)[None, :]
    even = tl.dot(left, tl.load(at), input_precision=PRECISION)
    odd = tl.dot(left, tl.load(at + K // 2), input_precision=PRECISION)
    return tl.reshape(tl.join(even, odd), (left.shape[0], K))


@triton.jit
def transform(
    first, second, waves_h, waves_w, pair, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a pair of blocks of the real DFT, transposed: (KW P, KH).

    They are cc and ss from ee and oo, or cs and sc from eo and oe.

    The barriers, here and below, are for the compiler: it would load all matrices at once, and keep them.
    """
    tl.debug_barrier()
    first = exchanged(product(first, waves_w, 2 + pair, KW, PRECISION), KH)
    first = product(first, waves_h, 2, KH, PRECISION)
    second = exchanged(product(second, waves_w, 3 - pair, KW, PRECISION), KH)
    second = product(second, waves_h, 3, KH, PRECISION)
    return first, second


@triton.jit
def inverse(
    first, second, waves_h, waves_w, pair, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the even and odd parts, (KH P, KW), from a pair of blocks."""
    tl.debug_barrier()
    first = exchanged(product(first, waves_h, 0, KH, PRECISION), KW)
    first = product(first, waves_w, pair, KW, PRECISION)
    second = exchanged(product(second, waves_h, 1, KH, PRECISION), KW)
    second = product(second, waves_w, 1 - pair, KW, PRECISION)
    return first, second


@triton.jit
def spectrum_of(data, first, STRIDE: tl.constexpr, P: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Return pointers (KW P, KH) to P channels' values at each frequency, in memory for a whole number of programs."""
    row = tl.arange(0, KW * P)[:, None]
    return data + first.to(tl.int64) * STRIDE + (row % P * STRIDE + row // P * KH + tl.arange(0, KH)[None, :])


@triton.jit
def sine_frequency(slot, N: tl.constexpr):
    """Return the frequency of a slot's sine: slot 0 has that of n / 2, because the sine of frequency 0 is no wave.

    The cosine of n / 2 is no wave either.
    """
    return tl.where(slot == 0, N // 2, slot)


@triton.jit
def even_part(start, v, u, w, mask, H: tl.constexpr, W: tl.constexpr):
    """Return A(u, w) and B(u, w) of the filter that begins there. The loads at f and -f make the spectrum even."""
    minus_u, minus_w = tl.where(u == 0, 0, H - u) * v.row_stride, tl.where(w == 0, 0, W - w) * v.column_stride
    u, w = u * v.row_stride, w * v.column_stride
    plus = tl.load(start + u + w, mask=mask, other=0.0)
    plus += tl.load(start + minus_u + minus_w, mask=mask, other=0.0)
    minus = tl.load(start + u + minus_w, mask=mask, other=0.0)
    minus += tl.load(start + minus_u + w, mask=mask, other=0.0)
    return 0.25 * (plus + minus), 0.25 * (minus - plus)


@triton.jit
def coefficients_of_filter(v, channels, out, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Compute A of each block cc, ss, cs, sc, then B: (C, 5, KW, KH).

    B is zero where a frequency lacks its cosine or sine.
    """
    channel = tl.program_id(0).to(tl.int64)
    w, u = tl.arange(0, KW)[:, None], tl.arange(0, KH)[None, :]
    mask = (u < (H + 1) // 2) & (w < (W + 1) // 2) & (channel < channels)
    BLOCK: tl.constexpr = KH * KW
    start = v.data + channel * v.group_stride
    at = out + channel * (5 * BLOCK) + w * KH + u
    A, B = even_part(start, v, u, w, mask, H, W)
    tl.store(at, A)
    tl.store(at + 4 * BLOCK, tl.where((u > 0) & (w > 0), B, 0.0))
    A, _ = even_part(start, v, sine_frequency(u, H), sine_frequency(w, W), mask, H, W)
    tl.store(at + BLOCK, A)
    A, _ = even_part(start, v, u, sine_frequency(w, W), mask, H, W)
    tl.store(at + 2 * BLOCK, A)
    A, _ = even_part(start, v, sine_frequency(u, H), w, mask, H, W)
    tl.store(at + 3 * BLOCK, A)


# --- kernels on planes ----------------------------------------------------------------------------------------------


@triton.jit
def filter_planes(
    z, y, coefficients, waves_h, waves_w, channels,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Filter the planes z into y: P channels of one sample."""
    groups = tl.cdiv(channels, P)
    sample, first = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * P
    channel = first + tl.arange(0, P)
    real = channel < channels
    z_rows, z_columns = both_halves(z, H, W, KH, KW)
    z_at = z.data + sample * z.sample_stride + channel.to(tl.int64) * z.channel_stride
    e_left, e_right, o_left, o_right = load_halves(z_at, real, z_rows, z_columns, z.innermost)
    left, right = e_left + e_right, o_left - o_right
    next_left, next_right = e_left - e_right, o_left + o_right

    BLOCK: tl.constexpr = KH * KW
    at = spectrum_of(coefficients, first, 5 * BLOCK, P, KH, KW)
    plus = tl.zeros((KH * P, KW), tl.float32)
    minus, plus_before, minus_before = plus, plus, plus
    for pair in range(2):  # a loop, or the compiler would work on both at once and run out of registers
        plus_before, minus_before = plus, minus
        left, right = transform(left, right, waves_h, waves_w, pair, KH, KW, PRECISION)
        tl.debug_barrier()
        A_left, A_right = tl.load(at + 2 * pair * BLOCK), tl.load(at + (2 * pair + 1) * BLOCK)
        B = (1.0 - 2.0 * pair) * tl.load(at + 4 * BLOCK)
        left, right = A_left * left + B * right, A_right * right + B * left
        left, right = inverse(left, right, waves_h, waves_w, pair, KH, KW, PRECISION)
        plus, minus = left + right, left - right
        left, right = next_left, next_right

    y_rows, y_columns = both_halves(y, H, W, KH, KW)
    y_at = y.data + sample * y.sample_stride + channel.to(tl.int64) * y.channel_stride
    up, up_mask, down, down_mask = y_rows
    left, left_mask, right, right_mask = y_columns
    store_quarter(y_at, plus_before + plus, real, up, up_mask, left, left_mask, y.innermost)
    store_quarter(y_at, minus_before - minus, real, up, up_mask, right, right_mask, y.innermost)
    store_quarter(y_at, minus_before + minus, real, down, down_mask, left, left_mask, y.innermost)
    store_quarter(y_at, plus_before - plus, real, down, down_mask, right, right_mask, y.innermost)


@triton.jit
def partial_cross_spectrum(
    y, z, partial, waves_h, waves_w, samples, channels, chunk,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of A in the two blocks of a pair and that of B over ``chunk`` samples.

    They are (parts, C, 2, 3, KW, KH). A program has one pair: the sums of both do not fit into registers.
    """
    first, part, pair = tl.program_id(0) * P, tl.program_id(1), tl.program_id(2)
    sign = 1.0 - 2.0 * pair
    start = part * chunk
    stop = tl.minimum(start + chunk, samples)
    channel = first + tl.arange(0, P)
    real = channel < channels
    y_rows, y_columns = both_halves(y, H, W, KH, KW)
    z_rows, z_columns = both_halves(z, H, W, KH, KW)
    y_at = y.data + start.to(tl.int64) * y.sample_stride + channel.to(tl.int64) * y.channel_stride
    z_at = z.data + start.to(tl.int64) * z.sample_stride + channel.to(tl.int64) * z.channel_stride
    d_first = tl.zeros((KW * P, KH), tl.float32)
    d_second, d_B = d_first, d_first
    for _ in range(start, stop):
        e_left, e_right, o_left, o_right = load_halves(y_at, real, y_rows, y_columns, y.innermost)
        left, right = e_left + sign * e_right, o_left - sign * o_right
        y_first, y_second = transform(left, right, waves_h, waves_w, pair, KH, KW, PRECISION)
        tl.debug_barrier()
        e_left, e_right, o_left, o_right = load_halves(z_at, real, z_rows, z_columns, z.innermost)
        left, right = e_left + sign * e_right, o_left - sign * o_right
        z_first, z_second = transform(left, right, waves_h, waves_w, pair, KH, KW, PRECISION)
        d_first += y_first * z_first
        d_second += y_second * z_second
        d_B += sign * (y_first * z_second + y_second * z_first)
        y_at += y.sample_stride
        z_at += z.sample_stride

    BLOCK: tl.constexpr = KH * KW
    partial += part.to(tl.int64) * (tl.num_programs(0) * P) * (6 * BLOCK) + pair * (3 * BLOCK)
    at = spectrum_of(partial, first, 6 * BLOCK, P, KH, KW)
    tl.store(at, d_first)
    tl.store(at + BLOCK, d_second)
    tl.store(at + 2 * BLOCK, d_B)


@triton.jit
def slots(f, N: tl.constexpr):
    """Return the slot of a frequency 0..n - 1 of either sign, whether it has a cosine, a sine, and if f > n / 2."""
    beyond = 2 * f > N
    f = tl.where(beyond, N - f, f)
    nyquist = 2 * f == N
    return tl.where(nyquist, 0, f), nyquist == 0, f > 0, beyond


@triton.jit
def finish_cross_spectrum(
    partial, out, parts, part_stride,
    H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dv (C, H, W) from the parts, in their order. Frequencies f and -f share a gradient."""
    channel = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < H * W
    u, cos_h, sin_h, beyond_h = slots(index // W, H)
    w, cos_w, sin_w, beyond_w = slots(index % W, W)
    TILE: tl.constexpr = KH * KW
    at = partial + channel * (6 * TILE) + w * KH + u
    both = cos_h & sin_h & cos_w & sin_w
    dA, dB = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for _ in range(parts):
        dA += tl.load(at, mask=mask & cos_h & cos_w, other=0.0)
        dA += tl.load(at + TILE, mask=mask & sin_h & sin_w, other=0.0)
        dA += tl.load(at + 3 * TILE, mask=mask & cos_h & sin_w, other=0.0)
        dA += tl.load(at + 4 * TILE, mask=mask & sin_h & cos_w, other=0.0)
        dB += tl.load(at + 2 * TILE, mask=mask & both, other=0.0)
        dB += tl.load(at + 5 * TILE, mask=mask & both, other=0.0)
        at += part_stride
    total = tl.where(beyond_h == beyond_w, dA - dB, dA + dB)
    total *= tl.where(cos_h & sin_h, 0.5, 1.0) * tl.where(cos_w & sin_w, 0.5, 1.0)
    tl.store(out + channel * (H * W) + index, total.to(tl.float32), mask=mask)


# --- launchers ------------------------------------------------------------------------------------------------------

PROGRAMS = 8  # programs for each multiprocessor
FINISH_BLOCK = 256  # frequencies that a program of the second stage of cross_spectrum sums


@kept_on_device
def half_waves(n: int, size: int, device: torch.device) -> Tensor:
    """Return cosines, sines and their transposes on the first half of a line of n, about its middle: (4, size, size).

    Cosines and sines have a row for each frequency and a column for each position, zero beyond (n + 1) // 2. Even
    columns come before odd ones. They are made on the device, in the warm-up call that capturing a CUDA graph needs
    anyway.
    """
    used = (n + 1) // 2
    slot = torch.arange(used, dtype=torch.float64, device=device)
    waves = torch.zeros((2, size, size), dtype=torch.float64, device=device)
    for part, (frequency, wave) in enumerate(
        ((slot, torch.cos), (torch.where(slot == 0, n // 2, slot), torch.sin))
    ):  # the remainder, exact in float64, keeps the argument small
        angle = torch.outer(frequency, 2 * slot + 1).remainder(2 * n) * (math.pi / n)
        waves[part, :used, :used] = wave(angle) * math.sqrt(2 / n)
    waves[0, 0] *= math.sqrt(0.5)
    waves[1, 0] *= math.sqrt(0.5) if n % 2 == 0 else 0.0
    both = torch.cat((waves, waves.mT)).float()
    return torch.cat((both[..., 0::2], both[..., 1::2]), -1)


class Planes(NamedTuple):
    """A tensor (N, C, h, w) and where it lies on the planes: at (top, left), with a step along each side.

    A kernel takes it as one argument. The strides within a plane, the steps and the order of dimensions are compiled
    in: they become part of the load instructions, where variables would take a register for each address.
    """

    data: Tensor
    sample_stride: int
    channel_stride: int
    top: int
    height: int
    left: int
    width: int
    row_stride: tl.constexpr
    column_stride: tl.constexpr
    step_h: tl.constexpr
    step_w: tl.constexpr
    innermost: tl.constexpr


def placed(x: Tensor, window: Sequence[int]) -> Planes:
    """Return x on its window, (start, step) along each side."""
    (sample, channel, *strides), (height, width) = x.stride(), x.shape[2:]
    top, step_h, left, step_w = window
    constants = map(tl.constexpr, (*strides, step_h, step_w, channels_innermost(x)))
    return Planes(x, sample, channel, top, height, left, width, *constants)


class Plan(NamedTuple):
    """Tiles of a kernel on planes: ``groups`` of ``config.block`` channels."""

    sizes: dict[str, int]
    waves: tuple[Tensor, Tensor]
    groups: int
    config: Config


def plan(kernel: str, z: Tensor, h: int, w: int) -> Plan:
    tile_h, tile_w = (padded((n + 1) // 2) for n in (h, w))
    layout = "channels" if channels_innermost(z) else "positions"
    config = configuration(kernel, max(tile_h, tile_w), layout, z.dtype, architecture(z.device))
    waves = half_waves(h, tile_h, z.device), half_waves(w, tile_w, z.device)
    return Plan({"H": h, "W": w, "KH": tile_h, "KW": tile_w}, waves, -(-z.shape[1] // config.block), config)


def spectral_filter(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    h, w = v.shape[1:]
    check_supported(z, plane=(h, w))
    y = empty_output(z, (target[2], target[5]))
    if z.numel() == 0 or y.numel() == 0:
        return eager.spectral_filter(z, v, source, target)
    samples, channels = z.shape[:2]
    v = within_32_bits(v)
    sizes, waves, groups, config = plan("spectral_filter", z, h, w)
    coefficients = v.new_empty((groups * config.block, 5, sizes["KW"], sizes["KH"]))
    launch(
        coefficients_of_filter, (len(coefficients),), Matrix(v, *v.stride()), channels, coefficients,
        **sizes, config=Config(1, 4, 1, "ieee"), device=z.device,
    )  # fmt: skip
    launch(
        filter_planes, (samples * groups,),
        placed(z, source), placed(y, (*target[:2], *target[3:5])), coefficients, *waves, channels,
        **sizes, P=config.block, PRECISION=config.precision, config=config, device=z.device,
    )  # fmt: skip
    return y


def cross_spectrum(y: Tensor, z: Tensor, size: Sequence[int], of_y: Sequence[int], of_z: Sequence[int]) -> Tensor:
    h, w = size
    check_supported(z, plane=(h, w))
    if z.numel() == 0 or y.numel() == 0:
        return eager.cross_spectrum(y, z, size, of_y, of_z)
    samples, channels = z.shape[:2]
    sizes, waves, groups, config = plan("cross_spectrum", z, h, w)
    wanted = max(1, PROGRAMS * properties(z.device).processors // (2 * groups))
    chunk = -(-samples // min(wanted, samples))
    parts = -(-samples // chunk)
    partial = z.new_empty((parts, groups * config.block, 6, sizes["KW"], sizes["KH"]), dtype=torch.float32)
    launch(
        partial_cross_spectrum, (groups, parts, 2),
        placed(y, of_y), placed(z, of_z), partial, *waves, samples, channels, chunk,
        **sizes, P=config.block, PRECISION=config.precision, config=config, device=z.device,
    )  # fmt: skip
    result = z.new_empty((channels, h, w), dtype=torch.float32)
    launch(
        finish_cross_spectrum, (channels, -(-h * w // FINISH_BLOCK)), partial, result, parts, partial.stride(0),
        **sizes, BLOCK=FINISH_BLOCK, config=Config(FINISH_BLOCK, 4, 1, "ieee"), device=z.device,
    )  # fmt: skip
    return result
