"""Baselines that IterNorm and DBN are compared with, from the equations of the IterNorm paper (arXiv 1904.03441).

The functions are differentiable and run in any floating type; in float64 they are also the references that
every provider has to match before it is timed. Shapes: x (N, C, ...), weight and bias (C,), G = C / d groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the statistics: half types are normalized in float32, as anyone would write it."""
    return dtype if dtype == torch.float64 else torch.float32


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Return x (N, C, ...) as (G, d, m), a copy with the channels in front."""
    channels = x.shape[1]
    d = min(group_size, channels)
    if channels % d:
        raise ValueError(f"expected a group_size that divides {channels} channels, got {group_size}")
    return x.transpose(0, 1).reshape(channels // d, d, -1)


def from_groups(y: Tensor, like: Tensor) -> Tensor:
    """Return y (G, d, m) in the shape of `like`, contiguous, which is what the next layer needs."""
    channels_first = like.transpose(0, 1).shape
    return y.reshape(channels_first).transpose(0, 1).contiguous()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def plain_pop_norm(x: Tensor, weight: Tensor, bias: Tensor, kappa: float, eps: float) -> Tensor:
    """Return POP-Norm of x by equations 11 and 12, with eps under the root."""
    dims = [i for i in range(x.dim()) if i != 1]
    shifted = x - x.mean(dims, keepdim=True) + per_channel(bias, x)
    return per_channel(weight, x) * shifted / (kappa * (shifted.square().mean(dims, keepdim=True) + eps).sqrt())


class PlainPOPNorm(nn.Module):
    """POP-Norm as somebody writes it, differentiated by autograd; training only."""

    def __init__(self, channels: int, kappa: float = 4.0, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.kappa, self.eps = kappa, eps
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels, **factory)),
            nn.Parameter(torch.zeros(channels, **factory)),
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = statistics_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return plain_pop_norm(x.to(dtype), weight, bias, self.kappa, self.eps).to(x.dtype)


def newton_inverse_sqrt(cov: Tensor, num_iterations: int) -> Tensor:
    """Return Sigma^-1/2 of (G, d, d) by the paper's recursion, equations 4 and 5.

    Sigma_N = Sigma / tr(Sigma), P_0 = I, P_k = (3 P_{k-1} - P_{k-1}^3 Sigma_N) / 2; P_T / sqrt(tr(Sigma)).
    """
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    normalized = cov / trace
    p = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov)
    for _ in range(num_iterations):
        p = 1.5 * p - 0.5 * (p @ p @ p @ normalized)
    return p / trace.sqrt()


def eigh_inverse_sqrt(cov: Tensor) -> Tensor:
    """Return Sigma^-1/2 = D Lambda^-1/2 D^T of (G, d, d), equation 2."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT


def covariance(centred: Tensor, eps: float) -> Tensor:
    """Return Sigma = X_C X_C^T / m + eps I of (G, d, m)."""
    d, m = centred.shape[-2:]
    return centred @ centred.mT / m + eps * torch.eye(d, dtype=centred.dtype, device=centred.device)


def plain_whitening(
    x: Tensor, weight: Tensor, bias: Tensor, group_size: int, num_iterations: int | None, eps: float
) -> Tensor:
    """Return weight * Sigma^-1/2 (x - mean) + bias; num_iterations=None takes DBN's exact inverse root."""
    grouped = to_groups(x.to(statistics_dtype(x.dtype)), group_size)
    centred = grouped - grouped.mean(-1, keepdim=True)
    cov = covariance(centred, eps)
    w = eigh_inverse_sqrt(cov) if num_iterations is None else newton_inverse_sqrt(cov, num_iterations)
    y = from_groups(w @ centred, x)
    return (y * per_channel(weight, x) + per_channel(bias, x)).to(x.dtype)


class _Affine(nn.Module):
    """weight and bias of C channels."""

    def __init__(self, num_features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))


class PlainIterNorm(_Affine):
    """IterNorm as a researcher writes it: a transposed copy, a loop, autograd for the rest."""

    def __init__(
        self,
        num_features: int,
        group_size: int = 64,
        num_iterations: int = 5,
        eps: float = 1e-5,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, **factory)
        self.group_size, self.num_iterations, self.eps = group_size, num_iterations, eps

    def forward(self, x: Tensor) -> Tensor:
        return plain_whitening(x, self.weight, self.bias, self.group_size, self.num_iterations, self.eps)


class EighDBN(_Affine):
    """DBN (ZCA) by torch.linalg.eigh and autograd through it; the gradient is NaN at equal eigenvalues."""

    def __init__(self, num_features: int, group_size: int = 16, eps: float = 1e-3, **factory: Any) -> None:
        super().__init__(num_features, **factory)
        self.group_size, self.eps = group_size, eps

    def forward(self, x: Tensor) -> Tensor:
        return plain_whitening(x, self.weight, self.bias, self.group_size, None, self.eps)


class _TransposedWhitening(torch.autograd.Function):
    """Algorithms 1 and 2 on a (G, d, m) copy; only the d x d part of the gradient is left to autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group_size: int, num_iterations: int, eps: float
    ) -> Tensor:
        centred = to_groups(x, group_size).to(statistics_dtype(x.dtype))
        if centred.data_ptr() == x.data_ptr():
            centred = centred.clone()
        centred -= centred.mean(-1, keepdim=True)
        cov = covariance(centred, eps)
        w = newton_inverse_sqrt(cov, num_iterations)
        groups, d = w.shape[:2]
        a = weight.view(groups, d, 1) * w
        y = torch.baddbmm(bias.view(groups, d, 1).to(a.dtype), a, centred)
        ctx.save_for_backward(centred, cov, w, weight)
        ctx.num_iterations = num_iterations
        return from_groups(y.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        centred, cov, w, weight = ctx.saved_tensors
        groups, d, m = centred.shape
        dyt = to_groups(dy, d).to(centred.dtype)
        cross = dyt @ centred.mT
        dbias = dyt.sum(-1, keepdim=True)
        dweight = (cross * w).sum(-1)
        scale = weight.view(groups, d, 1).to(w.dtype)
        with torch.enable_grad():
            leaf = cov.detach().requires_grad_()
            (dcov,) = torch.autograd.grad(newton_inverse_sqrt(leaf, ctx.num_iterations), leaf, scale * cross)
        # dX = Sigma^-1/2 (dX^ - f 1^T) + (dSigma + dSigma^T) X_C / m, Algorithm 2, line 6
        a = (scale * w).mT
        dx = torch.baddbmm(-(a @ dbias) / m, a, dyt)
        dx.baddbmm_((dcov + dcov.mT) / m, centred)
        return (
            from_groups(dx.to(dy.dtype), dy),
            dweight.view_as(weight),
            dbias.view_as(weight),
            None,
            None,
            None,
        )


class TransposedIterNorm(PlainIterNorm):
    """IterNorm with a closed-form backward on a transposed copy, the layout that suits tiny planes."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _TransposedWhitening.apply(
            x, self.weight, self.bias, self.group_size, self.num_iterations, self.eps
        )
        return result
