"""Options of POP-Norm, and the checks of its training and its evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.oracles import inputs, popnorm
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_within, largest
from tests.tolerances.pop_norm import pop_norm_floors

RANKS = {
    "NC": (nk.POPNorm1d, nn.BatchNorm1d, inputs.SHAPE_2D),
    "NCL": (nk.POPNorm1d, nn.BatchNorm1d, inputs.SHAPE_3D),
    "NCHW": (nk.POPNorm2d, nn.BatchNorm2d, inputs.SHAPE_4D),
    "NCDHW": (nk.POPNorm3d, nn.BatchNorm3d, inputs.SHAPE_5D),
}
EVERY_RANK = pytest.mark.parametrize("rank", RANKS)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)
MODES = {"both": {}, "center": {"scale": False}, "scale": {"center": False}}
OPTIONS = {
    **MODES,
    "kappa-and-eps": {"kappa": 7.0, "eps": 0.3},
    "bare": {"affine": False},
}
EVERY_MODE = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def with_affine(layer: Any) -> Any:
    """Set weights of both signs and shifts, far from 1 and 0."""
    with torch.no_grad():
        for parameter, ends in ((layer.weight, (-1.5, 2)), (layer.bias, (3, -1))):
            if parameter is not None:
                parameter.copy_(torch.linspace(*ends, layer.num_features))
    return layer


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in layer.named_buffers()}


def assert_unchanged(layer: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in layer.named_buffers():
        assert torch.equal(value, before[key]), key


def options_of(layer: Any) -> tuple[Any, ...]:
    return layer.kappa, layer.eps, layer.center, layer.scale


def values_and_gradients(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Return y and the gradients of x, weight and bias."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(dy)
    return [y.detach(), leaf.grad, *(None if p is None else p.grad.clone() for p in (layer.weight, layer.bias))]


def check(layer: Any, x: Tensor, path: Any, plain: Any, running: tuple[Tensor, Tensor] | None = None) -> None:
    """Check one call and its backward against ``path(x, weight, bias)`` in float64, beside ``plain`` in x's type."""
    dy = incoming_gradient(x)
    given = [x, *(None if p is None else p.detach() for p in (layer.weight, layer.bias))]
    results = []
    for function, up in ((path, True), (plain, False)):
        leaves = [None if t is None else t.to(torch.float64 if up else t.dtype, copy=True) for t in given]
        leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)])
    exact, other = results
    floors = pop_norm_floors(x, dy, *given[1:], *options_of(layer), exact, running)
    got = values_and_gradients(layer, x, dy)
    for key, a, b, c, floor in zip(("y", "dx", "dweight", "dbias"), got, exact, other, floors, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            assert_within(key, a, b, c, floor, largest(b))


def check_training(layer: Any, x: Tensor) -> None:
    options = options_of(layer)
    check(
        layer, x,
        lambda *given: popnorm.pop_norm(*given, *options)[0], lambda *given: popnorm.plain(*given, *options)[0],
    )  # fmt: skip


def check_evaluation(layer: Any, x: Tensor) -> None:
    running, options = (layer.running_mean, layer.running_var), options_of(layer)

    def path(x: Tensor, *parameters: Tensor | None) -> Tensor:
        return popnorm.evaluate(x, *(value.double() for value in running), *parameters, *options)

    def plain(x: Tensor, *parameters: Tensor | None) -> Tensor:
        up = (None if p is None else p.to(layer.running_mean.dtype) for p in parameters)
        return popnorm.evaluate(x.to(layer.running_mean.dtype), *running, *up, *options).to(x.dtype)

    check(layer, x, path, plain, running)
