"""Parts for the tests of ConvNorm: layers with random parameters, and the comparison with the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.oracles import convnorm, inputs
from tests.oracles.convnorm import Config
from tests.tolerances import assert_within, largest
from tests.tolerances.spectral import assert_conv_norm, conv_norm_floors

LAYERS: dict[int, Any] = {1: nk.ConvNorm1d, 2: nk.ConvNorm2d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
AXES = pytest.mark.parametrize("axes", [1, 2], ids=["1d", "2d"])
DETACH = pytest.mark.parametrize("detach", [True, False], ids=["detached", "full-gradient"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)
PADDING_MODES = ["reflect", "replicate", "circular"]
NAMES = ("weight", "bias", "affine_weight")
PLAIN = Config()


def plane(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw x (N, C_I, *n) with a mean, so that borders and frequency 0 matter."""
    return (torch.randn(shape, dtype=torch.float64, generator=inputs.generator(0)) + 1).to(dtype)


def options(config: Config) -> dict[str, Any]:
    """Return a Config as the layer's own arguments."""
    return dict(config.__dict__)


def randomized(layer: Any) -> Any:
    """Draw parameters that are not the initial ones: no two taps of the affine kernel alike, a bias of both signs."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            values = torch.randn(p.shape, dtype=torch.float64, generator=inputs.generator(len(name)))
            p.copy_(values + (1 if name == "weight" else 0))
    return layer


def build(
    c_in: int, c_out: int, kernel: int | tuple[int, ...], config: Config = PLAIN, *, axes: int = 2,
    dtype: torch.dtype = torch.float32, bias: bool = True, affine: bool = True,
) -> Any:  # fmt: skip
    layer = LAYERS[axes](c_in, c_out, kernel, bias=bias, affine=affine, dtype=dtype, **options(config))
    return randomized(layer)


def parameters(layer: nn.Module) -> Any:
    return [None if (p := getattr(layer, name)) is None else p.detach() for name in NAMES]


def reference(x: Tensor, given: Any, config: Config, dy: Tensor) -> list[Any]:
    """Return y and gradients of the oracle for these values and this type."""
    leaves: list[Any] = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *given)]
    y = convnorm.conv_norm(leaves[0], config, *leaves[1:])
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in leaves)]


def result(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Any]:
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(None if getattr(layer, n) is None else getattr(layer, n).grad for n in NAMES)]


def check(layer: Any, x: Tensor, config: Config) -> None:
    """Check y and every gradient by the rule of tests/tolerances; config: what the layer was asked for."""
    given = parameters(layer)
    exact: Any = [None if t is None else t.double() for t in given]
    shape = convnorm.conv_norm(x.double(), config, *exact).shape
    dy = torch.randn(shape, dtype=torch.float64, generator=inputs.generator(1)).to(x.dtype)
    oracle = reference(x.double(), exact, config, dy.double())
    plain = reference(x, given, config, dy)
    got = result(layer, x, dy)
    assert got[0].dtype == x.dtype
    floors = conv_norm_floors(x, given, config, dy, oracle[0], oracle[1:])
    assert_conv_norm(got, oracle, plain, floors)


def agree(a: Tensor, b: Tensor, layer: Any, x: Tensor, config: Config, count: float = 1) -> None:
    """Check that two of the layer's own ways give the same y, within count times twice the floor of y."""
    given = parameters(layer)
    exact: Any = [None if t is None else t.double() for t in given]
    y = convnorm.conv_norm(x.double(), config, *exact)
    floors = conv_norm_floors(x, given, config, torch.ones_like(y), y)
    assert_within("y", a.detach(), b.detach().double(), None, 2 * count * floors.y, largest(y))


def edit_data(layer: Any) -> None:
    layer.weight.data.copy_(torch.randn_like(layer.weight))


def edit_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[:, 1].mul_(-3).add_(1)
