"""The rule itself, and what checks values of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOST = 0.05  # relative error above which a path has no digits left to compare with

# One equation on two paths in float64, on well-conditioned problems of at most 1e4 terms: u sqrt(1e4) = 1e-14 for each,
# and four digits for what cancels.
IDENTITY = 1e-10


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def largest(t: Tensor) -> float:
    """Return the largest absolute value, 0 where there is none."""
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


def assert_agree(got: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Check that two careful paths in one type agree, on a well-conditioned input of the size used in these tests.

    Each is within r (see whitening.py) of the exact result, so they are within 2 r of each other, relative to the
    largest entry; with T = 5 (k = 2.25^5), d = 8 and m = 1000, 2 r = 2400 u: 1.4e-4 in float32, 2.7e-13 in float64.
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


def assert_identity(got: Tensor | float, expected: Tensor | float) -> None:
    """Check that values are equal but for float64's rounding, relative to the largest entry."""
    got, expected = (torch.as_tensor(t, dtype=torch.float64) for t in (got, expected))
    torch.testing.assert_close(got, expected, rtol=0, atol=IDENTITY * largest(expected), equal_nan=True)


def rounding(exact: Tensor | float, dtype: torch.dtype) -> float:
    """Return 2 u of the largest value: computed in a wider type and rounded, once as input and once as output."""
    return 2 * unit(dtype) * largest(torch.as_tensor(exact))
