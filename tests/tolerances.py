"""The only home of tolerances. They are derived, never tuned.

The rule
    error(ours, float64 oracle) <= 2 * error(plain same-type PyTorch path, float64 oracle) + floor

The factor 2 allows another order of the same operations. The floor is what a careful path in this type may lose
anyway, where the plain path happens to be luckier than that. A plain path whose own error exceeds LOST has no digits
left (eq. 17 as written diverges in float32 from about T=9 on, autograd through eigh gives NaN at equal eigenvalues):
then it is no reference, and the floor alone must hold.

Glossary
    u       unit roundoff of the type of the statistics (float32 for half types), u_out that of x's type
    d, m, T channels per group, samples, iterations
    k       amplification: how many times a relative error of Sigma grows in W (below)
    |W|     the infinity norm of W, its largest absolute row sum: |W v|_max <= |W| |v|_max

Derivation
    covariance  x - mean is exact up to the rounding of the mean: two-pass and shifted sums agree with it. A mean
                that is off by e = 2 u |x|_max shifts the covariance by e e^T, quadratically; so

                    |dSigma_ij| <= u (4 + sqrt(m)) sqrt(Sigma_ii Sigma_jj) + e^2

                sqrt(m) u is the probabilistic bound (Higham and Mary 2019) for a sum of m rounded terms.
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

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normkernels.eager.devices import has_float64
from tests.oracles import convnorm, iternorm, popnorm
from tests.oracles.plain import stat_dtype
from tests.oracles.run import Config, Result

LOST = 0.05  # relative error above which a path has no digits left to compare with


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def amplification(cov: Tensor, config: Config) -> float:
    """Return k of the derivation: the worst group's condition number, or what T Newton steps can make of it."""
    sigma = iternorm.add_eps(cov.double(), config.eps)
    eigenvalues = torch.linalg.eigvalsh(sigma)
    floor = torch.finfo(torch.float64).eps * eigenvalues[:, -1]
    condition = (eigenvalues[:, -1] / eigenvalues[:, 0].clamp(min=floor)).max().item()
    return condition if config.method == "eigh" else min(condition, 2.25**config.num_iterations)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def row_sum(w: Tensor) -> float:
    """Return the infinity norm of W (G, d, d), the worst group's."""
    return w.abs().sum(-1).max().item()


def assert_within(name: str, got: Tensor, oracle: Tensor, plain: Tensor | None, floor: float, scale: float) -> None:
    """Check the rule; scale: the size of the quantity, to tell when the plain path is lost."""
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    error = largest(got.double() - oracle)
    allowed = 0.0 if plain is None else largest(plain.double() - oracle)
    if not allowed <= LOST * scale:  # also when it is NaN
        allowed = 0.0
    assert error <= 2 * allowed + floor, (
        f"{name}: error {error:.2e} against the float64 oracle, allowed 2 * {allowed:.2e} (plain path) + {floor:.2e}; "
        f"size {scale:.2e}"
    )


@dataclass(frozen=True)
class Floors:
    """The floors of one problem, absolute."""

    mean: float
    w: float
    y: float
    dx: float
    dweight: float
    dbias: float


def mean_floor(x: Tensor) -> float:
    """Return u (2 + log2 m) |x|_max: pairwise summation, the division and the rounding of the result."""
    m = x.numel() // x.shape[1]
    return unit(stat_dtype(x.dtype)) * (2 + torch.tensor(float(max(m, 1))).log2().item()) * largest(x.double())


def cov_floor(x: Tensor, cov: Tensor) -> Tensor:
    """Return the floor of cov entry by entry, (G, d, d)."""
    u, m = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1]
    std = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    return u * (4 + m**0.5) * std[..., :, None] * std[..., None, :] + (2 * u * largest(x.double())) ** 2


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


def exactly_centered(x: Tensor, dy: Tensor, oracle: Result, config: Config) -> Floors:
    """Return floors() for a path that removes the mean exactly: those of x - mean, in the same type.

    |x - mean| takes the place of |x|, so no term grows with the mean any more.
    """
    centered = (x.double() - oracle.mean.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)
    return floors(centered, dy, None, oracle, config)


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


def moments_gradient_floor(x: Tensor, dmean: Tensor, dcov: Tensor) -> float:
    """Return the floor of dx = dmean / m + (dcov + dcov^T) x_c / m.

    It is a product over d terms of x_c, which is good to e = 2 u |x|_max.
    """
    u, m, d = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1], dcov.shape[-1]
    centered = largest(x.double() - x.double().movedim(1, -1).flatten(0, -2).mean(0).view(-1, *[1] * (x.ndim - 2)))
    row = row_sum((dcov + dcov.mT).double())
    size = (row * centered + largest(dmean)) / m
    return u * (4 + d**0.5) * size + row * 2 * u * largest(x.double()) / m + unit(x.dtype) * size


def cross_floor(y: Tensor, x: Tensor, mean: Tensor) -> tuple[float, float]:
    """Return the floors of sum y (x - mean)^T and sum y.

    They are sqrt(m) u of the sum of absolute values, and 2 u |x| for each x - mean.
    """
    u, m = unit(stat_dtype(x.dtype)), x.numel() // x.shape[1]
    sum_y = y.double().abs().movedim(1, 0).flatten(1).sum(1).max().item()
    size = largest(x.double()) + largest(mean)
    return u * (2 + m**0.5) * sum_y * size, u * (2 + m**0.5) * sum_y


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


# Saved tensors over the input's own bytes. The input itself is 1; the matrices of a (64, 64, 32, 32) input are 2^-9 of
# it, so 1.1 leaves room for per-channel vectors and none for a second activation, not even one in a half type.
SAVED_FOR_BACKWARD = 1.1


def largest_stretch(eps: float, dtype: torch.dtype, d: int) -> float:
    """Return the bound of |W|_2 <= 1 / sqrt(eps), as Sigma >= eps I.

    Forming W costs u (4 + sqrt(d)) in each of d rows.
    """
    return (1 + d * unit(dtype) * (4 + d**0.5)) / eps**0.5


# Whitening by eigendecomposition where standard deviations differ by up to 1e4 or are all 1e4, correlation matrices
# with a condition number k of up to 1e3, in float32. The covariance is off by half a rounding in units of the
# deviations (moments/eager.py), W relative to its diagonal by k / 2 times that: r = 1.5e-5. y, of at most 5, and its
# rounding: 5 r + |W| 2 u |x| = 7.5e-5 + 32 * 8 u = 9e-5. dx has three times W's error and x's rounding, relative to
# the largest of a channel, where terms k^(1/2) times as large may cancel: 32 * 5 * 3 r = 7e-3.
SCALED_W, SCALED_Y, SCALED_GRADIENT = 1e-4, 1e-4, 1e-2

# Singular covariances: rounding has its own directions there. They grow no larger than in float64.
LARGER_THAN_FLOAT64 = 3


def assert_within_remainder(mean: Tensor, remainder: Tensor, exact: Tensor, x: Tensor) -> None:
    """Check mean + remainder: a mean is the first tile's, plus one of differences to it, which float32 rounds.

    m differences, of no more than the range of x, are off by sqrt(m) u of it at most (Higham and Mary, 2019).
    """
    m, spread = x.numel() // x.shape[1], (x.double() - exact.view(1, -1, *[1] * (x.dim() - 2))).abs().max()
    error = (mean.double() + remainder.double() - exact).abs().max()
    assert error <= (4 + m**0.5) * unit(torch.float32) * spread, f"off by {error:.2g}"


def assert_agree(got: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Check that two careful paths in one type agree, on a well-conditioned input of the size used in these tests.

    Each is within r of the exact result, so they are within 2 r of each other, relative to the largest entry; with
    T = 5 (k = 2.25^5), d = 8 and m = 1000, 2 r = 2400 u: 1.4e-4 in float32, 2.7e-13 in float64.
    """
    if isinstance(got, Tensor):
        assert isinstance(expected, Tensor)
        got, expected = [got], [expected]
    k, d, m = 2.25**5, 8, 1000
    r = (1 + k / 2) * (4 + d**0.5) + k / 2 * (4 + m**0.5)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype, f"{i}: {a.dtype}, expected {b.dtype}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"{i}: {a}, expected {b}"
            continue
        bound = 2 * r * unit(a.dtype) * largest(b.double())
        assert_within(f"{i}", a, b.double(), None, bound, largest(b.double()))


# The bound of the synchronized layers in float32, relative to the largest entry, whatever the mean: with d = 8, m = 144
# and a condition number k = 3, r without the rounding of the mean is 41 u = 2.4e-6; dx has three times that.
SYNCHRONIZED = 1e-5


# POP-Norm
#
#     r   the root of the second moment of x~ plus eps, a = gamma / (kappa r), y = a x~; |x~| its largest value
#     e   2 u |x|_max, the rounding of the mean, which all of x - mean may be off by
#
#     r       The second moment is a sum of m terms, relative to itself u (4 + sqrt(m)), and half of it for the root;
#             a mean that is off by e changes it by e^2.
#     y       a (x - mean + beta): the rounding of the difference, 2 u |x~| + e, and the relative error of a.
#     dx      a dy - a f / m - a <dy, x~> (x - mean) / (m r^2): |<dy, x~>| <= m |dy| r, so the last term is at most
#             a |dy| t with t = |x~| / r, the first two 2 a |dy|. Errors: those of a in all of them, of two sums of m
#             terms, and of x~ in the sum and beside it: (e / r + 2 u t)(1 + t).
#     dgamma  sum dy x~ / (kappa r).
#     dbeta   a (f - beta <dy, x~> / r^2): sums of m terms, with |beta| <= r.
#
# With running statistics r is theirs, and x - mean and beta, which are summed apart then, may cancel: |x - mean| +
# |beta| takes the place of |x~|. dx is only a dy, and dbeta's <dy, x~> is at most |x~| sum |dy|: the bounds above hold.


def pop_norm_floors(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, kappa: float, eps: float, center: bool,
    scale: bool, oracle: Sequence[Tensor | None], running: tuple[Tensor, Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Return the floors of y and the gradients of x, weight and bias, whose values ``oracle`` has.

    x is in the type of the test.

    running: mean and variance, in evaluation.
    """
    u = unit(stat_dtype(x.dtype))
    m, e = x.numel() // x.shape[1], 2 * u * largest(x.double())
    beta = torch.zeros(x.shape[1], dtype=torch.float64) if bias is None else bias.double()
    if running is None:
        rows = popnorm.pop_norm(x.double(), None, beta, 1.0, eps, center, False)[0].movedim(1, 0).flatten(1)
        second = rows.square().mean(1)
    else:
        mean, var = (value.double() for value in running)
        second = var + (beta if center else mean).square()
        rows = (x.double().movedim(1, 0).flatten(1) - mean[:, None] * center).abs() + beta.abs()[:, None]
    r = (second + eps).sqrt() if scale else torch.ones_like(second)
    peak, gamma = rows.abs().amax(1), torch.ones_like(r) if weight is None else weight.double().abs()
    a = gamma / (kappa * r) if scale else torch.ones_like(r)
    t = peak / r
    relative = u * (4 + m**0.5) + (e / r) ** 2
    of_x = e + 2 * u * peak
    sum_dy = dy.double().abs().movedim(1, 0).flatten(1).sum(1)
    floors = [
        a * (of_x + relative * peak),
        a * largest(dy.double()) * (2 * relative * (2 + t) + (of_x / r) * (1 + t)),
        sum_dy * (of_x + 2 * relative * peak) / (kappa * r),
        a * sum_dy * (2 * relative * (1 + t) + of_x / r),
    ]
    types = (x, x, weight, bias)
    return [
        floor.max().item() + (0.0 if exact is None or like is None else (unit(like.dtype) + u) * largest(exact))
        for floor, exact, like in zip(floors, oracle, types, strict=True)
    ]


def dbeta_error(x: Tensor, beta: float) -> float:
    """Return the error of dbeta relative to it, for a constant dy.

    dbeta has f sigma^2 - beta D, where D is zero but for its rounding.

    D is a sum of m terms of size sigma, off by u (4 + sqrt(m)) m sigma; relative to f sigma^2 = m sigma^2 that is
    beta / sigma times u (4 + sqrt(m)), of the deviation of the channel that has the smallest. The variance has u
    (4 + sqrt(m)), the other factors 8 u.
    """
    m = x.numel() // x.shape[1]
    sigma = x.double().movedim(1, 0).flatten(1).std(1, unbiased=False).min().item()
    return unit(stat_dtype(x.dtype)) * (8 + (4 + m**0.5) * (1 + beta / sigma))


# BNP
#
#     Gw  (Gw - mu Gb) / (q2 v~): seven roundings (v~ has three operations, q2 v~ and its reciprocal two, difference and
#         product one each) of the terms' sizes, 8 u (|Gw| + |mu Gb|) / (q2 v~), and the rounding of the result.
#     Gb  Gb / q2 - sum of n = I k terms mu Gw: each has the error of Gw and one more product, and sums of n terms in
#         any order u (4 + sqrt(n)); the rounding of the result.
#     Results below the smallest normal number are rounded to multiples of 2 u times that.


def precondition_floors(
    Gw: Tensor, Gb: Tensor | None, mean: Tensor, var: Tensor, q2: float, exact_w: Tensor, exact_b: Tensor | None,
    eps1: float = 1e-2, eps2: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the floors entry by entry; Gw, Gb are in the type of the test, exact_w, exact_b the oracle's results."""
    u, n, groups = unit(stat_dtype(Gw.dtype)), Gw[0].numel(), len(mean) // Gw.shape[1]
    var, mean = (value.double().view(groups, -1) for value in (var, mean))
    factor = 1 / (q2 * (var + eps1 * var.amax(1, keepdim=True) + eps2))
    one = [1] * (Gw.dim() - 2)
    factor, mu = (
        value.repeat_interleave(len(Gw) // groups, 0).view(*Gw.shape[:2], *one) for value in (factor, mean.abs())
    )
    taken = 0.0 if Gb is None else mu * Gb.double().abs().view(-1, 1, *one)
    floor_w = 8 * u * (Gw.double().abs() + taken) * factor
    u_out, smallest = unit(Gw.dtype), torch.finfo(Gw.dtype).smallest_normal
    rounded_w = floor_w + u_out * exact_w.abs().clamp(min=smallest)
    if Gb is None or exact_b is None:
        return rounded_w, None
    terms = (mu * (floor_w / u * (1 + n**0.5 / 4) + 2 * exact_w.abs())).flatten(1).sum(1)
    floor_b = u * (terms + 4 * Gb.double().abs() / q2 + exact_b.abs())
    return rounded_w, floor_b + u_out * exact_b.abs().clamp(min=smallest)


def merged_floors(x: Tensor, var: Tensor, merges: int) -> tuple[float, Tensor]:
    """Return the floors of mean, and variance of each channel, of x merged so often by Chan's formula.

    x is in the type of the test.

    Each merge rounds the mean, e = 2 u |x|_max. Two means that are off by e make their difference delta off by 2 e, and
    t (1 - t) delta^2, which is at most the variance, by 4 e sqrt(t (1 - t) var) <= 2 e sqrt(var).
    """
    e = 2 * unit(stat_dtype(x.dtype)) * largest(x.double())
    cov = cov_floor(x, var.view(-1, 1, 1)).flatten()
    return mean_floor(x) + merges * e, cov + merges * (2 * e * var.sqrt() + e**2)


# ConvNorm
#
# Glossary
#     power   p(f) = sum_i |a^_ki(f)|^2, v = (p + eps E)^(-1/2), both (C_O, *size)
#     peak    sum_i (sum over taps of |a_ki|)^2 >= p(f): what the terms of any sum that gives p add up to
#     r       v sqrt(p) <= 1, the normalized spectrum |a^| v; v sqrt(eps E) = sqrt(1 - r^2) is what eps adds
#     S       sqrt(2 ln N): the largest of N rounding errors over their root mean square
#     rms     over one plane, the worst sample of each channel
#
# Derivation
#     v           p is a sum over channels, taps and lags (or log2 of the plane, for the oracle's FFT), in float64:
#                 dp <= u64 t peak, t = 4 + sqrt(C_I k) + sqrt(2 k - 1) + log2 n; and dv / v = -dp v^2 / 2. What is left
#                 is to round v to its type. At a spectral zero v^2 = 1 / (eps E): dv / v = u64 t peak / (2 eps E),
#                 which is 1e-7 or so. Without float64 the sums are as good, of digits. The rest is float32: p, E and
#                 eps E are rounded, and their sum, 3 u of p + eps E and so 1.5 u of v, and its inverse root twice:
#                 3.5 u, and the factor of scale none.
#     dweight     sum_f dv v^3 conj(a^): a^ is good to u64 t sqrt(peak), v^3 to three times dv / v, and v may have been
#                 saved in its own type: 3 u |dv| v^2 r, and sqrt(eps (1 - r^2)) for r in the term of E.
#     filter      A transform is a product with an orthogonal matrix of H and one of W terms a sum: the error of a
#                 coefficient is u t rms(z), t = 4 + sqrt(H) + sqrt(W) (an FFT's is smaller). The errors are spread over
#                 all frequencies like white noise, so v makes rms(v) times as much of them, and transforming back adds
#                 the same relative to y: S u t (rms(z) rms(v) + rms(y)). Every channel for itself.
#     dv          Re(conj(z^) dy^) / n, summed over samples: both factors are good to u t of their rms.
#     y           The errors of z (a sum of C_I k terms, then rounded to x's type) and of the filter, both white. The
#                 affine correlates them with |r|_1 at most, and is rounded again, as is the bias.
#     dz          The same path backwards: the affine's adjoint, whose norm is at most |r|_1 |dy|_2, then the filter.
#     dx          Each dz_k comes with |w_ki|_1, and as often as padding has copied the element.
#     dweight     <dz, x> <= |dz|_2 |x|_2. The spectrum's part is that of v above, with a dv whose factors z^ and dy^
#                 have the errors of z and of dy in the type of the layer.


def noise(count: int) -> float:
    """Return S: the largest of count independent errors, in root mean squares."""
    return max(1.0, (2 * torch.tensor(float(max(count, 2))).log().item()) ** 0.5)


def plane_rms(t: Tensor) -> Tensor:
    """Return the root mean square of each channel's worst sample: (N, C, *size) -> (C,)."""
    if not t.numel():
        return torch.zeros(t.shape[1], dtype=torch.float64)
    return t.double().flatten(2).square().mean(2).sqrt().amax(0)


def spectrum_terms(weight: Tensor, size: Sequence[int]) -> float:
    """Return t of the derivation of v."""
    lags = torch.Size([2 * k - 1 for k in weight.shape[2:]]).numel()
    return 4 + weight[0].numel() ** 0.5 + lags**0.5 + torch.tensor(float(torch.Size(size).numel())).log2().item()


def peak_power(weight: Tensor) -> Tensor:
    """Return the bound of every p(f), (C_O, 1...)."""
    return weight.double().abs().flatten(2).sum(2).square().sum(1).view(-1, *[1] * (weight.ndim - 2))


def inverse_root_error(weight: Tensor) -> float:
    """Return the error of the way from p to v, relative to v."""
    exact = stat_dtype(weight.dtype) == torch.float64 or has_float64(weight.device)
    return 4 * unit(torch.float64) if exact else 3.5 * unit(torch.float32)


def spectrum_floor(weight: Tensor, v: Tensor) -> Tensor:
    """Return the floor of v entry by entry, for the oracle's v (C_O, *size)."""
    error = unit(torch.float64) * spectrum_terms(weight, v.shape[1:]) * peak_power(weight) * v.square() / 2
    return v * (error + inverse_root_error(weight) + unit(stat_dtype(weight.dtype)))


def spectrum_gain(v: Tensor, power: Tensor, eps: float) -> Tensor:
    """Return |d v(f) / d a| for each frequency: v^2 (r + sqrt(eps (1 - r^2)))."""
    r = (v * power.sqrt()).clamp(max=1)
    return v.square() * (r + (eps * (1 - r.square())).sqrt())


def spectrum_gradient_floor(weight: Tensor, v: Tensor, dv: Tensor, dweight: Tensor, power: Tensor, eps: float) -> float:
    """Return the worst channel's floor, for the oracle's v, power and gradient of weight."""
    t, peak, gain = spectrum_terms(weight, v.shape[1:]), peak_power(weight), spectrum_gain(v, power, eps)
    of_a_and_v = unit(torch.float64) * t * (v**3 * peak.sqrt() + 1.5 * peak * v.square() * gain)
    saved = 3 * (inverse_root_error(weight) + unit(stat_dtype(weight.dtype))) * gain
    error = (dv.double().abs() * (of_a_and_v + saved)).flatten(1).sum(1).max().item()
    return error + unit(weight.dtype) * largest(dweight)


def filter_terms(size: Sequence[int]) -> float:
    """Return t of the derivation of filter: one product with an orthogonal matrix along each axis."""
    return 4 + sum(n**0.5 for n in size)


def filter_floor(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """Return the floors (C,) of y of spectral_filter, or of dz for y's gradient.

    z is in the type of the test, y the oracle's.
    """
    u, rms_v = unit(stat_dtype(z.dtype)), v.double().flatten(1).square().mean(1).sqrt()
    white = noise(z.numel()) * u * filter_terms(v.shape[1:]) * (plane_rms(z) * rms_v + plane_rms(y))
    largest_y = y.double().abs().movedim(1, 0).flatten(1).amax(1) if y.numel() else torch.zeros_like(white)
    return white + unit(z.dtype) * largest_y


def filter_spectrum_floor(z: Tensor, v: Tensor, dy: Tensor, dv: Tensor) -> float:
    """Return the floor of dv: two factors, each with its own error, and a sum over N samples."""
    u, t = unit(stat_dtype(z.dtype)), 2 * filter_terms(v.shape[1:]) + z.shape[0] ** 0.5
    size = (plane_rms(z) * plane_rms(dy)).max().item() * z.shape[0]
    return noise(v.numel()) ** 2 * u * t * size + unit(v.dtype) * largest(dv)


@dataclass(frozen=True)
class ConvNormFloors:
    """The floors of one problem, absolute."""

    y: float
    dx: float
    dweight: float
    dbias: float
    daffine: float


def conv_norm_floors(
    x: Tensor, parameters: Sequence[Tensor | None], config: convnorm.Config, dy: Tensor,
    y: Tensor, grads: Sequence[Tensor | None] = (None,) * 4,
) -> ConvNormFloors:  # fmt: skip
    """Return the floors for x, dy, parameters in the type of the test, and the oracle's y and grads.

    parameters: weight, bias, affine_weight; grads: x's first.
    """
    weight, _, affine_weight = parameters
    assert weight is not None
    u, rounding = unit(stat_dtype(x.dtype)), unit(x.dtype)
    up, w, dy = x.double(), weight.detach().double(), dy.double()
    kernel, samples = w.shape[2:], x.shape[0]
    r = None if affine_weight is None else affine_weight.detach().double()
    with torch.enable_grad():
        z = convnorm.unstrided(up, w, config).requires_grad_()
        v = convnorm.kernel_spectrum(w, z.shape[2:], config.eps, config.dilation).requires_grad_()
        filtered = convnorm.spectral_filter(z, v)
        out = convnorm.cropped(filtered, up, kernel, config)
        out = out if r is None else convnorm.affine(out, r)
        d_filtered, dz, dv = torch.autograd.grad(out, (filtered, z, v), dy)
        copied = torch.zeros_like(up).requires_grad_()
        (copies,) = torch.autograd.grad(convnorm.padded(copied, kernel, config)[0].sum(), copied)
    z, v, filtered = z.detach(), v.detach(), filtered.detach()
    size = z.shape[2:].numel()
    r_sum = torch.ones(w.shape[0], dtype=torch.float64) if r is None else r.abs().flatten(1).sum(1)
    rms_v, v_max = v.flatten(1).square().mean(1).sqrt(), v.flatten(1).amax(1)
    rms_z, rms_y, rms_d, rms_dz = (plane_rms(t) for t in (z, filtered, d_filtered, dz))
    rms_dy = plane_rms(dy) * (dy[0, 0].numel() / size) ** 0.5  # as many values, on the whole circle

    conv, tap, transform = u * (4 + w[0].numel() ** 0.5), u * (4 + kernel.numel() ** 0.5), u * filter_terms(z.shape[2:])
    of_v = 1.5 * unit(torch.float64) * spectrum_terms(w, z.shape[2:]) * peak_power(w).flatten() * v_max**2
    of_v = of_v + 3 * u + inverse_root_error(weight)
    of_z = conv * plane_rms(convnorm.unstrided(up.abs(), w.abs(), config)) + 2 * rounding * rms_z + transform * rms_z
    of_y = of_z * rms_v + (transform + rounding + of_v) * rms_y
    of_d = (tap + 2 * rounding) * r_sum * rms_dy + transform * rms_d
    of_dz = of_d * rms_v + (transform + rounding + of_v) * rms_dz

    back = u * (4 + (w.numel() / w.shape[1]) ** 0.5) + rounding
    of_dx = (of_dz + back * rms_dz) * w.abs().flatten(2).sum(2).amax(1)
    along = (samples * size) ** 0.5
    norm_x = convnorm.padded(up, kernel, config)[0].movedim(1, 0).flatten(1).norm(dim=1).max()
    of_dweight = norm_x * along * (of_dz + (u * along + rounding) * rms_dz)
    if not config.detach_spectrum:
        z_hat, d_hat = (torch.fft.fftn(t, dim=convnorm.spatial(t), norm="ortho").abs() for t in (z, d_filtered))
        of_z, of_d = (t.view(-1, *[1] * len(kernel)) for t in (of_z, of_d))
        of_dv = (of_z * d_hat + of_d * z_hat + of_z * of_d + u * samples**0.5 * z_hat * d_hat).sum(0)
        power = convnorm.power(w, z.shape[2:], config.dilation)
        of_dweight = of_dweight + (of_dv * spectrum_gain(v, power, config.eps)).flatten(1).sum(1)
        of_dweight = of_dweight + spectrum_gradient_floor(weight, v, dv, torch.zeros(()), power, config.eps)
    norm_dy, sum_dy = rms_dy * along, dy.abs().movedim(1, 0).flatten(1).sum(1)
    rounded = [
        0.0 if p is None or g is None else unit(p.dtype) * largest(g)
        for p, g in zip((x, *parameters), grads, strict=True)
    ]
    of_affine = r_sum * (of_y + (tap + rounding) * rms_y)
    return ConvNormFloors(
        y=noise(y.numel()) * of_affine.max().item() + rounding * largest(y),
        dx=noise(x.numel()) * largest(copies) * of_dx.view(config.groups, -1).sum(1).max().item() + rounded[0],
        dweight=of_dweight.max().item() + rounded[1],
        dbias=((u * (2 + along) + rounding) * sum_dy).max().item() + rounded[2],
        daffine=(norm_dy * along * (of_y + (rounding + u * along) * rms_y)).max().item() + rounded[3],
    )


def assert_conv_norm(
    got: Sequence[Tensor | None], oracle: Sequence[Tensor | None], plain: Sequence[Tensor | None], floor: ConvNormFloors
) -> None:
    """Check the rule for y and the gradients of x, weight, bias and affine_weight."""
    for name, value, exact, other in zip(("y", "dx", "dweight", "dbias", "daffine"), got, oracle, plain, strict=True):
        assert (value is None) == (exact is None), name
        if value is not None and exact is not None:
            assert_within(name, value, exact, other, getattr(floor, name), largest(exact))


# Analysis
#
#     identity    One equation on two paths in float64, on well-conditioned problems of at most 1e4 terms: u sqrt(1e4)
#                 = 1e-14 for each, and four digits for what cancels.
#     kappa       An error E of a symmetric matrix moves its eigenvalues by |E|_2 at most (Weyl); the smallest nonzero
#                 one by the most for its size. E_ij is u (4 + sqrt(m)) of what the terms of H_ij add up to, which is
#                 at most a_i a_j with a_i = sqrt(H_ii); so |E|_2 <= u (4 + sqrt(m)) |a|^2. With P, P^T E P has
#                 |P|^T a for a. Eigenvalues are good to u sqrt(n) of the largest, which is no more than |a|^2. Of
#                 kappa: twice |E|_2 / lambda_min, for both eigenvalues, and the oracle has an error of its own.
#     kappa(x)    The same for singular values (Weyl): the decomposition errs by u (4 + sqrt(n)) of the largest, and
#                 the rounding of x, of its mean and of their difference by 2 u |mean| in each of n d entries. kappa is
#                 a square: twice the relative error of the smallest value.
#     SND         N = 3, B = 2, F = x - mean_B: a sample has two outputs, of which one comes with frequency p = 1/2 in
#                 s draws. Eq. 10 is 4 p (1 - p) = 1 - (2 p - 1)^2 of eq. 9, and 2 p - 1 has standard deviation s^-1/2:
#                 five of these are 25 / s.
#     BIM         Signs are exact; of a step x + alpha and a bound x + eps each is rounded once, u |x|, and a path that
#                 forms bounds as x + clip(x' - x) twice more.
#     samples     The mean of n numbers is within five of its standard deviations, std / sqrt(n).
#     types       Values are computed in a wider type and rounded, once as input and once as output: 2 u.
#     gap         w . grad cancels to u sqrt(m) of its terms, which are at most a hundred times |w| |grad| here.

IDENTITY = 1e-10
INVARIANCE_GAP = 1e-12


def assert_identity(got: Tensor | float, expected: Tensor | float) -> None:
    """Check that values are equal but for float64's rounding, relative to the largest entry."""
    got, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (got, expected))
    torch.testing.assert_close(got, expected, rtol=0, atol=IDENTITY * largest(expected), equal_nan=True)


def condition_error(H: Tensor, P: Tensor, rank: int, terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Return the relative error of kappa(P^T H P).

    H has this rank, and each entry is a sum of so many terms in this type.
    """
    a = P.abs().mT @ H.diagonal().abs().sqrt()
    values = torch.linalg.svdvals(P.mT @ H @ P)
    return 4 * unit(dtype) * (4 + terms**0.5 + len(H) ** 0.5) * (a.square().sum() / values[rank - 1]).item()


def covariance_condition_error(values: Sequence[float], n: int, mean: float = 0.0) -> float:
    """Return the relative error of kappa for n samples with these singular values once centered."""
    entries = (n * len(values)) ** 0.5
    return 2 * unit(torch.float64) * ((4 + n**0.5) * max(values) + 2 * entries * mean) / min(values)


def snd_sampling(draws: int) -> float:
    return 25 / draws


def sampling(std: float, n: int) -> float:
    return 5 * std / n**0.5


def rounding(exact: Tensor | float, dtype: torch.dtype) -> float:
    return 2 * unit(dtype) * largest(torch.as_tensor(exact))


def assert_bim(got: Tensor, expected: Tensor, steps: int) -> None:
    bound = 4 * steps * unit(got.dtype) * largest(expected.double())
    assert_within("attacked samples", got, expected.double(), None, bound, largest(expected.double()))


# Folding
#
#     one layer   y = A (W x + b - mean) + beta in two ways. Either way n products and d of their sums are added, with
#                 sums of three more terms, gamma and one rounding of what is merged: u (6 + sqrt(n) + sqrt(d)) of
#                 S = |A| (|W| |x| + |b| + |mean|) + |beta| for each, which is the pair's own value where all of its
#                 numbers are absolute values. Merged weights of another type are rounded once more, u_w S.
#     a network   The errors of its layers add up: normalized activations stay of one size, so none grows much. Of S at
#                 most a digit cancels.


def assert_folded(
    folded: torch.nn.Module,
    layer: torch.nn.Module,
    norm: torch.nn.Module,
    x: Tensor,
    weights: torch.dtype | None = None,
) -> None:
    """Check the function of the layer and the norm behind it, float64; weights: the type of the merged ones."""
    absolute = [copy.deepcopy(module) for module in (layer, norm)]
    for name, value in (item for module in absolute for item in module.state_dict().items()):
        if name != "num_batches_tracked":
            value.copy_(-value.abs() if name == "running_mean" else value.abs())
    with torch.no_grad():
        S = largest(absolute[1](absolute[0](x.abs())))
        got, expected = folded(x), norm(layer(x))
    n = layer.weight[0].numel() * layer.weight.shape[0]  # no fewer than there are, in transposed ones as well
    d = getattr(norm, "group_size", 1)
    relative = 2 * unit(torch.float64) * (6 + n**0.5 + d**0.5) + (0 if weights is None else unit(weights))
    assert_within("folded", got, expected, None, relative * S, S)


def assert_folded_network(got: Tensor, expected: Tensor, layers: int, terms: int, d: int) -> None:
    """Check the function of a folded network.

    layers: those with a norm; terms, d: at most so many products in a sum, channels in a whitening group.
    """
    relative = 10 * layers * 2 * unit(torch.float64) * (6 + terms**0.5 + d**0.5)
    assert_within("folded", got, expected, None, relative * largest(expected), largest(expected))
