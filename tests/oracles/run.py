"""Run one path (the package, the plain path or the oracle) and collect everything that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import iternorm, plain


@dataclass(frozen=True)
class Config:
    """The hyperparameters of iter_norm."""

    group_size: int = 8
    num_iterations: int = 5
    eps: float = 1e-5
    scaling: str = "trace"
    method: str = "newton"


@dataclass(frozen=True)
class Result:
    """Outputs and gradients of one path, as it returned them."""

    y: Tensor
    mean: Tensor
    w: Tensor
    dx: Tensor
    dweight: Tensor | None = None
    dbias: Tensor | None = None


device = torch.device("cpu")  # the tests of every backend compute here; the fixture ``backend`` sets it


def moved(t: Tensor) -> Tensor:
    """Return the same values, strides and alignment on ``device``."""
    if t.device == device:
        return t.detach()
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.detach().untyped_storage()).to(device)  # type: ignore[call-overload]
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def leaf(t: Tensor | None) -> Tensor | None:
    """Return the same values and strides as a leaf that asks for a gradient."""
    return None if t is None else moved(t).requires_grad_()


def back(t: Tensor | None) -> Tensor | None:
    """Return a result where the tests compare, on the CPU."""
    return None if t is None else t.detach().cpu()


IterNorm = Callable[..., tuple[Tensor, Tensor, Tensor]]


def run(path: IterNorm, config: Config, x: Tensor, dy: Tensor, weight: Tensor | None = None,
        bias: Tensor | None = None) -> Result:  # fmt: skip
    """Run forward, then backward from dy (in y's type)."""
    x, weight, bias, dy = leaf(x), leaf(weight), leaf(bias), moved(dy)
    y, mean, w = path(
        x, config.group_size, config.num_iterations, config.eps, weight=weight, bias=bias,
        scaling=config.scaling, method=config.method,
    )  # fmt: skip
    y.backward(dy if dy.dtype == y.dtype else dy.to(y.dtype))
    assert x is not None and x.grad is not None
    grads = (None if value is None else value.grad for value in (x, weight, bias))
    return Result(*map(back, (y, mean, w, *grads)))  # type: ignore[arg-type]


STABLE = {"newton": "eigenbasis", "eigh": "inverses"}


def oracle(config: Config, x: Tensor, dy: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
           *, stable: bool = False) -> Result:  # fmt: skip
    """Run the float64 oracle on exactly the values that the other paths get.

    stable: the spectrum has a dominant eigenvalue (eq. 17 loses digits) or equal ones (autograd through eigh divides
    by zero).
    """
    if stable:
        config = replace(config, method=STABLE[config.method])
    up = [None if t is None else t.detach().double() for t in (x, dy, weight, bias)]
    return run(iternorm.iter_norm, config, *up)  # type: ignore[arg-type]


def plain_path(config: Config, x: Tensor, dy: Tensor, weight: Tensor | None = None,
               bias: Tensor | None = None) -> Result:  # fmt: skip
    """Run the plain same-type PyTorch path."""
    return run(plain.iter_norm, config, x, dy, weight, bias)


def incoming_gradient(x: Tensor, seed: int = 1) -> Tensor:
    """Draw a random dL/dy of x's shape, type and layout."""
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(x).copy_(dy)
