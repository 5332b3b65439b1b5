"""A small network with each layer, beside the same with BatchNorm, and what a training loop does with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk


class Network(nn.Module):
    """Layers, ReLU and a convolution. Not nn.Sequential, of whose code Dynamo compiles nothing by itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.layers(x)))
        return y


def conv() -> nn.Module:
    return nn.Conv2d(3, 8, 3, bias=False)  # a bias before a normalization has no gradient but rounding


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "IterNorm2d": lambda: Network(conv(), nk.IterNorm2d(8, 4)),
    "DBN2d": lambda: Network(conv(), nk.DBN2d(8, 4)),
    "POPNorm2d": lambda: Network(nk.POPNorm2d(3), conv()),
    "ConvNorm2d": lambda: Network(nk.ConvNorm2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)),
    "BatchNorm2d": lambda: Network(conv(), nn.BatchNorm2d(8)),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def batch(seed: int = 0, samples: int = 6) -> Tensor:
    return torch.randn(samples, 3, 6, 5, generator=torch.Generator().manual_seed(seed)) + 1


def loss_of(y: Tensor) -> Tensor:
    """Return a loss that is not symmetric in the entries, or a normalization would make its gradient vanish."""
    return (y * torch.linspace(-1, 2, y[0].numel(), device=y.device).view(y.shape[1:])).square().mean()


def step(net: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Return values and gradients of one step; call is what computes the network, such as a compiled one."""
    leaf = x.clone().requires_grad_()
    y = (net if call is None else call)(leaf)
    return [y.detach(), *torch.autograd.grad(loss_of(y), [leaf, *net.parameters()])]


def memory(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.buffers()]


def counters(net: nn.Module) -> list[int]:
    return [int(value) for name, value in net.named_buffers() if name.endswith("num_batches_tracked")]


def norm_of(net: nn.Module) -> Any:
    """Return the layer with running statistics."""
    return next(module for module in net.modules() if hasattr(module, "running_mean"))
