"""Arguments of the ops, and calls of the CUDA kernels with them, on a GPU or simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import record
from tests import backends
from tests.ops import test_iter_norm
from tests.ops.test_precondition import Layer
from tests.ops.test_spectral_kernels import values
from tests.oracles import inputs
from tests.oracles.run import incoming_gradient, leaf, moved

ANYWHERE = backends.only(*backends.CUDA)
SIMT = backends.only("simt")

SERVED = ("moments", "cross_moments", "inverse_sqrt", "inverse_sqrt_backward", "whiten", "stacked_mix", "iter_norm",
          "iter_norm_backward", "spectral_filter", "pop_norm", "pop_norm_backward", "precondition")  # fmt: skip
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def raw(op: str) -> Callable[..., Any]:
    """Return the op as the dispatcher has it, without the checks of the public function."""
    return getattr(torch.ops.normkernels, op).default


def given(op: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return good arguments: two groups of four channels, filtered planes of 5 x 3, or two layers."""
    if op == "precondition":
        return layers_given(dtype)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, group_size=4)
    found = next(iter(record.OPS[op].samples(x, 4)))
    return [moved(value) if isinstance(value, Tensor) else value for value in found]


def layers_given(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return the arguments of a convolution of two groups and of a linear layer without a bias."""
    layers = [
        Layer((6, 4, 3, 2), 2, True, dtype),
        Layer((3, 5), 1, False, dtype, 1),
    ]
    biases = [torch.empty(0, dtype=dtype) if layer.Gb is None else layer.Gb for layer in layers]
    tensors = [layer.Gw for layer in layers], biases, [layer.mean for layer in layers], [layer.var for layer in layers]
    return [*([moved(t.clone()) for t in each] for each in tensors), [2, 1], [1.0, 2.5], 1e-2, 1e-4]


def step(x: Tensor, d: int, **options: Any) -> list[Tensor]:
    """Return y, mean, W and all gradients of a training step, where it was computed."""
    leaves = [leaf(t) for t in (x, *test_iter_norm.affine(x.shape[1], x.dtype))]
    y, mean, W = nk.ops.iter_norm(leaves[0], d, weight=leaves[1], bias=leaves[2], **options)  # type: ignore[arg-type]
    return [y.detach(), mean, W, *torch.autograd.grad(y, leaves, incoming_gradient(y.detach()))]  # type: ignore[arg-type]


def filtered(shape: tuple[int, ...]) -> list[Tensor]:
    z = leaf(values(shape))
    y = nk.ops.spectral_filter(z, moved(values(shape[1:], seed=1)))  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, z, incoming_gradient(y.detach()))]  # type: ignore[arg-type]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The simulated device has three processors, so a single group is cut into six parts that are merged three by three, and
# two groups into three parts, merged two and one; three have two parts each, and one level. A tile of the reduction
# has 128 columns up to d = 32, then 64 and 32; backward half of them up to 64. One column more than five tiles makes a
# last part of one column.
WIDTHS = {16: 641, 20: 641, 33: 321, 64: 321, 100: 161, 128: 161}


def many_columns(d: int, groups: int, dtype: torch.dtype, **options: Any) -> Tensor:
    return inputs.gaussian((WIDTHS[d], d * groups), dtype=dtype, group_size=d, **options)


def on_device(x: Tensor, d: int) -> list[Tensor]:
    """Return y, mean, W and dx, of x as it is."""
    x = x.detach().requires_grad_()
    y, mean, W = nk.ops.iter_norm(x, d)
    return [y.detach(), mean, W, *torch.autograd.grad(y, x, incoming_gradient(y.detach()))]
