"""Parts that the fused training ops, iter_norm and pop_norm, share: how they are called and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels.dispatch import export


def call(function: type[torch.autograd.Function], op: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` with the arguments of ``op``.

    Dynamo cannot trace a Function where nothing needs a gradient: there the op is called. Outside Dynamo the Function
    must stay, because it refuses forward-mode differentiation.
    """
    export.check_running_statistics()
    differentiated = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return (op if torch.compiler.is_compiling() and not differentiated else function.apply)(*arguments)


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
