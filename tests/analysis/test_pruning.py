"""Channels with small gamma, and with similar gamma and beta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels import DBN2d, IterNorm1d
from normkernels.analysis import pruning_candidates
from tests.tolerances import assert_identity


def layer(make: Any, gamma: list[float], beta: list[float], **options: Any) -> nn.Module:
    norm: Any = make(len(gamma), **options)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.copy_(torch.tensor(beta))
    return norm


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.SyncBatchNorm, IterNorm1d, lambda n: DBN2d(n, n)])
def test_small(make: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), layer(make, [0.25, -0.125, 1.0, -0.5], [0.0] * 4))
    found = pruning_candidates(net, gamma_below=0.5)
    assert found == [("1", (1,), "small", 0.125), ("1", (0,), "small", 0.25)]


def test_similar() -> None:
    """Channel 0 takes 1 and 3; 2 is within reach of 1, but not of 0, so it begins a group and takes 4; 5 is alone."""
    gamma, beta = [1.0, 1.5, 1.75, 1.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.5, 0.375, 0.0]
    net = nn.ModuleDict({"norm": layer(nn.BatchNorm2d, gamma, beta)})
    assert pruning_candidates(net, similar_within=0.5) == [
        ("norm", (0, 1, 3), "similar", 0.5),
        ("norm", (2, 4), "similar", (0.25**2 + 0.375**2) ** 0.5),
    ]
    assert pruning_candidates(net, similar_within=0.2) == []


def test_distance_is_that_of_the_outputs() -> None:
    """The output channels differ by the distance in root mean square, for any N(v) (eq. 4)."""
    norm = layer(nn.BatchNorm1d, [1.0, 1.3], [0.2, -0.2], eps=1e-30, dtype=torch.float64)
    y = norm(torch.randn(50, 1, dtype=torch.float64).expand(50, 2))
    (found,) = pruning_candidates(norm, similar_within=1)
    assert_identity(found.value, (y[:, 0] - y[:, 1]).square().mean().sqrt())


def test_equal_channels_and_both_criteria() -> None:
    net = nn.Sequential(layer(nn.BatchNorm1d, [0.0] * 3, [1.0] * 3), layer(nn.BatchNorm1d, [1.0, 1.0], [0.0, 0.0]))
    assert pruning_candidates(net, gamma_below=0.1, similar_within=0) == [
        *(("0", (channel,), "small", 0.0) for channel in range(3)),
        ("0", (0, 1, 2), "similar", 0.0),
        ("1", (0, 1), "similar", 0.0),
    ]
    assert pruning_candidates(net, gamma_below=0) == []


def test_groups_do_not_overlap() -> None:
    points: Tensor = torch.rand(2, 40)
    net = layer(nn.BatchNorm1d, points[0].tolist(), points[1].tolist())
    groups = [found.channels for found in pruning_candidates(net, similar_within=0.2)]
    members = [channel for group in groups for channel in group]
    assert len(members) == len(set(members)) > 20
    for first, *others in groups:
        assert others and all((points[:, first] - points[:, other]).norm() <= 0.2 for other in others)


def test_layers_without_gamma_and_beta() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2, affine=False), IterNorm1d(2, affine=False), nn.LayerNorm(2), nn.Linear(2, 2))
    assert pruning_candidates(net, gamma_below=10, similar_within=10) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "gamma_below, similar_within: expected at least one of them"),
        ({"gamma_below": -1.0}, ValueError, "gamma_below: expected a finite number at least 0, got -1"),
        ({"gamma_below": float("nan")}, ValueError, "gamma_below: expected a finite number"),
        ({"model": 3, "gamma_below": 1.0}, TypeError, "model: expected an nn.Module, got int"),
        ({"similar_within": "0.1"}, TypeError, "similar_within: expected a number, got '0.1'"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pruning_candidates(**{"model": nn.BatchNorm1d(2), **options})
