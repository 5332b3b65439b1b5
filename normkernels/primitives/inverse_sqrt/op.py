"""inverse_sqrt: the small matrix function between the two passes over the data. Algebra in DERIVATION.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_inverse_sqrt_options, check_tensor
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define
from normkernels.dispatch.precision import full_precision
from normkernels.dispatch.record import Op, Request
from normkernels.primitives.inverse_sqrt import eager, reference


def inverse_sqrt(
    cov: Tensor, num_iterations: int = 5, eps: float = 1e-5, scaling: str = "trace", method: str = "newton"
) -> Tensor:
    r"""Return the whitening matrix of each group from its covariance.

    ``method="newton"`` (IterNorm, eq. 14, 15, 17), with :math:`S = (\Sigma + \epsilon I) / \varphi`:

    .. math:: P_0 = I, \quad P_k = \tfrac12 (3 P_{k-1} - P_{k-1}^3 S), \quad W = P_T / \sqrt{\varphi}

    where :math:`\varphi` bounds the largest eigenvalue: the trace (the paper's), or the Frobenius norm, which is
    tighter and so whitens more in the same number of iterations.
    ``method="eigh"`` (DBN, eq. 2): :math:`W = U (\Lambda + \epsilon I)^{-1/2} U^\top`, exact. Sums
    :math:`\Lambda_i + \epsilon` below 1.1e-19, or below d roundings of the largest eigenvalue, count as that much.

    Args:
        cov: (G, d, d) float32 or float64, symmetric positive semi-definite, without eps.
        num_iterations: T >= 0 of Newton's method; eigh ignores it.
        eps: added to the diagonal, >= 0, in the units of cov.
        scaling: "trace" or "frobenius"; eigh ignores it.
        method: "newton" or "eigh".

    Returns:
        W: (G, d, d) of cov's type. A group whose covariance is not finite gives NaN, and no exception.

    The gradient with respect to cov is the symmetric one, finite at equal eigenvalues. It can be differentiated again
    for "newton"; for "eigh" that raises NotImplementedError.

    Raises:
        TypeError: cov is not a float32 or float64 tensor, or an option has the wrong type.
        ValueError: cov is not (G, d, d), T or eps is negative, or an option is unknown.
    """
    check_tensor("cov", cov)
    if cov.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cov: expected float32 or float64, got {cov.dtype}")
    if cov.dim() != 3 or cov.shape[1] != cov.shape[2]:
        raise ValueError(f"cov: expected shape (G, d, d), got {tuple(cov.shape)}")
    frobenius, eigh = check_inverse_sqrt_options(num_iterations, eps, scaling, method)
    W: Tensor = call(INVERSE_SQRT, cov, num_iterations, float(eps), frobenius, eigh)[0]
    return W


class _InverseSqrt(torch.autograd.Function):
    @staticmethod
    def forward(
        cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.normkernels.inverse_sqrt(
            cov, num_iterations, eps, frobenius, eigh
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        cov, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(cov, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        cov, W, saved_matrix, saved_scale = ctx.saved_tensors
        num_iterations, eps, frobenius, eigh = ctx.options
        if torch.is_grad_enabled():
            grad_cov = full_precision(_differentiable_adjoint)(grad, cov, num_iterations, eps, frobenius, eigh)
        else:
            grad_cov = torch.ops.normkernels.inverse_sqrt_backward(
                grad, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh
            )
        return grad_cov, None, None, None, None


def _differentiable_adjoint(
    grad: Tensor, cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool
) -> Tensor:
    """Return the same gradient in differentiable PyTorch, for backward(create_graph=True)."""
    if eigh:
        raise NotImplementedError(
            "inverse_sqrt: expected a first derivative for method='eigh', got create_graph=True; "
            "the second derivative exists for method='newton'"
        )
    W, saved_matrix, saved_scale = eager.inverse_sqrt(eager.sym(cov), num_iterations, eps, frobenius, eigh)
    return eager.inverse_sqrt_backward(grad, W, saved_matrix, saved_scale, num_iterations, frobenius, eigh)


def _fake(cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool) -> tuple[Tensor, Tensor, Tensor]:
    g, d, _ = cov.shape
    return cov.new_empty((g, d, d)), cov.new_empty((g, d, d)), cov.new_empty((g, scale_length(d, eigh)))


def scale_length(d: int, eigh: bool) -> int:
    """Return the length of a group's ``scale``: one number for newton, the roots of all eigenvalues for eigh."""
    return d if eigh else 1


def _backward_fake(grad: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape)


def flops(cov: tuple[int, ...], num_iterations: int, eps: float, frobenius: bool, eigh: bool) -> int:
    """Return the FLOPs of 3 (T - 1) products, or of a symmetric eigendecomposition (9 d^3) and a product."""
    groups, d, _ = cov
    return groups * d**3 * (11 if eigh else 6 * max(num_iterations - 1, 0))


def backward_flops(W: tuple[int, ...], num_iterations: int, frobenius: bool, eigh: bool) -> int:
    """Return the FLOPs of 7 (T - 1) products, or of four."""
    groups, d, _ = W
    return groups * d**3 * (8 if eigh else 14 * max(num_iterations - 1, 0))


INVERSE_SQRT = define(
    Op(
        schema="inverse_sqrt(Tensor cov, int num_iterations, float eps, bool frobenius, bool eigh) "
        "-> (Tensor, Tensor, Tensor)",
        eager=eager.inverse_sqrt,
        kernels=("newton",),
        fake=_fake,
        autograd=_InverseSqrt,
        channels=((0,), (0, 0, 0)),
        request=lambda cov, *_: Request(cov, cov.shape[1]),
        reference=reference.inverse_sqrt,
        tolerance=reference.tolerance,
        samples=reference.samples,
        flops=flops,
    )
)
INVERSE_SQRT_BACKWARD = define(
    Op(
        schema="inverse_sqrt_backward(Tensor grad, Tensor W, Tensor saved_matrix, Tensor saved_scale, "
        "int num_iterations, bool frobenius, bool eigh) -> Tensor",
        eager=eager.inverse_sqrt_backward,
        kernels=("newton",),
        fake=_backward_fake,
        channels=((0, 0, 0, 0), (0,)),
        request=lambda grad, *_: Request(grad, grad.shape[1]),
        reference=reference.inverse_sqrt_backward,
        tolerance=reference.backward_tolerance,
        samples=reference.backward_samples,
        flops=lambda grad, W, saved_matrix, saved_scale, *options: backward_flops(W, *options),
    )
)
