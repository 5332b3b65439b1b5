"""Plain PyTorch implementation of the small matrix function W = (cov + eps I)^(-1/2) and its adjoint.

Nothing here touches activations: all tensors are (G, d, d) or smaller, in float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, bmm

from normkernels.eager.devices import in_float64


def sym(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


def eye_like(a: Tensor) -> Tensor:
    """Return I (d, d), to broadcast against a (G, d, d)."""
    return torch.eye(a.shape[1], dtype=a.dtype, device=a.device)


def step(M: Tensor) -> Tensor:
    """Return Q = (3 I - M) / 2, the factor by which an iteration multiplies P."""
    return torch.sub(1.5 * eye_like(M), M, alpha=0.5)


ROUNDINGS = 64  # the part that a channel shares with no other must be more than as many of the type's roundings


def stopped(P: Tensor, S: Tensor, iteration: int) -> Tensor | None:
    """Return which matrices have no further iteration (G, 1, 1), or None where none can stop yet.

    S_ii (P_k^2)_ii rises to the variance inflation factor of channel i, 1 / (1 - R^2). Where it comes to 1 / 64 eps,
    the part that the channel shares with no other is rounding: Newton's iteration would divide by it, or, where
    rounding has made S indefinite, grow without end. See DERIVATION.md.
    """
    eps = torch.finfo(S.dtype).eps
    limit = 1 / (ROUNDINGS * eps)
    if 2.25**iteration <= limit:  # it cannot be larger than that so far
        return None
    inflation = S.diagonal(dim1=1, dim2=2).clamp(min=eps**2) * P.square().sum(2)
    return (inflation > limit).any(1).view(-1, 1, 1)  # a NaN does not stop, and goes through to W


def unless(stops: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return new if stops is None else torch.where(stops, old, new)


def newton(S: Tensor, num_iterations: int) -> Tensor:
    """Return P_T -> S^(-1/2) for symmetric S (G, d, d) with eigenvalues in [0, 1], but for rounding.

    This is eq. 17 through its residual M_k = P_k^2 S: P_{k+1} = P_k Q_k and M_{k+1} = M_k Q_k^2. In exact arithmetic
    the P_k are the same; in float32 it is stable, where P - P^3 S amplifies rounding errors. It takes 3 (T - 1)
    products.
    """
    if num_iterations == 0:
        return eye_like(S).expand_as(S)
    M, Q = S, step(S)
    P = Q
    for iteration in range(1, num_iterations):
        stops = stopped(P, S, iteration)
        M = unless(stops, M, bmm(M, bmm(Q, Q)))
        Q = step(M)
        P = unless(stops, P, bmm(P, Q))
    return P


def newton_adjoint(E: Tensor, S: Tensor, num_iterations: int) -> Tensor:
    """Return sym dL/dS for E = sym dL/dP_T.

    The Frechet derivative of a matrix function at a symmetric S is self-adjoint, so the gradient is
    the forward derivative of the same recursion in the direction E: one sweep upward, no stored iterates.
    """
    if num_iterations == 0:
        return torch.zeros_like(E)
    M, Q, dM = S, step(S), E
    P, dP = Q, -0.5 * dM
    for iteration in range(1, num_iterations):
        stops = stopped(P, S, iteration)
        X = bmm(dM, M)
        U = bmm(M, torch.add(X.mT, X, alpha=0.5))
        Z = torch.add(0.25 * U, X, alpha=-1.5)
        dM = unless(stops, dM, torch.add(Z + Z.mT, dM, alpha=2.25))  # derivative of M Q^2 = 2.25 M - 1.5 M^2 + .25 M^3
        M = unless(stops, M, bmm(M, bmm(Q, Q)))
        Q = step(M)
        dP = unless(stops, dP, sym(torch.sub(bmm(dP, Q), bmm(P, dM), alpha=0.5)))
        P = unless(stops, P, bmm(P, Q))
    return dP


def scale_of(cov: Tensor, frobenius: bool) -> Tensor:
    """Return the (G, 1) upper bound of the largest eigenvalue that eq. 14 divides by: trace or Frobenius norm."""
    if frobenius:
        largest = cov.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(cov.dtype).tiny)
        scale = (largest * torch.linalg.matrix_norm(cov / largest, keepdim=True)).squeeze(2)  # squares do not underflow
    else:
        scale = cov.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return scale.clamp(min=torch.finfo(cov.dtype).tiny)  # eps = 0 and a constant batch: W stays finite


def add_eps(cov: Tensor, eps: float) -> Tensor:
    return cov + eps * eye_like(cov)


def inverse_sqrt(
    cov: Tensor, num_iterations: int, eps: float, frobenius: bool, eigh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W with what its adjoint needs: (S, scale (G, 1)) for newton, (eigenvectors, s (G, d)) for eigh."""
    if not eigh:
        cov = add_eps(cov, eps)
        scale = scale_of(cov, frobenius)
        S = cov / scale.unsqueeze(-1)
        return newton(S, num_iterations) / scale.unsqueeze(-1).sqrt(), S, scale

    if cov.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "inverse_sqrt: expected method='newton' (IterNorm) in a CUDA graph, got 'eigh' (DBN), whose "
            "eigendecomposition makes the host wait"
        )
    # It is computed in float64, because the error of a float32 decomposition is relative to the largest eigenvalue:
    # beside a channel of standard deviation 1e4, nothing is left of one of 1. Without float64 the CPU computes it.
    W, U, s = (value.to(cov.device, cov.dtype) for value in _by_eigenvalues(in_float64(cov), eps))
    return W, U.contiguous(), s


def _by_eigenvalues(cov: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U s^-1 U^T, the eigenvectors U, and s = sqrt(lambda + eps), for float64."""
    # LAPACK raises on NaN, and a bad batch must not stop the training: its W is NaN, as any norm's output.
    finite = cov.isfinite().all(-1).all(-1).view(-1, 1, 1)
    eigenvalues, U = torch.linalg.eigh(torch.where(finite, cov, eye_like(cov)))
    # Rounding makes zero eigenvalues slightly negative. The floors only matter where eps is smaller still: below the
    # first one a decomposition knows nothing, below the second one s^-3 overflows float32.
    known = cov.shape[1] * torch.finfo(cov.dtype).eps * eigenvalues[:, -1:]
    shifted = torch.maximum(eigenvalues.clamp(min=0) + eps, known)
    s = shifted.clamp(min=torch.finfo(torch.float32).tiny ** 0.5).sqrt()
    return torch.where(finite, bmm(U / s.unsqueeze(-2), U.mT), torch.nan), U, s


def inverse_sqrt_backward(
    grad: Tensor, W: Tensor, saved_matrix: Tensor, saved_scale: Tensor, num_iterations: int, frobenius: bool, eigh: bool
) -> Tensor:
    """Return sym dL/dcov for grad = dL/dW."""
    E = sym(grad)
    if eigh:
        U, s = saved_matrix, saved_scale
        # Daleckii-Krein with the difference quotient of t^(-1/2) written without a division by
        # (lambda_i - lambda_j): finite where eigenvalues coincide, unlike autograd through eigh.
        K = -1.0 / (s.unsqueeze(-1) * s.unsqueeze(-2) * (s.unsqueeze(-1) + s.unsqueeze(-2)))
        return sym(bmm(bmm(U, K * bmm(bmm(U.mT, E), U)), U.mT))
    # eq. 6: S = cov / scale and W = P / sqrt(scale); both depend on the scale, whose gradient is I or S.
    S, scale = saved_matrix, saved_scale.unsqueeze(-1)
    dS = newton_adjoint(E / scale.sqrt(), S, num_iterations)
    d_scale = -((dS * S).sum((1, 2), keepdim=True) + 0.5 * (E * W).sum((1, 2), keepdim=True)) / scale
    gradient = S if frobenius else eye_like(S)
    return dS / scale + d_scale * gradient
