"""Parts for the tests of fold: norms with numbers of their own, layers, data, small graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import fold
from normkernels.layers.sync import SyncDBN, SyncIterNorm

LINEAR = [nn.Linear, nn.Conv1d, nn.ConvTranspose1d]
LAYERS = [*LINEAR, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d]
CHANNELS = 8  # channels of every norm: two groups of 4

Make = Callable[[int], Any]  # a norm for a rank: 1, 2 or 3


def member(name: str, *args: Any, **options: Any) -> Make:
    """Return a function that makes the 1d, 2d or 3d layer of a family."""
    return lambda rank: getattr(nn if name.startswith("Batch") else nk, f"{name}{rank}d")(CHANNELS, *args, **options)


def bare_pop(rank: int) -> Any:
    return member("POPNorm", center=False)(rank)


NORMS: dict[str, Make] = {
    "BatchNorm": member("BatchNorm"),
    "BatchNorm-bare": member("BatchNorm", affine=False),
    "SyncBatchNorm": lambda rank: nn.SyncBatchNorm(CHANNELS),
    "IterNorm": member("IterNorm", 4),
    "IterNorm-one-group": member("IterNorm"),
    "IterNorm-bare": member("IterNorm", 2, affine=False),
    "DBN": member("DBN", 4),
    "SyncIterNorm": lambda rank: SyncIterNorm(CHANNELS, 4),
    "SyncDBN": lambda rank: SyncDBN(CHANNELS, 4),
    "POPNorm": member("POPNorm"),
    "POPNorm-uncentered": bare_pop,
    "POPNorm-unscaled": member("POPNorm", scale=False),
}
ITERNORM = NORMS["IterNorm"]


def trained(norm: Any) -> Any:
    """Put a norm into evaluation, with numbers of its own everywhere; a whitening matrix is not its transpose."""
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.2 if name == "running_var" else torch.randn_like(value))
    return norm.eval()


def rank_of(layer_type: Any) -> int:
    return 1 if layer_type is nn.Linear else int(layer_type.__name__[-2])


def make(layer_type: Any, inputs: int = 6, **options: Any) -> Any:
    size = () if layer_type is nn.Linear else (options.pop("kernel_size", 3),)
    return layer_type(inputs, options.pop("outputs", CHANNELS), *size, **{"dtype": torch.float64} | options).eval()


def data(layer: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.in_features, dtype=dtype)
    return torch.randn(2, layer.in_channels, *(7, 6, 5)[: len(layer.kernel_size)], dtype=dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], v) for k, v in before.items())


class Graph(nn.Module):
    """A module with a test's own forward over these modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.path = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


def conv(**options: Any) -> nn.Conv2d:
    return make(nn.Conv2d, 8, **{"padding": 1} | options)


def bn(**options: Any) -> nn.BatchNorm2d:
    """Return a norm with a beta, so that it cannot be folded into the padded convolution behind it."""
    norm = nn.BatchNorm2d(CHANNELS, **options)
    nn.init.constant_(norm.bias, 0.5)
    return norm


def filled(norm: Any, name: str, value: float) -> Any:
    getattr(norm, name).data[3] = value
    return norm


def pair(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x))


def hooked(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *args: None)
    return module


def refused(part: nn.Module, name: str, reason: str) -> None:
    """Check that fold refuses a part, with the norm's name.

    If it is not strict, the part stays as it is, beside a pair that is folded.
    """
    net = nn.Sequential(part.double(), conv(), bn().double()).eval()
    before = dict(net.named_modules())
    where = rf"\n  '0\.{name}' \({type(part.get_submodule(name)).__name__}\): .*{reason}"
    with pytest.raises(ValueError, match=rf"model: expected all its norms to be foldable, got{where}") as raised:
        fold(net)
    assert "'2'" not in str(raised.value)
    with pytest.warns(UserWarning, match=rf"not folded and stay as they are:{where}") as warned:
        folded = fold(net, strict=False)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert type(folded[2]) is nn.Identity
    assert [type(m) for m in folded[0].modules()] == [type(m) for m in net[0].modules()]
    if not any(p.is_meta for p in net.parameters()):
        torch.testing.assert_close(folded[0].state_dict(), net[0].state_dict(), rtol=0, atol=0, equal_nan=True)
    assert dict(net.named_modules()) == before
    with pytest.warns(UserWarning, match=rf"not folded and stay as they are:{where}"):
        alone = fold(net[:1].eval(), strict=False)
    assert alone is not net and [type(m) for m in alone[0].modules()] == [type(m) for m in net[0].modules()]


class Block(nn.Module):
    """A block of a ResNet, with activations as functions and as a module, in place."""

    def __init__(self, c: int, out: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, padding=1, bias=False), norm(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if c == out else nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1, norm), Block(8, 8, 1, norm))
        self.layer2 = nn.Sequential(Block(8, 16, 2, norm), Block(16, 16, 1, norm))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


RESNETS: dict[str, Any] = {
    "BatchNorm": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "IterNorm": lambda c: nk.IterNorm2d(c, 8),
    "DBN": lambda c: nk.DBN2d(c, 4),
    "SyncIterNorm": lambda c: SyncIterNorm(c, 8),
    "POPNorm": nk.POPNorm2d,
}


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 3, 12, 12, dtype=dtype)


def resnet(norm: str = "IterNorm") -> ResNet:
    net = ResNet(RESNETS[norm]).double().eval()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            trained(module)
    return net
