"""Triton implementation of POP-Norm: two launches forward and two backward, with as many passes as BatchNorm.

reduce (parts of the data) -> map, whose programs merge the parts for their own channels first, in both directions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.eager.layouts import empty_output
from normkernels.primitives.pop_norm import eager
from normkernels.triton.diagonal import (
    BATCH,
    map_columns,
    mapping,
    merged_moments,
    merged_sums,
    of_channels,
    reduce_cross,
    reduce_moments,
)
from normkernels.triton.launch import launch
from normkernels.triton.support import check_supported


@triton.jit
def factors(mean, var, weight, bias, kappa, eps, channel, channels, CENTER: tl.constexpr, SCALE: tl.constexpr):
    """Return a = gamma / (kappa r), 1 / (kappa r), r and beta, as in eager.factors."""
    beta = of_channels(bias, channel, channels, 0.0)
    if SCALE:
        lever = beta if CENTER else mean
        r = tl.sqrt_rn(var + lever * lever + eps)
        inverse = 1.0 / (kappa * r)
    else:
        r = tl.full(channel.shape, 1.0, tl.float32)
        inverse = r
    return inverse * of_channels(weight, channel, channels, 1.0), inverse, r, beta


@triton.jit(do_not_specialize=["columns"])
def normalize(
    shift, delta, square, parts, part_chunk, weight, bias, kappa, eps, mean_out, var_out,
    x, sample_stride, channel_stride, position_stride, positions,
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, channels, columns, chunk,
    CENTER: tl.constexpr, SCALE: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUN2: tl.constexpr, Y_RUN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute mean, variance, and y = a (x - mean) + a (beta + mean - exact mean), or a x."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, left_out, var = merged_moments(
        shift, delta, square, parts, part_chunk, columns, channels, channel, ROWS, BATCH
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(mean_out + channel, mean, mask=channel < channels)
        tl.store(var_out + channel, var, mask=channel < channels)
    a, _, _, beta = factors(mean, var, weight, bias, kappa, eps, channel, channels, CENTER, SCALE)
    zero = tl.zeros((ROWS,), tl.float32)
    map_columns(
        x, sample_stride, channel_stride, position_stride, positions, mean if CENTER else zero, a,
        None, 0, 0, 0, 1, zero, zero, a * (beta - left_out) if CENTER else zero,
        y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, channel, channels, columns, chunk,
        BLOCK, RUN, RUN2, Y_RUN, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def normalize_backward(
    sum_y, sum_x, cross, parts, weight, bias, kappa, eps, mean, var, grad_weight_out, grad_bias_out,
    y, y_sample_stride, y_channel_stride, y_position_stride, y_positions,
    x, sample_stride, channel_stride, position_stride, positions,
    out, out_sample_stride, out_channel_stride, out_position_stride, out_positions, channels, columns, chunk,
    CENTER: tl.constexpr, SCALE: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUN2: tl.constexpr, Y_RUN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dgamma, dbeta, and dx = a dy + q (x - mean) + constant; without SCALE x is None, because q = 0."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m, zero = columns.to(tl.float32), tl.zeros((ROWS,), tl.float32)
    shift = of_channels(mean, channel, channels, 0.0)
    a, inverse, r, beta = factors(
        shift, of_channels(var, channel, channels, 0.0), weight, bias, kappa, eps, channel, channels, CENTER, SCALE
    )  # fmt: skip
    f, offset, q, grad_weight, grad_bias, constant = zero, zero, zero, zero, zero, zero
    if CENTER:
        f = merged_sums(sum_y, parts, channels, channel, ROWS, BATCH)
        if SCALE:  # the offset that the mean's rounding leaves in x - mean, taken out of everything linear in that
            offset = merged_sums(sum_x, parts, channels, channel, ROWS, BATCH) / m
    if SCALE:
        D = merged_sums(cross, parts, channels, channel, ROWS, BATCH) - offset * f
        e = D + beta * f  # sum dy x~
        q = -a * e / (m * r * r)
        grad_weight = e * inverse
    if CENTER:
        grad_bias = f
        if SCALE:  # rejected: f - beta e / r^2, which loses (beta / sigma)^2 of its digits
            spread = of_channels(var, channel, channels, 0.0) + eps
            grad_bias = a * (f * spread - beta * D) / (r * r)
        constant = -(a * f / m + q * offset)
    if tl.program_id(1) == 0:
        tl.store(grad_weight_out + channel, grad_weight, mask=channel < channels)
        tl.store(grad_bias_out + channel, grad_bias, mask=channel < channels)
    map_columns(
        y, y_sample_stride, y_channel_stride, y_position_stride, y_positions, zero, a,
        x, sample_stride, channel_stride, position_stride, positions, shift if CENTER else zero, q, constant,
        out, out_sample_stride, out_channel_stride, out_position_stride, out_positions,
        channel, channels, columns, chunk, BLOCK, RUN, RUN2, Y_RUN, WIDE,
    )  # fmt: skip


def pop_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool, scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_supported(x)
    if x.numel() == 0:
        return full_precision(eager.pop_norm)(x, weight, bias, kappa, eps, center, scale)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    partials = reduce_moments(x)
    y = empty_output(x)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    given = mapping([x], y)
    launch(
        normalize, given.grid, *partials.vectors, *partials.cut, weight, bias, kappa, eps, mean, var,
        *given.sources[0], *given.result, CENTER=center, SCALE=scale, BATCH=BATCH, **given.meta,
    )  # fmt: skip
    return y, mean, var


def pop_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    kappa: float,
    eps: float,
    center: bool,
    scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_supported(x)
    if x.numel() == 0:
        return full_precision(eager.pop_norm_backward)(grad, x, weight, bias, mean, var, kappa, eps, center, scale)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    mean, var = mean.contiguous(), var.contiguous()
    # Without scale x has no part in dx, and is not read.
    partials = reduce_cross(grad, x if scale else None, mean if center and scale else None)
    grad_x, grad_weight, grad_bias = empty_output(x), torch.empty_like(mean), torch.empty_like(mean)
    given = mapping([grad, x] if scale else [grad], grad_x)
    launch(
        normalize_backward, given.grid, *partials.vectors, partials.cut.parts,
        weight, bias, kappa, eps, mean, var, grad_weight, grad_bias,
        *given.sources[0], *given.sources[1], *given.result, CENTER=center, SCALE=scale, BATCH=BATCH, **given.meta,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias
