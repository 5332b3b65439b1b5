"""A small network, its batches, and a training loop for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.optim import BNP
from tests.oracles import inputs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).double()


def batch(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    g = inputs.generator(seed)
    x = torch.randn(samples, 3, 6, 6, dtype=torch.float64, generator=g) * 2 + 1
    return x, torch.randint(4, (samples,), generator=g)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x, target = batch(seed)
    return F.cross_entropy(model(x), target)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], object] | None, steps: range
) -> None:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        if before is not None:
            before()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def values(model: nn.Module, bnp: BNP | None = None) -> list[Tensor]:
    statistics = [] if bnp is None else [v for s in bnp.state_dict().values() for v in (s["mean"], s["variance"])]
    return [*(p.detach().clone() for p in model.parameters()), *statistics]


def assert_identical(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
