"""IterNorm: equations 11 to 17 of "Iterative Normalization: Beyond Standardization towards Efficient Whitening".

Letters: C channels, G groups, d channels per group, m samples (every position of every image), T iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dbn, eigenbasis

# The largest T for which eq. 17 is used as written. Rounding errors that do not commute with S grow by one to two
# digits per iteration: in float64, at a condition number of 1e4, W is good to 6e-15 at T=5, 5e-12 at T=7, 2e-5 at
# T=10 and not at all at T=12 (test_inverse_sqrt.py compares with multiple precision). With S_ii = 1 and a small S_jj
# the entry ij of an error of P is multiplied by 1.5 - (1 + p + p^2) / 2, p = 1.5^k: 230 times in five iterations.
LARGEST_PAPER_T = 5


def width(num_channels: int, group_size: int) -> int:
    """Return d: a group is never wider than the layer."""
    return min(group_size, num_channels)


def unroll(x: Tensor, d: int) -> Tensor:
    """Return x (N, C, ...) as X (G, d, m): every spatial position is a sample (section 3.3)."""
    return x.movedim(1, 0).reshape(x.shape[1] // d, d, x[:, 0].numel())


def roll(x: Tensor, like: Tensor) -> Tensor:
    """Return X (G, d, m) as (N, C, ...), the inverse of unroll."""
    return x.reshape(like.shape[1], like.shape[0], *like.shape[2:]).movedim(0, 1)


def moments(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and biased covariance (G, d, d) of eq. 11 to 13, without eps."""
    X = unroll(x, width(x.shape[1], group_size))
    mean = X.mean(dim=2)
    centered = X - mean[:, :, None]
    return mean.reshape(-1), centered @ centered.mT / X.shape[2]


def size(sigma: Tensor, scaling: str) -> Tensor:
    """Return the divisor of Sigma, (G, 1, 1): tr Sigma (eq. 14), or its Frobenius norm."""
    if scaling == "trace":
        return sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    assert scaling == "frobenius"
    return (sigma * sigma).sum((-2, -1)).sqrt()[:, None, None]


def newton(s: Tensor, num_iterations: int) -> Tensor:
    """Return P_T of eq. 17: P_0 = I, P_k = (3 P_{k-1} - P_{k-1}^3 S) / 2."""
    p = torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s)
    for _ in range(num_iterations):
        p = (3 * p - p @ p @ p @ s) / 2
    return p


def add_eps(cov: Tensor, eps: float) -> Tensor:
    """Add eps I, which belongs to Sigma (eq. 13), so that it is there before the trace is taken."""
    return cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype)


def inverse_sqrt(
    cov: Tensor, num_iterations: int, eps: float, scaling: str = "trace", method: str = "newton"
) -> Tensor:
    """Return W (G, d, d) of eq. 14, 15, 17, or of eq. 2 for method="eigh", for cov (G, d, d) without eps.

    Two more methods are the same functions for spectra where these lose digits: "inverses" is eq. 2 with gradients
    that are right at equal eigenvalues, "eigenbasis" is eq. 17 where one eigenvalue dominates.
    """
    sigma = add_eps(cov, eps)
    if method == "eigh":
        return dbn.zca(sigma)
    if method == "inverses":
        return dbn.zca_by_inverses(sigma)
    t = size(sigma, scaling)
    as_written = method == "newton" and num_iterations <= LARGEST_PAPER_T
    iterate = newton if as_written else eigenbasis.newton
    return iterate(sigma / t, num_iterations) / t.sqrt()


def whiten(x: Tensor, mean: Tensor, w: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return weight * (W (x - mean)) + bias: eq. 12 and 16, and the affine transform of section 3.3."""
    g, d, _ = w.shape
    y = w @ (unroll(x, d) - mean.reshape(g, d, 1))
    if weight is not None:
        y = y * weight.reshape(g, d, 1)
    if bias is not None:
        y = y + bias.reshape(g, d, 1)
    return roll(y, x)


def iter_norm(
    x: Tensor,
    group_size: int,
    num_iterations: int,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: str = "trace",
    method: str = "newton",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean (C,) and W (G, d, d) of eq. 11 to 17 (or eq. 2 for method="eigh"), all float64."""
    x = x.double()
    mean, cov = moments(x, group_size)
    w = inverse_sqrt(cov, num_iterations, eps, scaling, method)
    weight = None if weight is None else weight.double()
    bias = None if bias is None else bias.double()
    return whiten(x, mean, w, weight, bias), mean, w
