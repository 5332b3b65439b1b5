"""moments and cross_moments: the reductions over all samples. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_data, check_like, resolve_group_size, statistics_dtype
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define, differentiable
from normkernels.dispatch.record import Op, Request
from normkernels.eager.layouts import in_layout_of
from normkernels.primitives.moments import eager, reference


def moments(x: Tensor, group_size: int = 64) -> tuple[int, Tensor, Tensor]:
    r"""Return count, mean and group-wise biased covariance of a batch.

    .. math:: \mu = \frac1m \sum_i x_i, \qquad
              \Sigma_g = \frac1m \sum_i (x_i - \mu)_g (x_i - \mu)_g^\top

    with m = N * prod(spatial) samples (IterNorm, eq. 11 to 13, without eps I).

    Args:
        x: (N, C, *) float16, bfloat16, float32 or float64; channels_last is read in place.
        group_size: channels d per group; a divisor of C, or more than C for one group.

    Returns:
        count: m, an int. An empty batch has count 0, mean 0 and covariance 0.
        mean: (C,) float32 (float64 for float64 x).
        cov: (G, d, d) of the same type, symmetric.

    It is differentiable in x, any number of times. Large means do not cost precision: the sums are shifted.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has fewer than two dimensions, or group_size does not divide C.
    """
    check_data("x", x)
    d = resolve_group_size(x.shape[1], group_size)
    mean, _, cov = call(MOMENTS, x, d, False)
    return x.numel() // x.shape[1], mean, cov


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int = 64) -> tuple[Tensor, Tensor]:
    r"""Return sums of products of two batches, the reduction of every whitening backward.

    .. math:: D_g = \sum_i y_{i,g} (x_i - \mu)_g^\top, \qquad f = \sum_i y_i

    (IterNorm, eq. 21 and Algorithm 2 step 5, without the 1/m.)

    Args:
        y, x: (N, C, *) of one shape and type.
        mean: (C,) in the statistics' type.
        group_size: as in :func:`moments`.

    Returns:
        D (G, d, d) and f (C,), in the statistics' type. Differentiable in y, x and mean.

    Raises:
        TypeError, ValueError: as :func:`moments`, or the shapes, types or devices do not match.
    """
    check_data("x", x)
    d = resolve_group_size(x.shape[1], group_size)
    check_like("y", y, tuple(x.shape), (x.dtype,), x)
    check_like("mean", mean, (x.shape[1],), (statistics_dtype(x.dtype),), x)
    result: tuple[Tensor, Tensor] = call(CROSS_MOMENTS, y, x, mean, d)
    return result


class _Moments(torch.autograd.Function):
    """The op that computes mean, the remainder that rounding the mean left out, and covariance.

    The remainder shows in y where means are large (iter_norm). It is a number of its own, because not every device has
    float64. ``exact`` asks for a covariance that an eigendecomposition may rely on: in float64, on the CPU where the
    device lacks that.
    """

    @staticmethod
    def forward(x: Tensor, group_size: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.normkernels.moments(x, group_size, exact)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, _: Any, grad_cov: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        m = max(x.numel() // x.shape[1], 1)
        matrix = ((grad_cov + grad_cov.mT) / m).to(mean.dtype)
        return differentiable("whiten")(x, mean, matrix, None, grad_mean / m), None, None


class _CrossMoments(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.normkernels.cross_moments(y, x, mean, group_size)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        y, x, mean, _ = inputs
        ctx.save_for_backward(y, x, mean, output[1])

    @staticmethod
    def backward(ctx: Any, grad_cross: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, x, mean, sum_y = ctx.saved_tensors
        mix = differentiable("whiten")
        grad_y = in_layout_of(y, mix(x, mean, grad_cross, None, grad_sum))
        grad_x = in_layout_of(x, mix(y, torch.zeros_like(mean), grad_cross.mT, None, None))
        grad_mean = -(grad_cross * sum_y.view(*grad_cross.shape[:2], 1)).sum(1).flatten()
        return grad_y, grad_x, grad_mean, None


def _moments_fake(x: Tensor, group_size: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    mean, remainder = (x.new_empty(channels, dtype=dtype) for _ in range(2))
    shape = (channels // group_size, group_size, group_size)
    return mean, remainder, x.new_empty(shape, **eager.kind_of_covariance(x, exact))


def _cross_moments_fake(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return mean.new_empty((x.shape[1] // group_size, group_size, group_size)), torch.empty_like(mean)


MOMENTS = define(
    Op(
        schema="moments(Tensor x, int group_size, bool exact) -> (Tensor, Tensor, Tensor)",
        eager=eager.moments,
        kernels=("moments", "merge"),
        fake=_moments_fake,
        autograd=_Moments,
        channels=((1,), (0, 0, 0)),
        request=lambda x, group_size, exact: Request(x, group_size),
        reference=reference.moments,
        tolerance=lambda x, *_: reference.tolerance(x),
        samples=reference.moments_samples,
        flops=lambda x, group_size, exact: 2 * group_size * math.prod(x),
    )
)
CROSS_MOMENTS = define(
    Op(
        schema="cross_moments(Tensor y, Tensor x, Tensor mean, int group_size) -> (Tensor, Tensor)",
        eager=eager.cross_moments,
        kernels=("cross_moments", "merge"),
        fake=_cross_moments_fake,
        autograd=_CrossMoments,
        channels=((1, 1, 0), (0, 0)),
        request=lambda y, x, mean, group_size: Request(x, group_size),
        reference=reference.cross_moments,
        tolerance=lambda y, *_: reference.tolerance(y),
        samples=reference.cross_moments_samples,
        flops=lambda y, x, mean, group_size: 2 * group_size * math.prod(x),
    )
)
