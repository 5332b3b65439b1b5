"""iter_norm: moments, inverse_sqrt and whiten as one training op. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import (
    check_affine,
    check_data,
    check_inverse_sqrt_options,
    resolve_group_size,
    statistics_dtype,
)
from normkernels.dispatch import export
from normkernels.dispatch.autograd import call, gradients, in_types
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.eager.layouts import empty_output
from normkernels.primitives.inverse_sqrt.op import backward_flops, flops, inverse_sqrt, scale_length
from normkernels.primitives.iter_norm import eager, reference
from normkernels.primitives.moments.op import moments
from normkernels.primitives.whiten.op import whiten


def iter_norm(
    x: Tensor,
    group_size: int = 64,
    num_iterations: int = 5,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: str = "trace",
    method: str = "newton",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Whiten a batch with its own statistics: Algorithm 1 and 2 of IterNorm, or DBN with ``method="eigh"``.

    .. math:: y = \mathrm{diag}(\gamma)\, W (x - \mu) + \beta, \qquad W \approx (\Sigma + \epsilon I)^{-1/2}

    The values are those of ``moments``, ``inverse_sqrt`` and ``whiten`` in a row (see there for each equation), in
    three passes over the activations forward and five backward, as many as BatchNorm has.

    Args:
        x: (N, C, *) float16, bfloat16, float32 or float64.
        group_size: channels whitened together; a divisor of C, or more than C for one group.
        num_iterations, eps, scaling, method: as in :func:`inverse_sqrt`.
        weight, bias: (C,) gamma and beta, in x's or the statistics' type, or None.

    Returns:
        y: x's shape, type and layout.
        mean: (C,) and W: (G, d, d) in float32 (float64 for float64 x), for running statistics; no gradient flows
        through them (compose the three ops where it should).

    Saved for backward: x and, per group, two (d, d) matrices. Double backward works for method="newton".

    Raises:
        TypeError, ValueError: as :func:`moments`, :func:`inverse_sqrt` and :func:`whiten`.
    """
    check_data("x", x)
    d = resolve_group_size(x.shape[1], group_size)
    frobenius, eigh = check_inverse_sqrt_options(num_iterations, eps, scaling, method)
    check_affine(x, weight, bias)
    arguments = (x, weight, bias, d, num_iterations, float(eps), frobenius, eigh)
    y, mean, W, *_ = call(ITER_NORM, *arguments)
    return y, mean, W


class _IterNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.normkernels.iter_norm(x, weight, bias, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, W, saved_matrix, saved_scale = ctx.saved_tensors
        group_size, num_iterations, eps, frobenius, eigh = ctx.options
        if torch.is_grad_enabled():

            def path(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                _, mean, cov = moments(x, group_size)
                names = "frobenius" if frobenius else "trace", "eigh" if eigh else "newton"
                return whiten(x, mean, inverse_sqrt(cov, num_iterations, eps, *names), weight, bias)

            return (*gradients(path, grad, x, weight, bias), *[None] * 5)
        grad_x, *of_parameters = torch.ops.normkernels.iter_norm_backward(
            grad, x, weight, mean, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh
        )
        return (grad_x, *in_types(of_parameters, (weight, bias)), *[None] * 5)


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    num_iterations: int,
    eps: float,
    frobenius: bool,
    eigh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    d = group_size
    g = x.shape[1] // d
    return (
        empty_output(x),
        x.new_empty(g * d, dtype=dtype),
        x.new_empty((g, d, d), dtype=dtype),
        x.new_empty((g, d, d), dtype=dtype),
        x.new_empty((g, scale_length(d, eigh)), dtype=dtype),
    )


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(x), torch.empty_like(mean), torch.empty_like(mean)


def _flops(x: tuple[int, ...], weight: Any, bias: Any, group_size: int, *options: Any) -> int:
    small = (x[1] // group_size, group_size, group_size)
    return 4 * group_size * math.prod(x) + flops(small, *options)


def _backward_flops(grad: Any, x: tuple[int, ...], weight: Any, mean: Any, W: tuple[int, ...], *rest: Any) -> int:
    return 6 * W[1] * math.prod(x) + backward_flops(W, *rest[2:])


ITER_NORM = define(
    Op(
        schema="iter_norm(Tensor x, Tensor? weight, Tensor? bias, int group_size, int num_iterations, float eps, "
        "bool frobenius, bool eigh) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        eager=eager.iter_norm,
        kernels=("moments", "merge", "newton", "mix"),
        fake=_fake,
        autograd=_IterNorm,
        channels=((1, 0, 0), (1, 0, 0, 0, 0)),
        onnx=export.refuse_batch_statistics,
        request=lambda x, weight, bias, group_size, *_: Request(x, group_size),
        reference=reference.iter_norm,
        tolerance=reference.tolerance,
        samples=reference.samples,
        flops=_flops,
    )
)
ITER_NORM_BACKWARD = define(
    Op(
        schema="iter_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor W, Tensor saved_matrix, "
        "Tensor saved_scale, int num_iterations, bool frobenius, bool eigh) -> (Tensor, Tensor, Tensor)",
        eager=eager.iter_norm_backward,
        kernels=("cross_moments", "merge", "newton", "stacked_mix"),
        fake=_backward_fake,
        channels=((1, 1, 0, 0, 0, 0, 0), (1, 0, 0)),
        request=lambda grad, x, weight, mean, W, *_: Request(x, W.shape[1]),
        reference=reference.iter_norm_backward,
        tolerance=reference.backward_tolerance,
        samples=reference.backward_samples,
        flops=_backward_flops,
    )
)
