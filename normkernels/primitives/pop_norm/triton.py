"""Triton implementation of POP-Norm: two launches forward and two backward, with as many passes as BatchNorm.

reduce (parts of the data) -> map, whose programs merge the parts for their own channels first, in both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkernels.dispatch.precision import full_precision
from normkernels.eager.layouts import empty_output
from normkernels.primitives.pop_norm import eager
from normkernels.triton.arguments import Affine
from normkernels.triton.diagonal import (
    CHANNEL_BATCH,
    map_columns,
    mapping,
    merged_moments,
    merged_sums,
    of_channels,
    reduce_channel_cross,
    reduce_channel_moments,
)
from normkernels.triton.launch import columns, launch
from normkernels.triton.support import check_supported


@triton.jit
def factors(mean, var, norm, channel, channels, CENTER: tl.constexpr, SCALE: tl.constexpr):
    """Return a = gamma / (kappa r), 1 / (kappa r), r and beta, as in eager.factors."""
    beta = of_channels(norm.bias, channel, channels, 0.0)
    if SCALE:
        lever = beta if CENTER else mean
        r = tl.sqrt_rn(var + lever * lever + norm.eps)
        inverse = 1.0 / (norm.kappa * r)
    else:
        r = tl.full(channel.shape, 1.0, tl.float32)
        inverse = r
    return inverse * of_channels(norm.weight, channel, channels, 1.0), inverse, r, beta


@triton.jit(do_not_specialize=["columns"])
def normalize(
    partial, cut, norm, mean_out, var_out, x, y, channels, columns, chunk,
    CENTER: tl.constexpr, SCALE: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute mean, variance, and y = a (x - mean) + a (beta + mean - exact mean), or a x."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, left_out, var = merged_moments(partial, cut, columns, channels, channel, ROWS, BATCH)
    if tl.program_id(1) == 0:
        tl.store(mean_out + channel, mean, mask=channel < channels)
        tl.store(var_out + channel, var, mask=channel < channels)
    a, _, _, beta = factors(mean, var, norm, channel, channels, CENTER, SCALE)
    zero = tl.zeros((ROWS,), tl.float32)
    constant = a * (beta - left_out) if CENTER else zero
    map_columns(
        x, mean if CENTER else zero, a, None, zero, zero, constant, y, channel, channels, columns, chunk, BLOCK, WIDE
    )


@triton.jit(do_not_specialize=["columns"])
def normalize_backward(
    partial, parts, norm, mean, var, grad_out, grad, x, grad_x, channels, columns, chunk,
    CENTER: tl.constexpr, SCALE: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dgamma, dbeta, and dx = a dy + q (x - mean) + constant; without SCALE x is None, because q = 0."""
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m, zero = columns.to(tl.float32), tl.zeros((ROWS,), tl.float32)
    shift = of_channels(mean, channel, channels, 0.0)
    a, inverse, r, beta = factors(
        shift, of_channels(var, channel, channels, 0.0), norm, channel, channels, CENTER, SCALE
    )
    f, offset, q, grad_weight, grad_bias, constant = zero, zero, zero, zero, zero, zero
    if CENTER:
        f = merged_sums(partial.sum_y, parts, channels, channel, ROWS, BATCH)
        if SCALE:  # the offset that the mean's rounding leaves in x - mean, taken out of everything linear in that
            offset = merged_sums(partial.sum_x, parts, channels, channel, ROWS, BATCH) / m
    if SCALE:
        D = merged_sums(partial.cross, parts, channels, channel, ROWS, BATCH) - offset * f
        e = D + beta * f  # sum dy x~
        q = -a * e / (m * r * r)
        grad_weight = e * inverse
    if CENTER:
        grad_bias = f
        if SCALE:  # rejected: f - beta e / r^2, which loses (beta / sigma)^2 of its digits
            spread = of_channels(var, channel, channels, 0.0) + norm.eps
            grad_bias = a * (f * spread - beta * D) / (r * r)
        constant = -(a * f / m + q * offset)
    if tl.program_id(1) == 0:
        tl.store(grad_out.weight + channel, grad_weight, mask=channel < channels)
        tl.store(grad_out.bias + channel, grad_bias, mask=channel < channels)
    map_columns(
        grad, zero, a, x, shift if CENTER else zero, q, constant, grad_x, channel, channels, columns, chunk, BLOCK, WIDE
    )  # fmt: skip


class Norm(NamedTuple):
    """The layer's weight and bias, (C,) each, and what its factors depend on."""

    weight: Tensor | None
    bias: Tensor | None
    kappa: float
    eps: float


def pop_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool, scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_supported(x)
    if x.numel() == 0:
        return full_precision(eager.pop_norm)(x, weight, bias, kappa, eps, center, scale)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    partial, cut = reduce_channel_moments(x)
    y = empty_output(x)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    given = mapping(1, y)
    launch(
        normalize, given.grid, partial, cut, Norm(weight, bias, kappa, eps), mean, var, columns(x), *given.result,
        CENTER=center, SCALE=scale, BATCH=CHANNEL_BATCH, **given.meta,
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
    partial, cut = reduce_channel_cross(grad, x if scale else None, mean if center and scale else None)
    grad_x, grad_weight, grad_bias = empty_output(x), torch.empty_like(mean), torch.empty_like(mean)
    given = mapping(2 if scale else 1, grad_x)
    launch(
        normalize_backward, given.grid, partial, cut.parts, Norm(weight, bias, kappa, eps), mean, var,
        Affine(grad_weight, grad_bias),
        columns(grad), columns(x) if scale else None, *given.result,
        CENTER=center, SCALE=scale, BATCH=CHANNEL_BATCH, **given.meta,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias
