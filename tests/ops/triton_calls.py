"""Inputs, a training step and a record of launches for tests of the Triton kernels."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.triton import launch
from tests.oracles import inputs
from tests.oracles.run import incoming_gradient

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return inputs.gaussian(shape, dtype=dtype, **options).to(DEVICE)


def step(x: Tensor, group_size: int = 8, **options: Any) -> list[Tensor]:
    """Return y, mean, W and all gradients of one training step with gamma and beta."""
    parameters = [torch.linspace(-1, 2, x.shape[1], device=x.device).to(x.dtype) for _ in range(2)]
    leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
    y, mean, W = nk.ops.iter_norm(leaves[0], group_size, weight=leaves[1], bias=leaves[2], **options)
    return [y.detach(), mean, W, *torch.autograd.grad(y, leaves, incoming_gradient(y.detach().cpu()).to(x.device))]


class Launches(list[tuple[str, dict[str, Any]]]):
    """The kernels that were launched, and with what."""

    def names(self) -> list[str]:
        return [name for name, _ in self]


# Modules that launch kernels on activations, small matrices and gradients.
LAUNCHERS = (
    *(
        f"normkernels.primitives.{name}.triton"
        for name in ("moments", "inverse_sqrt", "whiten", "iter_norm", "pop_norm", "precondition")
    ),
    "normkernels.triton.diagonal",
)


def note_launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Note every launch, and make it."""
    noted = Launches()
    for module in LAUNCHERS:

        def noting(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
            noted.append((kernel.fn.__name__, {**options, "grid": grid, "arguments": arguments}))
            launch.launch(kernel, grid, *arguments, **options)

        monkeypatch.setattr(importlib.import_module(module), "launch", noting)
    return noted
