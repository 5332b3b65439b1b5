"""How public functions call their ops, and parts of gradients that the fused training ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_reverse_mode
from normkernels.dispatch import export
from normkernels.dispatch.record import Op


def call(op: Op, *arguments: Any) -> Any:
    """Call an op with its gradient or, in an export to ONNX, what its record has for that.

    Dynamo cannot trace a Function where nothing needs a gradient: there the raw op is called. Outside Dynamo the
    Function must stay, because it refuses forward-mode differentiation.
    """
    check_reverse_mode()  # once more: Dynamo may compile this function alone
    if op.onnx is not None and export.exporting():
        return op.onnx(*arguments)
    differentiated = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if op.autograd is None or (torch.compiler.is_compiling() and not differentiated):
        return op.raw(*arguments)
    return op.autograd.apply(*arguments)


def gradients(
    path: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias, through the primitives of ``path``, for double backward."""
    # They go to aliases, so that a graph which connects x, weight and bias with each other is not walked here, too.
    x = x.view_as(x)
    weight = None if weight is None else weight.view_as(weight)
    bias = None if bias is None else bias.view_as(bias)
    inputs = [value for value in (x, weight, bias) if value is not None and value.requires_grad]
    found = iter(torch.autograd.grad(path(x, weight, bias), inputs, grad, create_graph=True))
    return [next(found) if value is not None and value.requires_grad else None for value in (x, weight, bias)]


def in_types(values: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of weight and bias in the parameters' types, None where there is no parameter."""
    return [None if p is None else value.to(p.dtype) for value, p in zip(values, parameters, strict=True)]
