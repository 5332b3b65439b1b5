"""whiten: one affine map per group over all samples. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_affine, check_data, check_like, check_tensor, statistics_dtype
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.eager.layouts import empty_output, in_layout_of
from normkernels.primitives.moments.op import cross_moments
from normkernels.primitives.whiten import eager, onnx, reference


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    r"""Centre, whiten and scale each group of channels.

    .. math:: y_g = \mathrm{diag}(\gamma_g)\, W_g (x_g - \mu_g) + \beta_g

    (IterNorm, eq. 16 with the learnable scale and shift of section 3.3.) It is inference, too, with the running
    mean and whitening matrix: one affine map per group.

    Args:
        x: (N, C, *) float16, bfloat16, float32 or float64.
        mean: (C,) float32 (float64 for float64 x).
        W: (G, d, d) of mean's type with G * d = C; it need not be symmetric.
        weight, bias: (C,) gamma and beta, in x's or mean's type, or None for 1 and 0.

    Returns:
        y: x's shape, type and layout (channels_last in, channels_last out). Differentiable in all inputs.

    Raises:
        TypeError, ValueError: a type, shape or device other than the ones above.
    """
    check_data("x", x)
    dtype = (statistics_dtype(x.dtype),)
    check_tensor("W", W)
    if W.dim() != 3 or W.shape[1] != W.shape[2] or W.shape[0] * W.shape[1] != x.shape[1]:
        raise ValueError(f"W: expected shape (G, d, d) with G * d = {x.shape[1]} channels, got {tuple(W.shape)}")
    check_like("W", W, tuple(W.shape), dtype, x)
    check_like("mean", mean, (x.shape[1],), dtype, x)
    check_affine(x, weight, bias)
    result: Tensor = call(WHITEN, x, mean, W, weight, bias)
    return result


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.normkernels.whiten(x, mean, W, weight, bias)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, mean, W, weight, bias = inputs
        ctx.save_for_backward(x, mean, W, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, W, weight = ctx.saved_tensors
        need_x, *need_others = ctx.needs_input_grad
        A = eager.affine(W, weight)
        grad_x = in_layout_of(x, whiten(grad, torch.zeros_like(mean), A.mT)) if need_x else None
        if not any(need_others):
            return grad_x, None, None, None, None
        D, f = cross_moments(grad, x, mean, W.shape[1])
        grad_mean = -(A * f.view(*W.shape[:2], 1)).sum(1).flatten()  # A^T f; a matmul would follow autocast
        grad_weight = None if weight is None else (D * W).sum(2).flatten().to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else f.to(ctx.bias_dtype)
        return grad_x, grad_mean, eager.affine(D, weight), grad_weight, grad_bias


def _whiten_fake(x: Tensor, *_: Any) -> Tensor:
    return empty_output(x)


def _stacked_mix_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_output(x)


WHITEN = define(
    Op(
        schema="whiten(Tensor x, Tensor mean, Tensor W, Tensor? weight, Tensor? bias) -> Tensor",
        eager=eager.whiten,
        kernels=("mix",),
        fake=_whiten_fake,
        autograd=_Whiten,
        channels=((1, 0, 0, 0, 0), (1,)),
        onnx=onnx.whiten,
        request=lambda x, mean, W, weight, bias: Request(x, W.shape[1]),
        reference=reference.whiten,
        tolerance=reference.whiten_tolerance,
        samples=reference.whiten_samples,
        flops=lambda x, mean, W, weight, bias: 2 * W[1] * math.prod(x),
    )
)
# matrix [grad - grad_mean; x - mean] + constant with matrix (G, d, 2 d): the last pass of every whitening backward, for
# callers that have found the matrix themselves. The fused ops have it inside.
STACKED_MIX = define(
    Op(
        schema="stacked_mix(Tensor grad, Tensor x, Tensor grad_mean, Tensor mean, Tensor matrix, Tensor constant) "
        "-> Tensor",
        eager=eager.stacked_mix,
        kernels=("stacked_mix",),
        fake=_stacked_mix_fake,
        channels=((1, 1, 0, 0, 0, 0), (1,)),
        request=lambda grad, x, grad_mean, mean, matrix, constant: Request(x, matrix.shape[1]),
        reference=reference.stacked_mix,
        tolerance=reference.stacked_mix_tolerance,
        samples=reference.stacked_mix_samples,
        flops=lambda grad, x, grad_mean, mean, matrix, constant: 4 * matrix[1] * math.prod(x),
    )
)
