"""The sphere that normalization puts vectors on, and what follows for weights.

Sun et al., 2020: "New Interpretations of Normalization Methods in Deep Learning".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from normkernels._checks import check_integer, statistics_dtype
from normkernels.analysis._checks import check_floating, check_loss, check_module
from normkernels.eager.devices import in_float64


class Decomposition(NamedTuple):
    """The parts of v = gamma N(v) + beta e."""

    gamma: Tensor
    beta: Tensor
    direction: Tensor  # N(v)


def decompose(v: Tensor, dim: int = -1) -> Decomposition:
    r"""Return a vector's length, mean and direction (Lemma 1, eq. 1 to 4).

    .. math:: v = \gamma N(v) + \beta e_n, \quad \beta = \frac{1}{n} e_n^\top v, \quad
        \gamma = \frac{1}{\sqrt n} \lVert v - \bar v \rVert_2, \quad
        \lVert N(v) \rVert_2 = \sqrt n, \quad N(v) \perp e_n

    so that :math:`\lVert v \rVert_2^2 = n (\gamma^2 + \beta^2)`.

    Args:
        v: any shape and floating-point type; half types are computed in float32.
        dim: the vectors' dimension, of n >= 1 entries.

    Returns:
        Decomposition(gamma, beta, direction): gamma and beta in v's shape without ``dim``, direction in v's shape, all
        in v's type, differentiable. A constant vector, which has no direction, has gamma 0 and direction 0.

    Raises:
        TypeError: v is no floating-point tensor, or dim no int.
        ValueError: v has no dimensions, none that is ``dim``, or no entries along it.
    """
    check_floating("v", v)
    if v.dim() and check_integer("dim", dim, minimum=-v.dim()) >= v.dim():
        raise ValueError(f"dim: expected less than v's {v.dim()} dimensions, got {dim}")
    if v.dim() == 0 or v.shape[dim] == 0:
        raise ValueError(f"v: expected at least one entry along dimension {dim}, got shape {tuple(v.shape)}")
    x = v.to(statistics_dtype(v.dtype))
    # The first entry is subtracted: constant vectors become zero exactly, and a large mean costs no digits.
    first = x.narrow(dim, 0, 1)
    x = x - first
    mean = x.mean(dim, keepdim=True)
    x = x - mean
    scale = _magnitude(x, dim)
    gamma = torch.linalg.vector_norm(x / scale, dim=dim, keepdim=True) * (scale / v.shape[dim] ** 0.5)
    direction = x / torch.where(gamma > 0, gamma, 1.0)
    return Decomposition(gamma.squeeze(dim).to(v.dtype), (first + mean).squeeze(dim).to(v.dtype), direction.to(v.dtype))


@overload
def scale_invariance_gap(
    model: nn.Module, loss: Tensor | Callable[[], Tensor], *, per_row: Literal[False] = False
) -> dict[str, float]: ...


@overload
def scale_invariance_gap(
    model: nn.Module, loss: Tensor | Callable[[], Tensor], *, per_row: Literal[True]
) -> dict[str, Tensor]: ...


def scale_invariance_gap(
    model: nn.Module, loss: Tensor | Callable[[], Tensor], *, per_row: bool = False
) -> dict[str, float] | dict[str, Tensor]:
    r"""Return how far the loss is from not depending on the length of each parameter (Lemmas 2 and 3).

    .. math:: \frac{\lvert w^\top \nabla_w L \rvert}{\lVert w \rVert_2 \lVert \nabla_w L \rVert_2}

    It is the cosine of the angle between a parameter and its gradient, without its sign: 0, up to rounding, where
    :math:`L(\lambda w) = L(w)`, as for weights before batch normalization; such weights can only grow under gradient
    descent (Lemma 3). An eps beside the variance leaves a gap of the size of eps / sigma^2.

    Args:
        model: its parameters w are taken by name; shared ones once, frozen ones not.
        loss: L, a scalar with its graph, which is kept for a backward pass, or a function () -> scalar.
        per_row: for every row w_i of a parameter, the weights of one output, instead of for the whole.

    Returns:
        {name: the number}, or with ``per_row`` {name: (rows,)} in float64, for parameters with at least two dimensions;
        on the CPU where the parameter's device has no float64.
        Parameters that the loss does not depend on are left out. 0 where w or its gradient is zero. Where a gradient
        is zero but for rounding, as that of a bias before batch normalization, the number says nothing. ``.grad`` of
        the parameters stays as it is.

    Raises:
        TypeError: model is no module, or loss is neither a tensor nor a function that returns one.
        ValueError: loss is no scalar, or no parameter requires a gradient.
    """
    check_module("model", model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: expected parameters that require gradients, got none")
    keep = isinstance(loss, Tensor)
    if not isinstance(loss, Tensor):
        if not callable(loss):
            raise TypeError(f"loss: expected a tensor or a function, got {type(loss).__name__}")
        with torch.enable_grad():
            loss = loss()
    check_loss("loss", loss)
    gradients = torch.autograd.grad(loss, [*parameters.values()], retain_graph=keep, allow_unused=True)
    pairs = {
        name: (in_float64(w.detach()), in_float64(gradient))
        for (name, w), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None and gradient.numel()
    }
    if per_row:
        return {name: _cosine(w.flatten(1), g.flatten(1)) for name, (w, g) in pairs.items() if w.dim() > 1}
    return {name: _cosine(w.flatten(), g.flatten()).item() for name, (w, g) in pairs.items()}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return |a . b| / (|a| |b|) along the last dimension, 0 for 0 / 0."""
    a, b = a / _magnitude(a, -1), b / _magnitude(b, -1)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1).abs() / torch.where(norms > 0, norms, 1.0)


def _magnitude(t: Tensor, dim: int) -> Tensor:
    """Return the largest absolute value, 1 where that is 0. Squares of values that it divides do not overflow."""
    largest = t.detach().abs().amax(dim, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)
