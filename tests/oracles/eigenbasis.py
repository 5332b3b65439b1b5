"""Equation 17 and its gradient on the eigenvalues of S.

Every P_k is a polynomial p_k of S, so in the eigenbasis of S eq. 17 is the scalar recursion
p <- (3 p - p^3 s) / 2, which pulls itself back to s^{-1/2}. As matrices, rounding errors that do not commute with S
grow without bound instead; that is why this reference replaces eq. 17 for many iterations.

The derivative of a polynomial p at a symmetric S in the direction E is, in the eigenbasis, E_ij times the divided
difference p[s_i, s_j] (Daleckii and Krein). The divided difference follows eq. 17 through the product rule
(f g)[a, b] = f(a) g[a, b] + f[a, b] g(b): nothing is ever divided by s_i - s_j, so equal eigenvalues are no special
case. b is the smaller of the two eigenvalues: then old errors are multiplied by 1.5 - (1 + r + r^2) / 2 at the fixed
point, with r = p(a) / p(b) in [0, 1], which is at most one. The other order diverges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scalar_newton(s: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """Return p_T(s) (G, d) for eigenvalues s (G, d), and the divided differences p_T[s_i, s_j] (G, d, d)."""
    p = torch.ones_like(s)
    dp = torch.zeros_like(s[..., :, None] * s[..., None, :])
    row, column = s[..., :, None], s[..., None, :]
    for _ in range(num_iterations):
        p_row, p_column = p[..., :, None], p[..., None, :]
        p_of_larger = torch.where(row > column, p_row, p_column)
        d_cube = (p_row**2 + p_row * p_column + p_column**2) * dp  # p^3 [a, b]
        d_cube_s = p_of_larger**3 + d_cube * torch.minimum(row, column)  # (p^3 s)[a, b], with s[a, b] = 1
        p, dp = (3 * p - p**3 * s) / 2, (3 * dp - d_cube_s) / 2
    return p, dp


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, num_iterations: int) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        p, dp = scalar_newton(values, num_iterations)
        ctx.save_for_backward(vectors, dp)
        return vectors @ (p[..., None] * vectors.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        vectors, dp = ctx.saved_tensors
        return vectors @ (dp * (vectors.mT @ grad @ vectors)) @ vectors.mT, None


def newton(s: Tensor, num_iterations: int) -> Tensor:
    """Return P_T of eq. 17 for symmetric s (G, d, d), once differentiable."""
    return _Newton.apply(s, num_iterations)
