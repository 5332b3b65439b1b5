"""Lemma 1's decomposition, Lemmas 2 and 3 on networks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels import IterNorm2d
from normkernels.analysis import decompose, scale_invariance_gap
from tests.tolerances import assert_identity, rounding
from tests.tolerances.analysis import INVARIANCE_GAP

D = torch.float64


@pytest.mark.parametrize(
    ("shape", "dim"), [((7,), 0), ((7,), -1), ((3, 5), 1), ((3, 5), 0), ((2, 3, 4), -2), ((4, 2), 1)]
)
def test_lemma_1(shape: tuple[int, ...], dim: int) -> None:
    """Eq. 1 to 4 hold: standardization, its norm, the orthogonal decomposition, the norm of v."""
    v = torch.randn(shape, dtype=D) * 3 + 1
    gamma, beta, direction = decompose(v, dim)
    rest = [n for i, n in enumerate(shape) if i != dim % len(shape)]
    assert list(gamma.shape) == list(beta.shape) == rest and direction.shape == v.shape
    assert_identity(beta, v.mean(dim))
    assert_identity(gamma, v.std(dim, correction=0))
    assert_identity(direction, (v - v.mean(dim, keepdim=True)) / v.std(dim, correction=0, keepdim=True))
    n = shape[dim]
    assert_identity(direction.norm(dim=dim), torch.full(rest, n**0.5, dtype=D))
    assert_identity(1 + direction.sum(dim), torch.ones(rest))
    assert_identity(gamma.unsqueeze(dim) * direction + beta.unsqueeze(dim), v)
    assert_identity(v.square().sum(dim), n * (gamma**2 + beta**2))
    assert_identity(decompose(2.5 * v + 7, dim).direction, direction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_vectors(dtype: torch.dtype) -> None:
    """A constant vector has no direction, even one of 0.1, which has no exact mean; one entry is a constant vector."""
    for v in (torch.full((3, 7), 0.1, dtype=dtype), torch.zeros(2, 5, dtype=dtype), torch.randn(4, 1, dtype=dtype)):
        gamma, beta, direction = decompose(v)
        assert not gamma.any() and not direction.any() and torch.equal(beta, v[:, 0])
        assert gamma.dtype == beta.dtype == direction.dtype == dtype


def test_a_large_mean_costs_no_digits() -> None:
    """Entries 2^20 + 0, 1, 2, 3 are exact in float32: so must be mean, and variance 5 / 4."""
    gamma, beta, direction = decompose(torch.arange(4.0) + 2**20)
    assert beta == 2**20 + 1.5 and gamma == torch.tensor(1.25).sqrt()
    assert torch.equal(direction, (torch.arange(4.0) - 1.5) / gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size(dtype: torch.dtype) -> None:
    """Vectors are decomposed exactly at scales where their squares are 0 or infinite."""
    v = torch.randn(9, dtype=dtype)
    for exponent in (-100, 100) if dtype == torch.float32 else (-900, 900):
        for got, expected, power in zip(decompose(v * 2.0**exponent), decompose(v), (1, 1, 0), strict=True):
            assert torch.equal(got, expected * 2.0 ** (exponent * power))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    v = (torch.randn(3, 1000) * 1000).to(dtype)  # their squares overflow in float16
    for got, exact in zip(decompose(v), decompose(v.double()), strict=True):
        assert (got.double() - exact).abs().max() <= rounding(exact, dtype)


def test_is_differentiable() -> None:
    v = torch.randn(3, 4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(decompose, v)
    constant = torch.ones(4, dtype=D, requires_grad=True)
    sum(part.sum() for part in decompose(constant)).backward()  # type: ignore[union-attr]
    assert constant.grad is not None and constant.grad.isfinite().all()


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        ([1.0], TypeError, "v: expected a torch.Tensor, got list"),
        (torch.arange(3), TypeError, "v: expected float16"),
        (torch.tensor(1.0), ValueError, r"v: expected at least one entry along dimension -1, got shape \(\)"),
        (torch.ones(2, 0), ValueError, "v: expected at least one entry along dimension -1"),
    ],
)
def test_bad_vectors(v: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(v)


@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        (2, ValueError, "dim: expected less than v's 2 dimensions, got 2"),
        (-3, ValueError, "dim: expected at least -2, got -3"),
        (1.0, TypeError, "dim: expected an int, got 1.0"),
    ],
)
def test_bad_dim(dim: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(torch.ones(2, 3), dim)


def network(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 3)
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 2, 6, 6, dtype=D), torch.randint(3, (8,))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(6, eps=1e-30),
    "layer": lambda: nn.GroupNorm(1, 6, eps=1e-30),
    "group": lambda: nn.GroupNorm(2, 6, eps=1e-30),
    "iterative": lambda: IterNorm2d(6, eps=1e-30),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_weights_before_a_normalization_are_orthogonal_to_their_gradient(norm: Any) -> None:
    """Lemma 2 holds for them. The weights of the last layer are not orthogonal to their gradient."""
    net, (x, y) = network(norm()), batch()
    gaps = scale_invariance_gap(net, F.cross_entropy(net(x), y))
    assert set(gaps) == {name for name, _ in net.named_parameters()}
    assert gaps["0.weight"] <= INVARIANCE_GAP < 1e-3 < gaps["4.weight"]


def test_rows_before_batch_normalization() -> None:
    """Lemma 3 holds for W_i row by row; layer normalization is invariant to the scale of all rows together only."""
    for norm, invariant in ((nn.BatchNorm2d(6, eps=1e-30), True), (nn.GroupNorm(1, 6, eps=1e-30), False)):
        net, (x, y) = network(norm), batch()
        gaps = scale_invariance_gap(net, F.cross_entropy(net(x), y), per_row=True)
        assert {name: tuple(gap.shape) for name, gap in gaps.items()} == {"0.weight": (6,), "4.weight": (3,)}
        assert (gaps["0.weight"].max() <= INVARIANCE_GAP) == invariant
        assert gaps["4.weight"].min() > 1e-4


def test_eps_leaves_its_share() -> None:
    """The gap is about eps / sigma^2, with sigma^2 about 1 / 3 after the default initialization."""
    net, (x, y) = network(nn.BatchNorm2d(6, eps=1e-3)), batch()
    gap = scale_invariance_gap(net, F.cross_entropy(net(x), y))["0.weight"]
    assert 1e-6 < gap < 1e-2


def test_is_the_cosine() -> None:
    """L = w . a has the gradient a. The scale of either may be beyond what squares of float64 hold."""
    layer = nn.Linear(3, 1, bias=False, dtype=D)
    a = torch.tensor([1.0, 2.0, 2.0], dtype=D)
    for scale, size in itertools.product((1.0, 1e-200, 1e200), repeat=2):
        layer.weight.data = torch.tensor([[3.0, 0.0, 4.0]], dtype=D) * size
        gap = scale_invariance_gap(layer, lambda: (layer.weight * a * scale).sum())  # noqa: B023
        assert_identity(gap["weight"], 11 / 15)


def test_zero_is_zero() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert scale_invariance_gap(layer, lambda: layer.weight.sum() + 0 * layer.bias.sum()) == {
        "weight": 0.0,
        "bias": 0.0,
    }


def test_names() -> None:
    """Frozen parameters and those that the loss does not depend on are left out, shared ones come once."""
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    net["c"].weight.requires_grad_(False)
    x = torch.randn(3, 2)
    gaps = scale_invariance_gap(net, lambda: net["c"](net["b"](net["a"](x))).square().sum())
    assert set(gaps) == {"a.weight", "a.bias", "b.bias", "c.bias"}


def test_gradients_and_graph_are_left_alone() -> None:
    net, (x, y) = network(nn.BatchNorm2d(6)), batch()
    loss = F.cross_entropy(net(x), y)
    first = scale_invariance_gap(net, loss)
    assert all(p.grad is None for p in net.parameters())
    loss.backward()  # the graph is still there
    with torch.no_grad():
        assert scale_invariance_gap(net, lambda: F.cross_entropy(net(x), y)) == first


@pytest.mark.parametrize(
    ("model", "loss", "error", "message"),
    [
        (3, torch.tensor(1.0), TypeError, "model: expected an nn.Module, got int"),
        (nn.ReLU(), torch.tensor(1.0), ValueError, "model: expected parameters that require gradients, got none"),
        (nn.Linear(2, 2), 1.0, TypeError, "loss: expected a tensor or a function, got float"),
        (nn.Linear(2, 2), lambda: 1.0, TypeError, "loss: expected a torch.Tensor, got float"),
        (nn.Linear(2, 2), torch.ones(2, requires_grad=True), ValueError, r"loss: expected a scalar, got shape \(2,\)"),
        (nn.Linear(2, 2), torch.tensor(math.pi), ValueError, "loss: expected a scalar that requires a gradient"),
    ],
)
def test_bad_input(model: nn.Module, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scale_invariance_gap(model, loss)
