"""Layers of every kind that BNP knows, data for them, and what the paper makes of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels.optim import BNP
from tests.oracles import bnp as oracle
from tests.oracles import inputs
from tests.tolerances.bnp import precondition_floors

# A layer, its input without the batch dimension, and r s of its output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(5, 4), (5,), 1),
    "linear-wide": (lambda: nn.Linear(40, 3), (40,), 1),
    "linear-tokens": (lambda: nn.Linear(5, 4), (7, 5), 7),
    "linear-image": (lambda: nn.Linear(5, 4), (3, 4, 5), 12),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), (5,), 1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), (3, 11), oracle.positions([11], [5], [1], [2], [1])),
    "conv1d-stride": (lambda: nn.Conv1d(3, 4, 4, stride=3), (3, 11), oracle.positions([11], [4], [3], [0], [1])),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 9), oracle.positions([8, 9], [3, 3], [1, 1], [0, 0], [1, 1])),
    "conv2d-wide": (lambda: nn.Conv2d(30, 2, 3), (30, 4, 4), oracle.positions([4, 4], [3, 3], [1, 1], [0, 0], [1, 1])),
    "conv2d-strided": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 8, 9),
        oracle.positions([8, 9], [3, 2], [2, 3], [1, 0], [1, 1]),
    ),
    "conv2d-dilated": (
        lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1)), (3, 8, 9), oracle.positions([8, 9], [3, 3], [1, 1], [0, 0], [2, 1])
    ),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, (3, 4), dilation=2, padding="same"), (3, 8, 9), 72),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 9), 72),
    "conv2d-groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5), 9),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5), 9),
    "conv2d-no-bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5), 9),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 4, 5),
        oracle.positions([3, 4, 5], [1, 2, 3], [1, 2, 1], [0, 0, 0], [1, 1, 1]),
    ),
}  # fmt: skip


EVERY_LAYER = pytest.mark.parametrize(("make", "shape", "positions"), LAYERS.values(), ids=LAYERS.keys())


def data(*shape: int, channel: int = 1, seed: int = 0) -> Tensor:
    """Draw channels of different mean and size, as far from normalized as activations are."""
    c = shape[channel]
    view = [c if i == channel % len(shape) else 1 for i in range(len(shape))]
    x = torch.randn(shape, dtype=torch.float64, generator=inputs.generator(seed))
    spread = torch.linspace(0.3, 3, c, dtype=torch.float64).view(view)
    return x * spread + torch.linspace(-2, 4, c, dtype=torch.float64).view(view)


def channels_second(x: Tensor, layer: nn.Module) -> Tensor:
    return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x


def channel_of(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def backward(model: nn.Module, *batches: Tensor) -> None:
    """Run backward from a loss that is not linear, and a mean over the samples."""
    for x in batches:
        model(x).sin().flatten(1).sum(1).mean().div(len(batches)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def single(layer: nn.Module, **options: Any) -> tuple[Any, BNP]:
    layer = layer.double()
    return layer, BNP(layer, **options)


def expected(layer: Any, running: oracle.Running, samples: int, positions: float) -> list[Tensor]:
    """Return the oracle's gradients from the ones that are there."""
    Gb = None if layer.bias is None else layer.bias.grad
    q2 = oracle.scale(layer.weight[0].numel(), samples, positions)
    new = oracle.precondition(layer.weight.grad, Gb, running.mean, running.var, q2, getattr(layer, "groups", 1))
    return [g for g in new if g is not None]


def state(bnp: BNP, name: str = "") -> tuple[Tensor, Tensor]:
    return bnp.state_dict()[name]["mean"], bnp.state_dict()[name]["variance"]


def assert_preconditioned(layer: Any, Gw: Tensor, Gb: Tensor, mean: Tensor, var: Tensor, q2: float) -> None:
    """Check gradients entry by entry against those from Gw and Gb, with these statistics."""
    want = oracle.precondition(Gw.double(), Gb.double(), mean.double(), var.double(), q2)
    bounds = precondition_floors(Gw, Gb, mean, var, q2, *want)
    for got, exact, bound in zip((layer.weight.grad, layer.bias.grad), want, bounds, strict=True):
        assert exact is not None and bound is not None
        assert ((got.double() - exact).abs() <= bound).all()


# Layers without gradient, without statistics, with neither.


def two_branches() -> tuple[nn.ModuleDict, BNP]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}).double()
    return model, BNP(model, rho=0.5)
