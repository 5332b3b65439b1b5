"""fold of whitening groups that reach across groups of a convolution: appended, or with wider groups."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import fold
from tests.convert.foldable import bn, conv, data, images, make, rank_of, same_state, state, trained
from tests.tolerances import assert_agree
from tests.tolerances.folding import assert_folded_network

GROUPED = ["append", "widen"]
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def norm_of(family: str, rank: int, channels: int, size: int) -> Any:
    return trained(getattr(nk, f"{family}{rank}d")(channels, size).double())


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("family", ["IterNorm", "DBN"])
@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    # depthwise, narrow, one whitening group, and where neither divides the other
    [(8, 8, 4), (8, 4, 4), (8, 2, 8), (12, 3, 6), (12, 6, 4), (12, 2, 4)],
)
@pytest.mark.parametrize("layer_type", CONVOLUTIONS, ids=lambda t: t.__name__)
def test_every_convolution(layer_type: Any, channels: int, groups: int, size: int, family: str, grouped: str) -> None:
    options = {"stride": 2, "bias": groups == 4} | ({"output_padding": 1} if "Transpose" in layer_type.__name__ else {})
    layer = make(layer_type, channels, outputs=channels, groups=groups, **options)
    norm = norm_of(family, rank_of(layer_type), channels, size)
    net = nn.Sequential(layer, norm, nn.ReLU()).eval()
    before, x = state(net), data(layer)
    with pytest.raises(ValueError, match=r'misaligned groups of .*; grouped="append" or "widen" folds it at a cost'):
        fold(net)
    folded = fold(net, grouped=grouped, example_inputs=x)
    assert_folded_network(folded(x), net(x), layers=1, terms=layer.weight[0].numel() * groups, d=size)
    assert same_state(net, before) and not hasattr(folded[1], "running_mean") and not folded[1].training
    if grouped == "append":
        assert folded[1].kernel_size == (1,) * rank_of(layer_type) and folded[1].groups == channels // size
        assert torch.equal(folded[0].weight, layer.weight)
    else:
        each = channels // groups
        assert type(folded[1]) is nn.Identity and folded[0].groups == channels // math.lcm(each, size)


@pytest.mark.parametrize("grouped", GROUPED)
def test_aligned_groups_stay(grouped: str) -> None:
    """The groups of the convolution stay, and norms go into the layer behind them at no cost."""
    aligned = nn.Sequential(conv(groups=2), norm_of("IterNorm", 2, 8, 4)).double().eval()
    folded = fold(aligned, grouped=grouped)
    assert folded[0].groups == 2 and type(folded[1]) is nn.Identity
    between = nn.Sequential(conv(groups=8), norm_of("DBN", 2, 8, 4), conv(padding=0)).eval()
    folded, x = fold(between, grouped=grouped), data(between[0])
    assert folded[0].groups == 8 and type(folded[1]) is nn.Identity
    assert_folded_network(folded(x), between(x), layers=1, terms=72, d=4)


@pytest.mark.parametrize("grouped", GROUPED)
def test_norms_behind(grouped: str) -> None:
    """Norms behind a whitening norm go into the same layer."""
    net = nn.Sequential(
        conv(groups=8), norm_of("IterNorm", 2, 8, 2), nn.Identity(), trained(bn().double()), norm_of("DBN", 2, 8, 4)
    ).eval()
    x = data(net[0])
    folded = fold(net, grouped=grouped, example_inputs=x)
    assert_folded_network(folded(x), net(x), layers=3, terms=72, d=4)
    kinds = [type(module) for module in folded]
    assert kinds[2:4] == [nn.Identity] * 2 and kinds[0] is nn.Conv2d
    assert kinds[1] is (nn.Conv2d if grouped == "append" else nn.Identity)


def test_conv_norm() -> None:
    """ConvNorm has a filter behind its groups, so that only another layer can mix channels."""
    layer = make(nk.ConvNorm2d, 8, padding=1)
    net = nn.Sequential(layer, norm_of("IterNorm", 2, 8, 4)).eval()
    x = data(layer)
    assert_agree(fold(net, grouped="append")(x), net(x))
    with pytest.raises(ValueError, match=r'misaligned groups of 4; .*; grouped="append" folds it at a cost'):
        fold(net, grouped="widen")


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types(grouped: str, dtype: torch.dtype) -> None:
    """The new weights have the convolution's type and are frozen as it is; nothing is drawn from the generator."""
    net = nn.Sequential(conv(groups=8), norm_of("IterNorm", 2, 8, 4)).eval()
    exact = fold(net, grouped=grouped)
    net[0].to(dtype).requires_grad_(False)
    net[0].weight.data = net[0].weight.to(memory_format=torch.channels_last)
    net[1].to(dtype)
    exact = fold(nn.Sequential(*map(copied_in_float64, net)).eval(), grouped=grouped)
    seed = torch.get_rng_state()
    folded = fold(net, grouped=grouped)
    assert torch.equal(torch.get_rng_state(), seed)
    for value, target in zip(folded.parameters(), exact.parameters(), strict=True):
        assert value.dtype == dtype and not value.requires_grad and torch.equal(value, target.to(dtype))


def copied_in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def test_overflow() -> None:
    net = nn.Sequential(conv(groups=8).half(), norm_of("IterNorm", 2, 8, 4)).eval()
    net[1].running_whitening.mul_(1e6)
    for grouped in GROUPED:
        with pytest.raises(ValueError, match=r"merged (weight|bias) within torch.float16"):
            fold(net, grouped=grouped)


def test_without_a_batch() -> None:
    net = nn.Sequential(make(nn.Conv1d, 8, groups=8, kernel_size=1), norm_of("IterNorm", 1, 8, 4)).eval()
    with pytest.raises(ValueError, match="'1': expected 3D input"):
        fold(net, grouped="append")(torch.randn(8, 8, dtype=torch.float64))


def test_costs(caplog: pytest.LogCaptureFixture) -> None:
    """The cost is the number of weights, each of which is one multiply-add for each position."""
    net = nn.Sequential(conv(groups=8), norm_of("IterNorm", 2, 8, 4)).eval()
    added = {}
    for grouped in GROUPED:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="normkernels.convert"):
            folded = fold(net, grouped=grouped)
        (line,) = caplog.messages
        added[grouped] = sum(m.weight.numel() for m in folded if isinstance(m, nn.Conv2d)) - net[0].weight.numel()
        assert line.startswith("1 (IterNorm2d with groups of 4) behind 0 (Conv2d(8, 8,") and f": {grouped}; " in line
    assert added == {"append": 8 * 4, "widen": 8 * 9 * 3}
    assert "append 32, widen 216" in line


def test_wrong_choice() -> None:
    with pytest.raises(ValueError, match="grouped: expected one of refuse, append, widen, got 'widest'"):
        fold(nn.Sequential(conv(), bn()).eval(), grouped="widest")


# Networks whose blocks have grouped and depthwise convolutions.


class Scale(nn.Module):
    """A squeeze-and-excitation block."""

    def __init__(self, c: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Conv2d(c, 4, 1), act, nn.Conv2d(4, c, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Grouped(nn.Module):
    """A bottleneck of ResNeXt or, with a scale, of RegNetY."""

    def __init__(self, c: int, out: int, stride: int, groups: int, scaled: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(out)
        self.se = Scale(out, nn.ReLU(inplace=True)) if scaled else None
        self.conv3, self.bn3 = nn.Conv2d(out, out, 1, bias=False), nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y if self.se is None else self.se(y)))
        y += self.downsample(x)
        return self.act(y)


class Inverted(nn.Module):
    """An inverted residual of MobileNetV2 or, with a scale, of EfficientNet."""

    def __init__(self, c: int, out: int, stride: int, kernel: int, scaled: bool) -> None:
        super().__init__()
        act: Any = nn.SiLU if scaled else nn.ReLU6
        wide = 4 * c
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), act(inplace=True)),
            nn.Sequential(
                nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False), nn.BatchNorm2d(wide),
                act(inplace=True),
            ),
            Scale(wide, act()) if scaled else nn.Identity(),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.residual = stride == 1 and c == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + x if self.residual else y


def network(*blocks: nn.Module, act: nn.Module) -> nn.Module:
    """Build a whitened network of blocks, with a stem and a classifier."""
    c = blocks[0].get_submodule("conv1" if hasattr(blocks[0], "conv1") else "block.0.0").in_channels
    stem = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), act)
    net = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4)).double()
    net.eval()(images())
    nk.convert.replace(net, "IterNorm", group_size=16)
    for module in net.modules():
        if hasattr(module, "running_mean"):
            trained(module)
    return net


NETWORKS: dict[str, Any] = {
    "resnext": lambda: network(Grouped(8, 32, 1, 8, False), Grouped(32, 48, 2, 8, False), act=nn.ReLU()),
    "mobilenet-v2": lambda: network(Inverted(8, 8, 1, 3, False), Inverted(8, 16, 2, 3, False), act=nn.ReLU6()),
    "efficientnet": lambda: network(Inverted(8, 8, 1, 3, True), Inverted(8, 16, 2, 5, True), act=nn.SiLU()),
    "regnet-y": lambda: network(Grouped(16, 48, 2, 6, True), Grouped(48, 48, 1, 6, True), act=nn.ReLU()),
}


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_fold_completely(name: str, grouped: str) -> None:
    net, x = NETWORKS[name](), images()
    norms = sum(hasattr(module, "running_mean") for module in net.modules())
    with pytest.warns(UserWarning, match="misaligned"):
        partly = fold(net, strict=False)
    left = sum(hasattr(module, "running_mean") for module in partly.modules())
    folded = fold(net, grouped=grouped, example_inputs=x)
    assert 0 < left < norms and not any(hasattr(module, "running_mean") for module in folded.modules())
    assert_folded_network(folded(x), net(x), layers=norms, terms=9 * 48, d=16)
