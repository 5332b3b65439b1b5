"""fold of classes that others have written: convolutions that inherit their forward, BatchNorms frozen by design."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels.convert import fold
from tests.convert.foldable import CHANNELS, bn, conv, data, filled, hooked, make, refused, trained
from tests.tolerances.folding import assert_folded, assert_folded_network


class Simple(nn.Conv3d):
    """A convolution as in torchvision: with a constructor of its own, and a static method that nothing calls."""

    def __init__(self, inputs: int, outputs: int, midplanes: int | None = None, stride: int = 1) -> None:
        super().__init__(inputs, outputs, (3, 3, 3), stride=stride, padding=1, bias=False)

    @staticmethod
    def get_downsample_stride(stride: int) -> tuple[int, int, int]:
        return stride, stride, stride


class Same(nn.Conv2d):
    """A convolution that initializes, describes and saves itself in other ways."""

    custom = 3

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.orthogonal_(self.weight)

    def extra_repr(self) -> str:
        return f"custom={self.custom}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)


class Further(Same):
    pass


class Plain(nn.Linear):
    pass


class Up(nn.ConvTranspose2d):
    pass


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (Simple(6, CHANNELS), nn.BatchNorm3d(CHANNELS)),
        (Same(6, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)),
        (Further(6, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)),
        (Plain(6, CHANNELS), nn.BatchNorm1d(CHANNELS)),
        (Up(6, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_that_inherit_their_forward(layer: Any, norm: Any) -> None:
    net = nn.Sequential(layer, trained(norm)).double().eval()
    folded = fold(net)
    assert type(folded[0]) is type(layer) and type(folded[1]) is nn.Identity
    assert_folded(folded, net[0], net[1], data(layer))


def test_one_that_reads_a_norm() -> None:
    net = nn.Sequential(trained(bn()), nn.Dropout(), Further(8, 8, 3)).double().eval()
    x = data(net[2])
    assert_folded_network(fold(net)(x), net(x), layers=1, terms=72, d=1)


class OtherForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class OtherWeight(nn.Conv2d):
    """A convolution whose weight is halved on the way to the forward."""

    weight = property(lambda self: self._parameters["weight"] / 2)  # type: ignore[assignment]


class OtherAttribute(nn.Conv2d):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class OtherMixin:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Mixed(OtherMixin, nn.Conv2d):
    pass


class OtherOption(nn.Conv2d):
    """A convolution that pads by more than it says."""

    padding = property(lambda self: (2, 2), lambda self, value: None)


class OtherSize(nn.ConvTranspose2d):
    def _output_padding(self, *args: Any, **kwargs: Any) -> Any:
        return (0, 0)


@pytest.mark.parametrize("kind", [OtherForward, OtherWeight, OtherAttribute, Mixed, OtherOption, OtherSize])
def test_layers_that_inherit_some(kind: Any) -> None:
    layer = make(nn.ConvTranspose2d if kind is OtherSize else nn.Conv2d, 8)
    layer.__class__ = kind
    refused(nn.Sequential(layer, bn()), "1", rf"no subclass in '0\.0'.*{kind.__name__}")


# Frozen BatchNorms.


class FrozenBatchNorm2d(nn.Module):
    """A norm with the interface of torchvision's and detectron2's."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, draw in (("weight", torch.randn), ("bias", torch.randn), ("running_mean", torch.randn)):
            self.register_buffer(name, draw(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.2)

    def numbers(self) -> tuple[Tensor, ...]:
        """Return scale and shift."""
        w, b, mean, var = (value.reshape(1, -1, 1, 1) for value in self.buffers())
        scale = w * (var + self.eps).rsqrt()
        return scale, b - mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.numbers()
        return x * scale + shift


class Epsilon(FrozenBatchNorm2d):
    """A norm as in transformers: eps is written in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def numbers(self) -> tuple[Tensor, ...]:
        w, b, mean, var = (value.reshape(1, -1, 1, 1) for value in self.buffers())
        scale = w * (var + 1e-5).rsqrt()
        return scale, b - mean * scale


class Counting(FrozenBatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", torch.tensor(3))

    def numbers(self) -> tuple[Tensor, ...]:
        w, b, mean, var = (value.reshape(1, -1, 1, 1) for value in [*self.buffers()][:4])
        return w / (var + self.eps).sqrt(), b - mean * w / (var + self.eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make_norm", [FrozenBatchNorm2d, lambda c: FrozenBatchNorm2d(c, 0.1), Epsilon, Counting])
def test_frozen(make_norm: Any, dtype: torch.dtype) -> None:
    """Norms behind a layer and in front of one are folded, into the same numbers as those of an equal BatchNorm."""
    frozen, in_front = make_norm(8), make_norm(8)
    net = nn.Sequential(conv(), frozen, nn.ReLU(), in_front, conv(padding=0)).to(dtype).eval()
    plain = nn.Sequential(*net).eval()
    for i in (1, 3):
        eps = getattr(net[i], "eps", 1e-5)
        plain[i] = nn.BatchNorm2d(8, eps).to(dtype).eval()
        plain[i].load_state_dict(net[i].state_dict(), strict=False)
    folded, expected = fold(net), fold(plain)
    assert [type(folded[i]) for i in (1, 3)] == [nn.Identity] * 2
    for value, target in zip(folded.parameters(), expected.parameters(), strict=True):
        assert value.dtype == dtype and torch.equal(value, target)
    if dtype == torch.float64:
        x = data(net[0])
        assert_folded_network(folded(x), net(x), layers=2, terms=72, d=1)


class Activated(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Biased(FrozenBatchNorm2d):
    """A norm whose forward uses another eps than its attribute says."""

    def numbers(self) -> tuple[Tensor, ...]:
        w, b, mean, var = (value.reshape(1, -1, 1, 1) for value in self.buffers())
        scale = w * (var + 1e-3).rsqrt()
        return scale, b - mean * scale


class OfSequences(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        n, c, length = x.shape
        return x.reshape(n, c, length)


FROZEN: dict[str, tuple[Any, str]] = {
    "activated": (lambda: Activated(8), "frozen BatchNorm to compute .* got Activated, which differs by"),
    "other-eps": (lambda: Biased(8), "frozen BatchNorm to compute .* got Biased, which differs by"),
    "sequences": (lambda: OfSequences(8), "frozen BatchNorm that takes images, got ValueError"),
    "hooked": (lambda: hooked(FrozenBatchNorm2d(8), "forward_hook"), r"no hooks on '0\.1'"),
    "nan": (lambda: filled(FrozenBatchNorm2d(8), "running_mean", torch.nan), "finite values in running_mean"),
    "meta": (lambda: FrozenBatchNorm2d(8).to("meta"), "finite values in weight"),
    "channels": (lambda: FrozenBatchNorm2d(4), "8 features behind Conv2d, got 4"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_norms_that_stay(name: str) -> None:
    build, reason = FROZEN[name]
    refused(nn.Sequential(conv(), build()), "1", reason)


def test_a_frozen_norm_in_training_mode() -> None:
    net = nn.Sequential(conv(), FrozenBatchNorm2d(8).double())
    net.train().training = False
    with pytest.raises(ValueError, match="'1': expected evaluation mode"):
        fold(net)


def test_a_frozen_norm_behind_a_linear() -> None:
    refused(nn.Sequential(make(nn.Linear, 8), FrozenBatchNorm2d(8)), "1", "norm for 2D input behind Linear")
