"""norm_layer: what timm's and torchvision's networks take as their norm_layer, called as they call it."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import norm_layer


def get_norm_layer(layer: Any) -> Callable[..., nn.Module]:
    """Take a class, function or partial apart to its keywords alone, as timm does."""
    assert isinstance(layer, type | types.FunctionType | functools.partial)
    if isinstance(layer, functools.partial):
        return functools.partial(layer.func, **layer.keywords) if layer.keywords else layer.func
    return layer


class ResNet(nn.Module):
    """A network in timm's convention with device and dtype, in torchvision's without."""

    def __init__(self, norm_layer: Callable[..., nn.Module], channels: int = 8, **factory: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, bias=False, **factory), norm_layer(channels, **factory)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **factory)
        self.bn2 = norm_layer(channels, **factory)
        nn.init.zeros_(self.bn2.weight)  # zero_init_last

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(x))).mean((2, 3))


@pytest.mark.parametrize(
    "norm", ["IterNorm", nk.IterNorm2d, nk.IterNorm1d, "DBN", "POPNorm", "SyncIterNorm", "BatchNorm"]
)
def test_networks(norm: Any) -> None:
    for made in (norm_layer(norm), norm_layer(norm, eps=0.25)):
        for net in (
            ResNet(made),
            ResNet(get_norm_layer(made), device="cpu", dtype=torch.float64),
            ResNet(functools.partial(made, momentum=0.5)),
        ):
            expected = {
                "SyncIterNorm": nk.SyncIterNorm,
                "DBN": nk.DBN2d,
                "POPNorm": nk.POPNorm2d,
                "BatchNorm": nn.BatchNorm2d,
            }
            assert type(net.bn1) is expected.get(norm, nk.IterNorm2d)
            assert net.bn1.weight.dtype == net.conv1.weight.dtype
            if "eps" in made.keywords:
                assert net.bn2.eps == 0.25
            x = torch.randn(4, 3, 6, 6, dtype=net.conv1.weight.dtype)
            assert net.eval()(x).shape == (4, 8)


def test_keywords_override_options() -> None:
    made = norm_layer("IterNorm", 2, 4, eps=0.25, num_iterations=3)
    layer: Any = made(8, eps=0.5, affine=False, momentum=None)
    assert (layer.eps, layer.num_iterations, layer.weight, layer.momentum, layer.group_size) == (0.5, 3, None, None, 4)


@pytest.mark.parametrize(("rank", "kind"), [(1, nk.DBN1d), (2, nk.DBN2d), (3, nk.DBN3d)])
def test_rank(rank: int, kind: type) -> None:
    made = norm_layer(nk.DBN2d, rank)
    assert type(made(8)) is kind
    assert made.func.__name__ == kind.__name__


@pytest.mark.parametrize(("channels", "size"), [(64, 64), (32, 32), (128, 64)])
def test_group_size(channels: int, size: int) -> None:
    assert norm_layer("IterNorm")(channels).group_size == size
    assert norm_layer("IterNorm", group_size=8)(channels).group_size == 8


def test_group_size_of_a_call() -> None:
    made = norm_layer("IterNorm", group_size=32)
    assert made(64, group_size=8).group_size == functools.partial(made, group_size=8)(64).group_size == 8
    assert made(64, group_size=None).group_size == 32
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (24, 24, None, 16):
            made(40, group_size=size)
    sizes = {"24": 20, "32": 20, "16": 10}
    assert [str(w.message) for w in caught] == [
        f"group_size {asked} does not divide 40 channels: {size}" for asked, size in sizes.items()
    ]


def test_one_warning_for_each_channel_count() -> None:
    made = norm_layer("IterNorm")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for channels in (96, 64, 96, 160, 96, 32):
            get_norm_layer(made)(channels)
    assert [(str(w.message), w.category) for w in caught] == [
        ("group_size 64 does not divide 96 channels: 48", UserWarning),
        ("group_size 64 does not divide 160 channels: 40", UserWarning),
    ]
    assert {w.filename for w in caught} == {__file__}
    with pytest.warns(UserWarning, match="96 channels: 48"):
        assert norm_layer("IterNorm")(96).group_size == 48


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    made = duplicate(norm_layer("IterNorm", group_size=4, scaling="frobenius"))
    layer = made(8)
    assert (type(layer), layer.group_size, layer.scaling) == (nk.IterNorm2d, 4, "frobenius")
    assert repr(made) == repr(norm_layer("IterNorm", group_size=4, scaling="frobenius"))


def test_timm_sees_that_it_brings_no_activation() -> None:
    """timm takes a function as it is for layers with one; else it looks in a set, then for the name in a table."""
    func = norm_layer("IterNorm").func
    assert not isinstance(func, types.FunctionType)
    assert func not in {nn.BatchNorm2d}
    assert func.__name__.lower() == "iternorm2d"


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        (("ConvNorm",), {}, ValueError, "norm: expected one that normalizes activations, got ConvNorm"),
        (("GroupNorm",), {}, ValueError, "norm: expected .*got 'GroupNorm'"),
        ((None,), {}, TypeError, "norm: expected .*got NoneType"),
        (("IterNorm", 4), {}, ValueError, "rank: expected 1, 2 or 3, got 4"),
        (("IterNorm", 0), {}, ValueError, "rank: expected at least 1, got 0"),
        (("IterNorm", "2d"), {}, TypeError, "rank: expected an int, got '2d'"),
        (("IterNorm", 2, 0), {}, ValueError, "group_size: expected at least 1, got 0"),
        (("POPNorm", 2, 4), {}, ValueError, "group_size: expected None for POPNorm, which has no groups, got 4"),
        (("IterNorm",), {"kappa": 2.0}, TypeError, "options: expected some of .* of IterNorm2d, got 'kappa'"),
        (("IterNorm",), {"eps": -1.0}, ValueError, "eps: expected .*got -1"),
    ],
)
def test_refused(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        norm_layer(*args, **options)


def test_calls_refused() -> None:
    made = norm_layer("IterNorm")
    with pytest.raises(TypeError, match=r"num_features: expected an int, got 8\.0"):
        made(8.0)
    with pytest.raises(ValueError, match="num_features: expected at least 1, got 0"):
        made(0)
    with pytest.raises(TypeError, match="apply_act"):
        made(8, apply_act=True)
    with pytest.raises(ValueError, match="group_size: expected at least 1, got 0"):
        made(8, group_size=0)
    with pytest.raises(ValueError, match="group_size: expected None for BatchNorm, which has no groups, got 4"):
        norm_layer("BatchNorm")(8, group_size=4)
    with pytest.raises(TypeError, match="positional"):
        made(8, 1e-5)
