"""fold: the same function without the norms, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normkernels as nk
from normkernels.convert import fold
from tests.convert.foldable import (
    CHANNELS,
    ITERNORM,
    LAYERS,
    NORMS,
    data,
    make,
    member,
    rank_of,
    same_state,
    state,
    trained,
)
from tests.tolerances import assert_agree
from tests.tolerances.folding import assert_folded, assert_folded_network


def check(layer: Any, norm: Any) -> Any:
    """Check the layer that fold puts in place of both, and return it.

    Its kind, type and function are the same, its weights are others.
    """
    net = nn.Sequential(layer, trained(norm).double()).eval()
    before = state(net)
    folded = fold(net)
    assert type(folded) is nn.Sequential and type(folded[0]) is type(layer) and type(folded[1]) is nn.Identity
    assert not any(module.training for module in folded.modules())
    assert_folded(folded, layer, net[1], data(layer))
    assert net[0] is layer and net[1] is norm and same_state(net, before)
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in net.parameters()}
    return folded[0]


# Layers and norms.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_type", LAYERS, ids=lambda t: t.__name__)
def test_every_pair(layer_type: Any, norm: str, bias: bool) -> None:
    folded = check(make(layer_type, bias=bias), NORMS[norm](rank_of(layer_type)).double())
    assert isinstance(folded.bias, nn.Parameter)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2}, {"stride": 2}, {"dilation": 2}, {"padding": 2}, {"bias": False, "groups": 2, "stride": 3},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same"}, {"padding": (2, 0), "kernel_size": (3, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions(options: dict[str, Any]) -> None:
    """Stride, dilation and padding come before W x and so change nothing; groups hold whole whitening groups."""
    check(make(nn.Conv2d, **options), ITERNORM(2).double())


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"stride": 2, "output_padding": 1}, {"dilation": 2, "padding": 1}, {"groups": 2, "stride": 2}],
    ids=str,
)
@pytest.mark.parametrize("layer_type", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions(layer_type: Any, options: dict[str, Any]) -> None:
    """The weights of transposed convolutions are (I, O / groups, *)."""
    check(make(layer_type, **options), ITERNORM(rank_of(layer_type)).double())


@pytest.mark.parametrize(("groups", "norm"), [(8, "BatchNorm"), (8, "POPNorm"), (4, "IterNorm-bare"), (2, "DBN")])
def test_groups_of_whole_whitening_groups(groups: int, norm: str) -> None:
    check(make(nn.Conv2d, 8, groups=groups), NORMS[norm](2).double())


def test_a_diagonal_whitening_matrix_may_be_misaligned() -> None:
    """A diagonal matrix mixes nothing; IterNorm has one with a BatchNorm's statistics."""
    norm = trained(ITERNORM(2).double())
    norm.running_whitening.copy_(torch.diag_embed(norm.running_whitening.diagonal(dim1=1, dim2=2)))
    net = nn.Sequential(make(nn.Conv2d, 8, groups=8), norm).eval()
    assert_folded(fold(net), net[0], norm, data(net[0]))


# A norm with no layer in front of it goes into the one behind it.


def check_in_front(norm: Any, layer: Any) -> Any:
    net = nn.Sequential(trained(norm).double(), layer).eval()
    before = state(net)
    folded = fold(net)
    assert type(folded[0]) is nn.Identity and type(folded[1]) is type(layer) and same_state(net, before)
    x = data(layer)
    assert_folded_network(folded(x), net(x), layers=1, terms=layer.weight[0].numel(), d=CHANNELS)
    return folded[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_type", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda t: t.__name__)
def test_in_front(layer_type: Any, norm: str, bias: bool) -> None:
    layer = make(layer_type, CHANNELS, outputs=6, bias=bias)
    assert check_in_front(NORMS[norm](rank_of(layer_type)), layer).weight.shape == layer.weight.shape


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"stride": 2, "dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"padding": "valid"}],
    ids=str,
)
def test_convolutions_in_front(options: dict[str, Any]) -> None:
    check_in_front(ITERNORM(2), make(nn.Conv2d, CHANNELS, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"groups": 4},
            "expected whitening groups that divide the 2 input channels in each .* 4 groups, got misaligned",
        ),
        ({"padding": 1}, "expected no zero padding"),
    ],
)
def test_refused_in_front(options: dict[str, Any], reason: str) -> None:
    norm = ITERNORM(2)
    net = nn.Sequential(trained(norm).double(), make(nn.Conv2d, CHANNELS, **options))
    with pytest.raises(ValueError, match=f"'0' .*got the input .* into the next layer, {reason}"):
        fold(net.eval())


def test_decorrelated_features_go_into_the_classifier() -> None:
    """The paper's DF goes into the classifier, so that nothing is left of it either."""
    net = nn.Sequential(
        make(nn.Conv2d, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(CHANNELS, 5),
    ).double()  # fmt: skip
    nk.convert.replace(net, "IterNorm", group_size=4, decorrelate_features=True)
    for module in net:
        for norm in (m for m in module.modules() if hasattr(m, "running_mean")):
            trained(norm)
    x, folded = torch.randn(3, 3, 7, 7, dtype=torch.float64), fold(net.eval())
    assert_folded_network(folded(x), net(x), layers=2, terms=27, d=4)
    assert not [m for m in folded.modules() if hasattr(m, "running_mean")]


def test_a_zero_gamma() -> None:
    norm = member("BatchNorm")(2).double()
    net = nn.Sequential(make(nn.Conv2d), trained(norm)).eval()
    norm.weight.data[3] = 0
    folded = fold(net)
    assert not folded[0].weight[3].any() and torch.equal(folded[0].bias[3], norm.bias[3])


@pytest.mark.parametrize("affine_conv", [nk.ConvNorm1d, nk.ConvNorm2d])
@pytest.mark.parametrize("norm", ["BatchNorm", "POPNorm", "SyncBatchNorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_norm(affine_conv: Any, norm: str, bias: bool) -> None:
    """ConvNorm's weight has no say in the scale; the kernels after the filter have, and are changed."""
    rank = rank_of(affine_conv)
    layer = make(affine_conv, stride=2, padding=1, bias=bias)
    layer.affine_weight.data.normal_()
    net = nn.Sequential(layer, trained(NORMS[norm](rank).double())).eval()
    folded, x = fold(net), data(layer)
    assert_agree(folded(x), net(x))
    assert type(folded[0]) is affine_conv and torch.equal(folded[0].weight, layer.weight)


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["BatchNorm", "IterNorm", "POPNorm"])
@pytest.mark.parametrize("layer_type", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d], ids=lambda t: t.__name__)
def test_rounded_once(layer_type: Any, norm: str, dtype: torch.dtype) -> None:
    """The weights are those of the same fold in float64, rounded once, also with two norms behind one layer."""
    rank = rank_of(layer_type)
    norms = [trained(NORMS[norm](rank)), trained(ITERNORM(rank))]
    net = nn.Sequential(make(layer_type, dtype=dtype), *norms).eval()
    folded, exact = fold(net), fold(copy.deepcopy(net).double())
    for name in ("weight", "bias"):
        value = getattr(folded[0], name)
        assert value.dtype == dtype and torch.equal(value, getattr(exact[0], name).to(dtype))
    assert [type(module) for module in folded[1:]] == [nn.Identity, nn.Identity]


def test_half_types_run() -> None:
    """Half types give the same function, up to the type's rounding of weights, sums and outputs."""
    net = nn.Sequential(make(nn.Conv2d, dtype=torch.bfloat16), trained(ITERNORM(2).to(torch.bfloat16))).eval()
    x = data(net[0], torch.bfloat16)
    assert fold(net)(x).dtype == net(x).dtype == torch.bfloat16
    exact = copy.deepcopy(net).double()
    assert_folded(fold(net).double(), exact[0], exact[1], x.double(), weights=torch.bfloat16)


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False), (False, None)])
def test_requires_grad(weight: bool, bias: bool | None) -> None:
    net = nn.Sequential(make(nn.Conv2d, bias=bias is not None), trained(ITERNORM(2).double())).eval()
    net[0].weight.requires_grad_(weight)
    if bias is not None:
        net[0].bias.requires_grad_(bias)
    folded = fold(net)[0]
    assert folded.weight.requires_grad is weight
    assert folded.bias.requires_grad is (weight if bias is None else bias)
    assert folded.weight.is_leaf and folded.bias.is_leaf


def test_memory_format_is_kept() -> None:
    net = nn.Sequential(make(nn.Conv2d), trained(ITERNORM(2).double())).eval()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fold(net)[0].weight.is_contiguous(memory_format=torch.channels_last)
