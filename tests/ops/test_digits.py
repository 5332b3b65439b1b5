"""Products of digits: as exact as float64, on any scale and of any length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normkernels.eager import digits
from tests.oracles import inputs
from tests.tolerances import unit


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, generator=inputs.generator(seed))


def total(parts: tuple[Tensor, ...]) -> Tensor:
    """Add up parts in float64, without error where a few parts are not far apart."""
    return torch.stack([part.double() for part in parts]).sum(0)


# One term, few, as many as a 3 x 3 layer may have, and more than one product takes. Numbers of three parts have more
# digits than float64.
@pytest.mark.parametrize("terms", [1, 7, 4608, 40_000])
@pytest.mark.parametrize(("parts", "scale"), [(1, 1e-20), (2, 1.0), (3, 1e12)])
def test_a_product_is_as_exact_as_float64(terms: int, scale: float, parts: int) -> None:
    """The error is 2^-53 of the terms' sizes for each factor's last digit, and as much for the oracle's rounding."""
    a = tuple(matrix(2, 2, terms, seed=i) * scale * 2.0 ** (-26 * i) for i in range(parts))
    b = (matrix(2, terms, 1, seed=9),)
    expected = total(a) @ total(b)
    largest = total(a).abs().amax((1, 2), keepdim=True) * total(b).abs().amax((1, 2), keepdim=True)
    found = digits.product(a, b)
    error = ((total(found) - expected) / largest).abs().max().item()
    assert error <= unit(torch.float64) * (2 * terms + 4)
    assert (found[1].abs() <= unit(torch.float32) * found[0].abs()).all()


@pytest.mark.parametrize("terms", [1, 9, 300, 4608, digits.LONGEST])
@pytest.mark.parametrize("plain", [0, 1, 2])
def test_sums_of_digits_stay_within_2_to_the_24(terms: int, plain: int) -> None:
    bits, count = digits.bits_of_digits(terms, plain)
    assert terms * count * 4**bits / 2**plain <= 2**24 and bits * count >= digits.BITS


# The first digit is the largest there is; all are two thirds of it; rounding the first one carries.
@pytest.mark.parametrize("value", [0.5, 1 / 3, 0.49999997])
@pytest.mark.parametrize("terms", [5, 4608])
def test_equal_terms_give_the_largest_sums(value: float, terms: int) -> None:
    a, b = torch.full((1, terms), value), torch.full((terms, 1), value)
    expected = terms * a[0, 0].double().item() ** 2
    assert abs(total(digits.product((a,), (b,))).item() / expected - 1) <= 4 * unit(torch.float64)


def test_cancelling_terms() -> None:
    """(1 + e) (1 - e) - 1 = -e^2 is exact; float32 alone has nothing of it."""
    e = 2.0**-20
    a, b = torch.tensor([[1 + e, -1.0]]), torch.tensor([[1 - e], [1.0]])
    assert total(digits.product((a,), (b,))).item() == -(e**2) and (a @ b).item() == 0


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_digits_add_up_to_the_number(bits: int) -> None:
    (x,), scale = digits.normalized((matrix(6, 7),))
    count = math.ceil(digits.BITS / bits)
    found = digits.digits((x,), bits, count)
    assert (found == found.round()).all() and (found.abs() <= 2 ** (bits - 1)).all()
    weights = torch.tensor([2.0 ** (-bits * n) for n in range(1, count + 1)], dtype=torch.float64)
    error = (torch.einsum("n,nij->ij", weights, found.double()) - x.double()).abs().max().item()
    assert error <= 2.0 ** -(bits * count + 1) and scale.item() == 2 ** round(math.log2(scale.item()))


@pytest.mark.parametrize("x", [1.0, 1.5, 0.75, 3.4e38, 1e-30, 0.0])
def test_powers_of_two(x: float) -> None:
    power, inverse = (t.item() for t in digits.powers_of_two(torch.tensor([x])))
    expected = min(max(2.0 ** math.floor(math.log2(x)) if x else 0.0, 2.0**-120), 2.0**120)
    assert power == expected and inverse == 1 / expected


def test_three_parts_hold_what_is_added() -> None:
    x = tuple(torch.tensor([value]) for value in (1.0, 0.0, 0.0))
    for term in (2.0**-30, 2.0**-60, -1.0):
        x = digits.plus(x, torch.tensor([term]))
    assert total(x).item() == 2.0**-30 + 2.0**-60


def test_waves_are_made_once() -> None:
    first, second = (digits.waves(11, 2, 1, torch.device("cpu")) for _ in range(2))
    assert first[0][0] is second[0][0] and first[1][2] is second[1][2]


@pytest.mark.parametrize(("n", "reach", "dilation"), [(7, 2, 1), (34, 2, 3), (1, 0, 1)])
def test_waves_are_those_of_float64(n: int, reach: int, dilation: int) -> None:
    angles = [[2 * math.pi * (u * t * dilation % n) / n for t in range(-reach, reach + 1)] for u in range(n)]
    exact = torch.tensor(angles, dtype=torch.float64)
    cos, sin = digits.waves(n, reach, dilation, torch.device("cpu"))
    # Functions of tensors may differ from Python's in the last bit.
    assert (total(cos) - exact.cos()).abs().max().item() <= 2 * unit(torch.float64)
    assert (total(sin) - exact.sin()).abs().max().item() <= 2 * unit(torch.float64)
