"""SimBA on a model whose best perturbation is known, and against Algorithm 1."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.fft
import torch
from torch import Tensor

from normkernels.analysis import adversarial, simba
from tests.analysis.attacked import SIMBA, D, Linear, images, network
from tests.tolerances import IDENTITY, assert_identity


@pytest.mark.parametrize("targeted", [False, True])
def test_simba_of_a_linear_model_that_does_not_give_way(targeted: bool) -> None:
    """For every entry +eps or -eps helps, so all entries are changed by eps; +eps is asked first."""
    w, x = torch.randn(10, dtype=D), torch.rand(6, 10, dtype=D) * 0.4 + 0.3
    y = torch.zeros(6, dtype=torch.int64)
    b = 10.0 if targeted else -10.0
    got = simba(Linear(w, b), x, y, eps=0.1, max_queries=100, targeted=targeted)
    way = (-w if targeted else w).sign()
    assert_identity(got.x, x + 0.1 * way)
    assert not got.succeeded.any()
    assert got.queries.tolist() == [int(1 + 10 + (way < 0).sum())] * 6


def test_simba_against_algorithm_1() -> None:
    """The model sees, query by query, what Algorithm 1 asks with the directions that were tried."""
    net, (x, y) = network().eval(), images(1)
    y = net(x).argmax(1)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return net(x)

    got = simba(model, x, y, eps=0.3, max_queries=50)
    assert len(seen) == got.queries.item()
    current, p, tried, i = x, net(x).softmax(1)[0, y], set(), 1
    while i < len(seen):
        assert (net(current).argmax(1) == y).all()
        for alpha in (0.3, -0.3):
            (index,) = (seen[i] != current).flatten().nonzero().flatten().tolist() or [None]
            q = torch.zeros(40, dtype=D)
            q[index] = 1
            assert_identity(seen[i], (current + alpha * q.view_as(x)).clamp(0, 1))
            candidate, i = seen[i], i + 1
            value = net(candidate).softmax(1)[0, y]
            if value < p:
                current, p = candidate, value
                break
            if i == len(seen):
                break
        assert index not in tried
        tried.add(index)
    assert torch.equal(current, got.x) and got.succeeded.item() == (net(current).argmax(1) != y).item()


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_simba_within_its_budget(basis: str) -> None:
    net, (x, _) = network(), images(40)
    y = net.eval()(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    got = simba(net, x, y, **SIMBA, basis=basis)
    prediction = net(got.x).argmax(1)
    assert torch.equal(got.succeeded, prediction != y) and got.succeeded.sum() > 10
    assert got.queries[0] == 1 and torch.equal(got.x[0], x[0]) and got.succeeded[0]
    assert got.queries.dtype == torch.int64 and got.queries.max() <= 60
    assert got.x.min() >= 0 and got.x.max() <= 1 and not got.x.requires_grad
    steps = (got.queries - 1).clamp(max=40).double()
    if basis == "pixel":  # with other directions, clipping leaves them not orthogonal
        assert ((got.x - x).flatten(1).norm(dim=1) <= 0.2 * steps.sqrt() * (1 + IDENTITY)).all()
    assert simba(net, x, y, **{**SIMBA, "max_queries": 1}).queries.eq(1).all()
    assert simba(net, x, y, **{**SIMBA, "max_queries": 2}).queries.max() == 2


def test_simba_gives_the_same_from_the_same_seed() -> None:
    net, (x, y) = network(), images(8)

    def run(seed: int, **options: Any) -> Any:
        return simba(net, x, y, **SIMBA, generator=torch.Generator().manual_seed(seed), **options)

    first = run(0)
    for again in (run(0), run(0, batch_size=3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, run(1).x)
    orders = [set(map(tuple, (s - o).nonzero().tolist())) for s, o in zip(first.x, x, strict=True) if (s != o).any()]
    assert len(orders) > 2 and any(a != b for a, b in itertools.pairwise(orders))


@pytest.mark.parametrize("frequencies", [None, 3])
def test_cosine_basis(frequencies: int | None) -> None:
    """The directions agree with scipy's orthonormal DCT-II: (c, u, v) has one coefficient, and it is 1."""
    x = torch.zeros(1, 2, 4, 5, dtype=D)
    directions = adversarial._Directions(x, "dct", frequencies)
    q = directions(torch.arange(directions.count))
    sizes = (2, frequencies or 4, frequencies or 5)
    assert q.shape == (math.prod(sizes), 2, 4, 5)
    coefficients = torch.from_numpy(scipy.fft.dctn(q.numpy(), axes=(2, 3), norm="ortho"))
    kept = coefficients[:, :, : sizes[1], : sizes[2]].flatten(1)
    assert_identity(kept, torch.eye(len(q), dtype=D))
    assert_identity(q.flatten(1) @ q.flatten(1).mT, torch.eye(len(q), dtype=D))


def test_low_frequencies_only() -> None:
    net, (x, y) = network(), images()
    x = x * 0.2 + 0.4  # no clipping, which makes high frequencies
    got = simba(net, x, y, eps=0.05, max_queries=30, basis="dct", frequencies=2)
    coefficients = torch.from_numpy(scipy.fft.dctn((got.x - x).numpy(), axes=(2, 3), norm="ortho"))
    assert coefficients[:, :, :2, :2].abs().max() > 0.04
    coefficients[:, :, :2, :2] = 0
    assert_identity(1 + coefficients, torch.ones_like(coefficients))
