"""Floors of the small matrix function, of whitening with it, and of both at once, iter_norm.

Glossary
    k       amplification: how many times a relative error of Sigma grows in W (below)
    |W|     the infinity norm of W, its largest absolute row sum: |W v|_max <= |W| |v|_max

Derivation, for the error of the covariance that moments.py has
    W           The smallest eigenvalue l of Sigma loses most: W ~ l^{-1/2}, so dW / W = dl / (2 l), and a rounding
                error u |Sigma|_2 of Sigma costs u |Sigma|_2 / (2 l) = u k / 2 with k = cond(Sigma). Newton's
                iteration has not resolved eigenvalues that are still growing: a step multiplies an
                eigenvalue of M_k = P_k^2 S by at most 1.5^2, so k = min(cond(Sigma), 2.25^T). The errors of its
                products, u sqrt(d) each, enter at step j and grow 2.25^(T-j) times: a geometric sum, 1 / (1 - 1/2.25)
                = 1.8 < 2 times the first. eigh commits u sqrt(d) |Sigma|_2 by itself. Forming W from P_T, or from
                eigenvectors, is one more product of d terms and does not depend on k. With 4 u for the
                additions, square roots and divisions:

                    r(W) = u (1 + k/2) (4 + sqrt(d))                       for a given covariance
                    r    = r(W) + u k/2 (4 + sqrt(m)) + d (e |W|)^2 / 2    for one estimated from x

    y           y = W (x - mean): r relative to y, plus the rounding of x - mean, or of A x and c - A mean, both
                at most 2 u |x|_max per entry: |W| 2 u |x|_max. With beta it is a sum of d + 1 terms in any
                order, u (1 + sqrt(d)) |y|, which is rounded once, u_out |y|.
    dx          W dy - ... + (2/m) sym(dSigma) x_c. Its scale is |W| |gamma dy|_max, which does not vanish when the
                terms cancel (dy constant: dx = 0). f''/f' = -3/(2 l) for f = l^{-1/2}: three times the relative error
                of W. x_c enters dSigma and multiplies it: the rounding of x_c counts twice more.
    dgamma      sum over m of dy y^: the error of y^ against sum |dy|, and sqrt(m) u for the sum itself.
    dbeta       sum over m of dy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles import iternorm
from tests.oracles.plain import stat_dtype
from tests.oracles.run import Config, Result
from tests.tolerances.common import assert_within, largest, row_sum, unit
from tests.tolerances.moments import mean_floor

# Saved tensors over the input's own bytes. The input itself is 1; the matrices of a (64, 64, 32, 32) input are 2^-9 of
# it, so 1.1 leaves room for per-channel vectors and none for a second activation, not even one in a half type.
SAVED_FOR_BACKWARD = 1.1

# Whitening by eigendecomposition where standard deviations differ by up to 1e4 or are all 1e4, correlation matrices
# with a condition number k of up to 1e3, in float32. The covariance is off by half a rounding in units of the
# deviations (moments/eager.py), W relative to its diagonal by k / 2 times that: r = 1.5e-5. y, of at most 5, and its
# rounding: 5 r + |W| 2 u |x| = 7.5e-5 + 32 * 8 u = 9e-5. dx has three times W's error and x's rounding, relative to
# the largest of a channel, where terms k^(1/2) times as large may cancel: 32 * 5 * 3 r = 7e-3.
SCALED_W, SCALED_Y, SCALED_GRADIENT = 1e-4, 1e-4, 1e-2

# Singular covariances: rounding has its own directions there. They grow no larger than in float64.
LARGER_THAN_FLOAT64 = 3

# The bound of the synchronized layers in float32, relative to the largest entry, whatever the mean: with d = 8, m = 144
# and a condition number k = 3, r without the rounding of the mean is 41 u = 2.4e-6; dx has three times that.
SYNCHRONIZED = 1e-5


def amplification(cov: Tensor, config: Config) -> float:
    """Return k of the derivation: the worst group's condition number, or what T Newton steps can make of it."""
    sigma = iternorm.add_eps(cov.double(), config.eps)
    eigenvalues = torch.linalg.eigvalsh(sigma)
    floor = torch.finfo(torch.float64).eps * eigenvalues[:, -1]
    condition = (eigenvalues[:, -1] / eigenvalues[:, 0].clamp(min=floor)).max().item()
    return condition if config.method == "eigh" else min(condition, 2.25**config.num_iterations)


def w_floor(cov: Tensor, w: Tensor, config: Config) -> float:
    """Return the floor of inverse_sqrt of a given covariance."""
    d = cov.shape[-1]
    return unit(stat_dtype(cov.dtype)) * (1 + amplification(cov, config) / 2) * (4 + d**0.5) * row_sum(w)


def dcov_floor(cov: Tensor, w: Tensor, grad: Tensor, config: Config) -> float:
    """Return the floor of inverse_sqrt's gradient.

    It is three times the relative error of W, on a gradient of size |W|^3 |dL/dW| / 2.

    With an eps or a truncated T, |W| bounds l^{-1/2}. The trace terms are sums over d^2 entries: d sqrt(d) at worst.
    """
    d = cov.shape[-1]
    size = row_sum(w) ** 3 * largest(grad.double()) * d / 2
    return 3 * unit(stat_dtype(cov.dtype)) * (1 + amplification(cov, config) / 2) * (4 + d**0.5) * size


def relative_error_of_w(x: Tensor, w: Tensor, config: Config) -> float:
    """Return r of the derivation, for W (G, d, d) estimated from x."""
    u, m, d = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1], w.shape[-1]
    _, cov = iternorm.moments(x.double(), config.group_size)
    k = amplification(cov, config)
    of_w, of_cov = u * (1 + k / 2) * (4 + d**0.5), u * k / 2 * (4 + m**0.5)
    return of_w + of_cov + d * (2 * u * largest(x.double()) * row_sum(w)) ** 2 / 2


@dataclass(frozen=True)
class Floors:
    """The floors of one problem, absolute."""

    mean: float
    w: float
    y: float
    dx: float
    dweight: float
    dbias: float


def floors(x: Tensor, dy: Tensor, weight: Tensor | None, oracle: Result, config: Config) -> Floors:
    """Return the floors of everything that iter_norm returns."""
    u, u_out = unit(stat_dtype(x.dtype)), unit(x.dtype)
    rounding_of_mean, relative = mean_floor(x), relative_error_of_w(x, oracle.w, config)
    x, dy = x.double(), dy.double()
    m, d = x.numel() // x.shape[1], oracle.w.shape[-1]
    size_w, size_x = row_sum(oracle.w), 2 * u * largest(x)
    gamma = 1.0 if weight is None else largest(weight.double())
    y_hat = iternorm.whiten(x, iternorm.moments(x, config.group_size)[0], oracle.w)
    y = relative * largest(y_hat) + size_w * size_x
    dx_size = size_w * gamma * largest(dy)
    sum_dy = dy.abs().movedim(1, 0).flatten(1).sum(1).max().item()
    root = u * (2 + m**0.5)
    rounded = {key: 0.0 if value is None else unit(x.dtype if weight is None else weight.dtype) * largest(value)
               for key, value in (("dweight", oracle.dweight), ("dbias", oracle.dbias))}  # fmt: skip
    return Floors(
        mean=rounding_of_mean,
        w=relative * size_w,
        y=gamma * y + (u * (1 + d**0.5) + u_out) * largest(oracle.y),
        dx=dx_size * (3 * relative + 4 * size_x * size_w) + u_out * largest(oracle.dx),
        dweight=sum_dy * (y + root * largest(y_hat)) + rounded["dweight"],
        dbias=sum_dy * root + rounded["dbias"],
    )


def exactly_centered(x: Tensor, dy: Tensor, oracle: Result, config: Config) -> Floors:
    """Return floors() for a path that removes the mean exactly: those of x - mean, in the same type.

    |x - mean| takes the place of |x|, so no term grows with the mean any more.
    """
    centered = (x.double() - oracle.mean.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)
    return floors(centered, dy, None, oracle, config)


def assert_iter_norm(
    got: Result, oracle: Result, plain: Result, x: Tensor, dy: Tensor, weight: Tensor | None, config: Config
) -> None:
    """Check the rule for every output and gradient of iter_norm."""
    floor = floors(x, dy, weight, oracle, config)
    gamma = 1.0 if weight is None else largest(weight.double())
    w = row_sum(oracle.w)
    assert_within("mean", got.mean, oracle.mean, plain.mean, floor.mean, largest(x.double()))
    assert_within("W", got.w, oracle.w, plain.w, floor.w, w)
    assert_within("y", got.y, oracle.y, plain.y, floor.y, largest(oracle.y))
    assert_within("dx", got.dx, oracle.dx, plain.dx, floor.dx, w * gamma * largest(dy.double()))
    for name, bound in (("dweight", floor.dweight), ("dbias", floor.dbias)):
        value, reference, other = (getattr(result, name) for result in (got, oracle, plain))
        assert (value is None) == (reference is None), name
        if value is not None:
            assert_within(name, value, reference, other, bound, largest(reference))


def whiten_floors(
    arguments: list[Tensor | None], dy: Tensor, y: Tensor, grads: list[Tensor | None]
) -> dict[str, float]:
    """Return the floors of y = A (x - mean) + beta, A = diag(gamma) W, and of its gradients.

    Forward there are products of d terms of x - mean, backward sums of m terms.

    Each x - mean is good to e = 2 u |x|_max, each product of d terms to u (4 + sqrt(d)); every result is rounded once
    to its type.
    """
    x, mean, w, weight, _ = (None if t is None else t.double() for t in arguments)
    assert x is not None and mean is not None and w is not None and arguments[0] is not None
    u, dy = unit(stat_dtype(arguments[0].dtype)), dy.double()
    m, d = x.numel() // x.shape[1], w.shape[-1]
    gamma = 1.0 if weight is None else largest(weight)
    centered = largest(x - mean.view(-1, *[1] * (x.ndim - 2)))
    e = 2 * u * largest(x)
    row, column = row_sum(w), row_sum(w.mT)
    sum_dy = dy.abs().movedim(1, 0).flatten(1).sum(1).max().item()
    term, total = u * (4 + d**0.5), u * (4 + d**0.5 + m**0.5)
    of_sum = sum_dy * (total * centered + e)  # D = sum dy (x - mean)^T
    floors = {
        "y": gamma * row * (term * centered + e) + u * (1 + d**0.5) * largest(y),
        "x": term * column * gamma * largest(dy),
        "mean": total * column * gamma * sum_dy,
        "W": gamma * of_sum,
        "weight": row * of_sum,
        "bias": total * sum_dy,
    }
    for key, value, exact in zip(("y", "x", "mean", "W", "weight", "bias"), [arguments[0], *arguments], [y, *grads],
                                 strict=True):  # fmt: skip
        if value is not None and exact is not None:
            floors[key] += unit(value.dtype) * largest(exact)
    return floors


def largest_stretch(eps: float, dtype: torch.dtype, d: int) -> float:
    """Return the bound of |W|_2 <= 1 / sqrt(eps), as Sigma >= eps I.

    Forming W costs u (4 + sqrt(d)) in each of d rows.
    """
    return (1 + d * unit(dtype) * (4 + d**0.5)) / eps**0.5
