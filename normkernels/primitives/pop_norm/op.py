"""pop_norm: Pre-Operation Normalization as one training op. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_affine, check_data, check_flag, check_number, statistics_dtype
from normkernels.dispatch import export
from normkernels.dispatch.autograd import call, gradients, in_types
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.eager.layouts import empty_output
from normkernels.primitives.moments.op import moments
from normkernels.primitives.pop_norm import eager, reference
from normkernels.primitives.whiten.op import whiten


def pop_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kappa: float = 4.0,
    eps: float = 1e-5,
    center: bool = True,
    scale: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Remove each channel's mean and divide by its scaled root mean square (POP-Norm, eq. 11, 12, 18, 19).

    .. math:: \tilde x = x - \mu + \beta, \qquad
              y = \frac{\gamma\, \tilde x}{\kappa \sqrt{\frac1m \sum_i \tilde x_i^2 + \epsilon}}

    over the m = N * prod(spatial) samples of a channel. Without ``center`` x~ = x, without ``scale`` y = x~. It moves
    as many bytes as BatchNorm: three passes over the activations forward and five backward.

    Args:
        x: (N, C, *) float16, bfloat16, float32 or float64.
        weight: (C,) gamma, in x's or the statistics' type, or None for 1; None without ``scale``.
        bias: (C,) beta, as weight, or None for 0; None without ``center``.
        kappa: at least 1.
        eps: added to the second moment, in the units of x squared; the paper has none.
        center, scale: at least one of them.

    Returns:
        y: x's shape, type and layout.
        mean, var: (C,) float32 (float64 for float64 x), biased, for running statistics; no gradient flows through them.

    It is differentiable in x, weight and bias, any number of times.

    Raises:
        TypeError, ValueError: a type, shape, device or option other than the ones above.
    """
    check_data("x", x)
    check_affine(x, weight, bias)
    check_options(kappa, eps, center, scale)
    for name, value, flag, use in (("weight", weight, scale, "scale"), ("bias", bias, center, "center")):
        if value is not None and not flag:
            raise ValueError(f"{name}: expected None with {use}=False, got a tensor of shape {tuple(value.shape)}")
    arguments = (x, weight, bias, float(kappa), float(eps), bool(center), bool(scale))
    y, mean, var = call(POP_NORM, *arguments)
    return y, mean, var


def check_options(kappa: float, eps: float, center: bool, scale: bool) -> None:
    check_number("kappa", kappa, minimum=1.0)
    check_number("eps", eps)
    check_flag("center", center)
    check_flag("scale", scale)
    if not (center or scale):
        raise ValueError("center, scale: expected at least one to be True, got False for both")


class _PopNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.normkernels.pop_norm(x, weight, bias, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():

            def path(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                _, mean, cov = moments(x, 1)
                return affine_map(x, mean, cov.flatten(), weight, bias, *ctx.options)

            return (*gradients(path, grad, x, weight, bias), *[None] * 4)
        grad_x, *of_parameters = torch.ops.normkernels.pop_norm_backward(grad, x, weight, bias, mean, var, *ctx.options)
        return (grad_x, *in_types(of_parameters, (weight, bias)), *[None] * 4)


def affine_map(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kappa: float,
    eps: float,
    center: bool,
    scale: bool,
) -> Tensor:
    """Apply ``pop_norm`` with given statistics, as in evaluation: y = a (x - mu) + a beta or a x; see eager.factors."""
    a, _, beta = eager.factors(mean, var, weight, bias, kappa, eps, center, scale)
    if center:
        return whiten(x, mean, a.view(-1, 1, 1), bias=a * beta)
    return whiten(x, torch.zeros_like(mean), a.view(-1, 1, 1))


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    return empty_output(x), x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(x), torch.empty_like(mean), torch.empty_like(mean)


POP_NORM = define(
    Op(
        schema="pop_norm(Tensor x, Tensor? weight, Tensor? bias, float kappa, float eps, bool center, bool scale) "
        "-> (Tensor, Tensor, Tensor)",
        eager=eager.pop_norm,
        kernels=("moments", "mix"),
        fake=_fake,
        autograd=_PopNorm,
        channels=((1, 0, 0), (1, 0, 0)),
        onnx=export.refuse_batch_statistics,
        request=lambda x, *_: Request(x, 1),
        reference=reference.pop_norm,
        tolerance=lambda x, *_: reference.tolerance(x),
        samples=reference.samples,
        flops=lambda x, *_: 4 * math.prod(x),
    )
)
POP_NORM_BACKWARD = define(
    Op(
        schema="pop_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
        "float kappa, float eps, bool center, bool scale) -> (Tensor, Tensor, Tensor)",
        eager=eager.pop_norm_backward,
        kernels=("cross_moments", "mix", "stacked_mix"),
        fake=_backward_fake,
        channels=((1, 1, 0, 0, 0, 0), (1, 0, 0)),
        request=lambda grad, x, *_: Request(x, 1),
        reference=reference.pop_norm_backward,
        tolerance=lambda grad, *_: 2 * reference.tolerance(grad),
        samples=reference.backward_samples,
        flops=lambda grad, x, *_: 6 * math.prod(x),
    )
)
