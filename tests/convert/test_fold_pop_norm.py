"""fold_pop_norm: one layer for two, exact wherever it does not refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import normkernels as nk
from normkernels.convert import fold_pop_norm
from tests.tolerances import assert_agree

POP_NORMS = {nn.Linear: nk.POPNorm1d, nn.Conv1d: nk.POPNorm1d, nn.Conv2d: nk.POPNorm2d, nn.Conv3d: nk.POPNorm3d}
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


def trained(layer_type: type, channels: int = 8, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Return a norm in evaluation whose statistics and parameters differ from channel to channel."""
    norm = POP_NORMS[layer_type](channels, dtype=dtype, **options).eval()
    for value, ends in (
        (norm.weight, (-1.5, 2)), (norm.bias, (3, -1)), (norm.running_mean, (-1, 4)), (norm.running_var, (0.2, 9)),
    ):  # fmt: skip
        if value is not None:
            value.data.copy_(torch.linspace(*ends, channels))
    return norm


def data(layer_type: type, channels: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    sizes = () if layer_type is nn.Linear else (7, 6, 5)[: int(layer_type.__name__[-2])]
    return torch.randn(3, channels, *sizes, dtype=dtype)


def check(norm: Any, layer: Any, x: Tensor) -> Any:
    """Check the function of the folded layer, its kind, and that both originals are as they were; return it."""
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in (norm, layer)]
    folded = fold_pop_norm(norm, layer)
    assert type(folded) is type(layer) and folded.training is layer.training
    assert folded.weight.dtype == layer.weight.dtype and isinstance(folded.weight, nn.Parameter)
    assert_agree(folded(x), layer(norm(x)))
    for module, state in zip((norm, layer), before, strict=True):
        assert list(state) == list(module.state_dict())
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in layer.parameters()}
    return folded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kappa": 1.0, "eps": 0.5}, {"scale": False}, {"affine": False}],
    ids=["both", "options", "center", "bare"],
)  # fmt: skip
@pytest.mark.parametrize("layer_type", POP_NORMS, ids=lambda t: t.__name__)
def test_every_layer(layer_type: Any, options: dict[str, Any], bias: bool) -> None:
    """The folded layer has a bias, for the constant that the norm adds."""
    layer = layer_type(8, 6, *(() if layer_type is nn.Linear else (3,)), bias=bias, dtype=torch.float64)
    folded = check(trained(layer_type, **options), layer, data(layer_type))
    assert isinstance(folded.bias, nn.Parameter)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"groups": 8}, {"groups": 4, "stride": 3, "kernel_size": 2}],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
@pytest.mark.parametrize("layer_type", CONVOLUTIONS, ids=lambda t: t.__name__)
def test_every_convolution(layer_type: Any, options: dict[str, Any]) -> None:
    """An output channel has constants of its own group's input channels only."""
    layer = layer_type(8, 16, **{"kernel_size": 2, "dtype": torch.float64} | options)
    check(trained(layer_type), layer, data(layer_type))


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("layer_type", CONVOLUTIONS, ids=lambda t: t.__name__)
def test_padding_with_values_of_the_image(layer_type: Any, mode: str, padding: Any) -> None:
    """Such values are normalized as the image is."""
    layer = layer_type(8, 4, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
    check(trained(layer_type), layer, data(layer_type))


PADDED = {
    "one": {"padding": 1},
    "one-axis": {"padding": (0, 1)},
    "same": {"padding": "same"},
    "1x1": {"padding": 1, "kernel_size": 1},
}


@pytest.mark.parametrize("padded", PADDED.values(), ids=PADDED.keys())
def test_zero_padding(padded: dict[str, Any]) -> None:
    """Zeros stay zeros only where nothing is added.

    So zero padding is refused, but not without centering, and not where the shift cancels out.
    """
    layer = nn.Conv2d(8, 4, **{"kernel_size": 3, "dtype": torch.float64} | padded)
    x = data(nn.Conv2d)
    with pytest.raises(ValueError, match=r"layer: expected no zero padding.*padding"):
        fold_pop_norm(trained(nn.Conv2d), layer)
    check(trained(nn.Conv2d, center=False), layer, x)
    norm = trained(nn.Conv2d)
    norm.running_mean.copy_(norm.bias)
    check(norm, layer, x)


@pytest.mark.parametrize("unpadded", [{"padding": "valid"}, {"padding": "same", "kernel_size": 1}, {"padding": (0, 0)}])
def test_no_padding_by_other_names(unpadded: dict[str, Any]) -> None:
    layer = nn.Conv2d(8, 4, **{"kernel_size": 3, "dtype": torch.float64} | unpadded)
    check(trained(nn.Conv2d), layer, data(nn.Conv2d))


@pytest.mark.parametrize("layer_type", POP_NORMS, ids=lambda t: t.__name__)
def test_without_centering_no_bias_comes(layer_type: Any) -> None:
    layer = layer_type(8, 6, *(() if layer_type is nn.Linear else (3,)), bias=False, dtype=torch.float64)
    folded = check(trained(layer_type, center=False), layer, data(layer_type))
    assert folded.bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rounded_once(dtype: torch.dtype) -> None:
    """The weights are those of the same fold in float64, rounded to the layer's type."""
    norm, layer = trained(nn.Conv2d, dtype=dtype), nn.Conv2d(8, 4, 3, dtype=dtype)
    folded = fold_pop_norm(norm, layer)
    exact = fold_pop_norm(copy.deepcopy(norm).double(), copy.deepcopy(layer).double())
    assert torch.equal(folded.weight, exact.weight.to(dtype)) and torch.equal(folded.bias, exact.bias.to(dtype))
    if dtype == torch.float32:
        check(norm, layer, data(nn.Conv2d, dtype=dtype))


def test_a_frozen_layer_stays_frozen() -> None:
    folded = fold_pop_norm(trained(nn.Linear), nn.Linear(8, 3, bias=False).double().requires_grad_(False))
    assert not folded.weight.requires_grad and not folded.bias.requires_grad


def test_the_copy_trains_by_itself() -> None:
    norm, layer = trained(nn.Linear), nn.Linear(8, 3, bias=False, dtype=torch.float64)
    folded = fold_pop_norm(norm, layer)
    folded(data(nn.Linear)).square().sum().backward()
    assert folded.weight.grad is not None and folded.bias.grad is not None
    assert layer.weight.grad is None and norm.weight.grad is None


# Refusals.


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=2)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def norm1d(**options: Any) -> nn.Module:
    return nk.POPNorm1d(8, **options).eval()


def norm2d() -> nn.Module:
    return nk.POPNorm2d(8).eval()


WEIGHT_NORM = parametrizations.weight_norm(nn.Linear(8, 4))
WRONG: dict[str, tuple[Any, Any, type[Exception], str, str]] = {
    "batchnorm": (nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 4, 3), TypeError, "POPNorm1d", "BatchNorm2d"),
    "transposed": (norm2d(), nn.ConvTranspose2d(8, 4, 3), TypeError, "Conv2d", "ConvTranspose2d"),
    "conv-norm": (norm2d(), nk.ConvNorm2d(8, 4, 3), TypeError, "Conv2d", "ConvNorm2d"),
    "subclass": (norm2d(), Halved(8, 4, 3), TypeError, "Conv2d", "Halved"),
    "another-rank": (norm2d(), nn.Conv3d(8, 4, 3), TypeError, "Conv2d", "Conv3d"),
    "linear-on-images": (norm2d(), nn.Linear(8, 4), TypeError, "Conv2d", "Linear"),
    "no-layer": (norm1d(), nn.Identity(), TypeError, "Linear or Conv1d", "Identity"),
    "weight-norm": (norm1d(), WEIGHT_NORM, TypeError, "Linear", "ParametrizedLinear"),
    "pruned": (norm1d(), pruned(nn.Linear(8, 4)), TypeError, "to be parameters", "computed"),
    "training": (nk.POPNorm1d(8), nn.Linear(8, 4), ValueError, "evaluation mode", "the batch's"),
    "no-statistics": (norm1d(track_running_stats=False), nn.Linear(8, 4), ValueError, "running", "the batch's"),
    "channels": (norm1d(), nn.Linear(7, 4), ValueError, "8 input channels", "7"),
    "conv-channels": (norm2d(), nn.Conv2d(4, 8, 3), ValueError, "8 input channels", "4"),
}


@pytest.mark.parametrize("what", WRONG)
def test_refusals(what: str) -> None:
    norm, layer, error, expected, got = WRONG[what]
    with pytest.raises(error) as raised:
        fold_pop_norm(norm, layer)
    assert expected in str(raised.value) and got in str(raised.value)
