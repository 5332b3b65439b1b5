"""torch.vmap over every op gives what a loop over the models gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import normkernels as nk
from normkernels.dispatch.record import OPS
from tests.ops import test_library
from tests.ops.test_library import FUNCTIONS, data
from tests.tolerances import assert_agree

MODELS = 3


def samples(op: str) -> list[tuple[Any, ...]]:
    """Return arguments for each model, of different data."""
    found = []
    for i in range(MODELS):
        x = (data("NCHW", torch.float64) * (i + 1)).roll(i, 0).cos()
        given = test_library.samples(op, x)[0]
        found.append(tuple(a + 0.1 * i if isinstance(a, Tensor) and a.dim() == 1 else a for a in given))
    return found


def tuple_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_every_op_has_a_rule() -> None:
    """Only the op that changes its arguments has none."""
    assert {name for name, op in OPS.items() if op.channels is None} == {"precondition"}


@pytest.mark.parametrize("mapped", ["all", "first", "others", "last-dim"])
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.channels])
def test_ops(op: str, mapped: str) -> None:
    call, given = getattr(torch.ops.normkernels, op), samples(op)
    tensors = [i for i, a in enumerate(given[0]) if isinstance(a, Tensor)]
    chosen = {"first": tensors[:1], "others": tensors[1:] or tensors}.get(mapped, tensors)
    at = -1 if mapped == "last-dim" else 0
    stacked = [torch.stack([each[i] for each in given], at) if i in chosen else a for i, a in enumerate(given[0])]
    in_dims = tuple(at if i in chosen else None for i in range(len(stacked)))
    got = tuple_of(vmap(call, in_dims)(*stacked))
    expected = [tuple_of(call(*(each[i] if i in chosen else a for i, a in enumerate(given[0])))) for each in given]
    assert_agree(got, [torch.stack(values) for values in zip(*expected, strict=True)])


# The bare one is whitened, so its gradient in the scale of x is nothing but rounding.
@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "iter_norm-bare"])
def test_gradients(function: str) -> None:
    """They are right for each model (vmap of grad) and through all (grad of vmap), in data and parameters."""
    shift = torch.arange(MODELS)
    x = torch.stack([data("NCHW", torch.float32) + i for i in range(MODELS)])
    w, b = (torch.linspace(low, 3, 8) + 0.1 * shift[:, None] for low in (-1, 1))

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        values = tuple_of(FUNCTIONS[function](x, w, b))
        return sum((v.float() * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum() for v in values)  # type: ignore

    expected = []
    for each in zip(x, w, b, strict=True):
        leaves = [t.clone().requires_grad_() for t in each]
        found = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
        expected.append([torch.zeros_like(t) if g is None else g for t, g in zip(each, found, strict=True)])
    together = [torch.stack(values) for values in zip(*expected, strict=True)]
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    found = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves, allow_unused=True)
    assert_agree([torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)], together)

    transforms = [vmap(grad(loss, (0, 1, 2))), grad(lambda *leaves: vmap(loss)(*leaves).sum(), (0, 1, 2))]
    for transform in transforms:
        if "eigh" in function:  # torch.func.grad asks for a graph of the gradient
            with pytest.raises(NotImplementedError, match="expected a first derivative for method='eigh'"):
                transform(x, w, b)
        else:
            assert_agree(transform(x, w, b), together)


def test_twice() -> None:
    """Models may be models of models."""
    x = torch.randn(2, 3, 6, 8, 4)
    got = vmap(vmap(lambda x: nk.ops.iter_norm(x, 4)[0]))(x)
    assert_agree(got, torch.stack([torch.stack([nk.ops.iter_norm(x, 4)[0] for x in row]) for row in x]))
