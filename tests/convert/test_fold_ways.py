"""fold through optional arguments, conditions on shapes, and wrappers: what is exact on every way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from normkernels.convert import fold
from tests.convert.foldable import ITERNORM, Graph, bn, conv, data, trained
from tests.tolerances.folding import assert_folded_network


class Network(nn.Module):
    """A pair and further modules; its subclasses have a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = conv(), trained(bn().double()), conv()
        self.eval()

    def pair(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Masked(Network):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.pair(x)
        return y if mask is None else y * mask


class Features(Network):
    def forward(self, x: Tensor, return_features: bool = False, *, scale: float = 2.0) -> Any:
        y = self.pair(x) * scale
        return (y, self.other(y)) if return_features else self.other(y)


class Decorated(Network):
    """A network of which torch.fx sees a wrapper's arguments."""

    @torch.no_grad()
    def forward(self, x: Tensor, *, mask: Tensor | None = None, sizes: tuple[int, ...] = (4, 4)) -> Any:
        y = self.pair(x)
        return F.interpolate(y if mask is None else y * mask, size=sizes)


class Mode(Network):
    """A network that is told by a string what to do, also before the pair."""

    def forward(self, x: Tensor, mode: str = "plain", bias: Tensor | None = None) -> Any:
        if mode == "twice":
            x = 2 * x
        elif mode != "plain":
            raise ValueError(f"mode: {mode}")
        y = self.pair(x if bias is None else x + bias)
        return {"y": y, "mode": mode}


class Either(Network):
    """A network that calls the pair on one way alone, both layers of it."""

    def forward(self, x: Tensor, short: bool = False) -> Tensor:
        return self.other(x) if short else self.pair(x)


class Asserted(Network):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, f"expected images, got {x.shape}"
        n, channels, *_ = x.size(0), x.shape[1]
        if channels != 8:
            raise ValueError("expected 8 channels")
        y = self.conv(x)
        assert y.shape[0] == n and y.ndim == 4
        return self.bn(y)


class Shaped(Network):
    """A network that computes something else for other shapes, as padding does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(0)
        if x.shape[-1] % 2 or x.size(-2) % 2 == 1:
            x = F.pad(x, (0, 1, 0, 1))
        y = self.pair(x)
        return y + self.other(x) if y.shape == x.shape else y


mask = torch.rand(2, 8, 7, 6, dtype=torch.float64)
CALLS: dict[str, tuple[type[Network], list[dict[str, Any]]]] = {
    "mask": (Masked, [{}, {"mask": mask}]),
    "flag": (Features, [{}, {"return_features": True}, {"return_features": True, "scale": 0.5}]),
    "decorated": (Decorated, [{}, {"mask": mask, "sizes": (3, 2)}]),
    "mode": (Mode, [{}, {"mode": "twice"}, {"bias": mask}, {"mode": "twice", "bias": mask}]),
    "either": (Either, [{}, {"short": True}]),
    "assert": (Asserted, [{}]),
    "shapes": (Shaped, [{}, {"x": torch.randn(8, 6, 8, dtype=torch.float64)}]),
}


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_exact_on_every_way(name: str) -> None:
    kind, calls = CALLS[name]
    net = kind()
    folded = fold(net)
    assert type(folded.bn) is nn.Identity
    for options in calls:
        options = {"x": data(net.conv)} | options
        got, expected = flat(folded(**options)), flat(net(**options))
        assert len(got) == len(expected) > 0
        for value, target in zip(got, expected, strict=True):
            assert_folded_network(value, target, layers=2, terms=72, d=1)


def test_shapes_that_are_read_between_a_norm_and_the_layer_behind() -> None:
    def path(self: Any, x: Tensor) -> Tensor:
        y = self.bn(x.relu())
        assert y.shape[0] + x.shape[0] == 2 * y.size(0)
        z: Tensor = self.conv(y)
        return z

    net = Graph(path, conv=conv(padding=0), bn=trained(bn().double())).eval()
    x = data(net.conv)
    assert_folded_network(fold(net)(x), net(x), layers=1, terms=72, d=1)


def test_what_a_shape_assertion_refuses_is_refused_still() -> None:
    folded = fold(Asserted())
    with pytest.raises(AssertionError, match="expected images"):
        folded(torch.randn(8, 7, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 8 channels"):
        folded(torch.randn(1, 4, 7, 6, dtype=torch.float64))


# Networks whose fold is exact on some ways alone are refused.


class UsedWhenGiven(Network):
    def forward(self, x: Tensor, again: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if again is None else self.bn(y) + y * again


class UsedWhenAsked(Network):
    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        y = self.conv(x)
        return (self.bn(y), y) if return_features else self.bn(y)


class NormWhenAsked(Network):
    def forward(self, x: Tensor, normalize: bool = True) -> Tensor:
        y: Tensor = self.conv(x)
        return self.bn(y) if normalize else y


class Changed(Network):
    """A network that asks the same twice and gets another answer."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            mask = x
        twice = False
        if mask.ndim == 4:
            mask.unsqueeze_(0)
            twice = True
        y = self.conv(x)
        if mask.ndim == 4:
            return self.bn(y)
        return (self.bn(y), y) if twice else self.bn(y)


class OtherLayer(Network):
    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        y: Tensor = self.bn((self.other if other else self.conv)(x))
        return y


class ByShape(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y if x.shape[0] == 1 else y.relu())


class TwiceByShape(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = self.pair(x)
        return self.pair(y) if x.shape[0] > 1 else y


SOME: dict[str, tuple[type[Network], str]] = {
    "given": (UsedWhenGiven, r"one user of the output of 'conv' .* depends on again, which may be left out"),
    "asked": (UsedWhenAsked, r"one user of the output of 'conv' .* depends on return_features, which may be left"),
    "no-norm": (NormWhenAsked, "calls of it and 'conv' alike on every way .*got one of them alone"),
    "changed": (Changed, "one user of the output of 'conv'"),
    "other-layer": (OtherLayer, "one layer beside it on every way"),
    "by-shape": (ByShape, "linear layer in front of it, got relu"),
    "twice": (TwiceByShape, "one call of 'bn', got 2"),
}


@pytest.mark.parametrize("name", SOME)
def test_refused_where_it_is_exact_on_some_ways(name: str) -> None:
    kind, reason = SOME[name]
    with pytest.raises(ValueError, match=reason):
        fold(kind())


class Endless(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = self.pair(x)
        while y.shape[-1] > 1:
            y = F.max_pool2d(y, 2)
        return y


class Padded(nn.Module):
    """A module that decides by shapes, as convolutions of the padding "same" do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), trained(bn().double())

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        if x.shape[-1] % 2 == 1:
            x = F.pad(x, (0, 1))
        y: Tensor = self.bn(self.conv(x))
        return y


class Deep(Network):
    """A network with more ways than are traced, whose parts have few."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Padded() for _ in range(7))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.pair(x)


def test_many_ways() -> None:
    net, x = Deep(), data(conv())
    folded = fold(net)
    assert not any(hasattr(module, "running_mean") for module in folded.modules())
    for each in (x, x[..., 1:]):
        assert_folded_network(folded(each), net(each), layers=8, terms=72, d=1)


class Failing(Network):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("one day")


def test_what_has_no_end_or_no_way() -> None:
    with pytest.raises(ValueError, match=r"'model' to have a forward .*at most 32 ways"):
        fold(Endless())
    with pytest.raises(ValueError, match=r"'model' to have a forward .*NotImplementedError: one day"):
        fold(Failing())


# Wrappers.


class Passing(nn.Module):
    """A wrapper that hands on whatever it is given."""

    def __init__(self, net: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.how(self, *args, **kwargs)


def hand_on(self: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return self.net(*args, **kwargs)


class Named(nn.Module):
    """A wrapper that hands on by name, too, and takes no more by place than it says."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any, **kwargs: Any) -> Any:
        return self.net(x, **kwargs)


def sequence() -> nn.Sequential:
    return nn.Sequential(conv(), trained(ITERNORM(2).double()), nn.ReLU(), conv(), trained(bn().double())).eval()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "averaged": AveragedModel,
    "parallel": nn.DataParallel,
    "own": lambda net: Passing(net, hand_on),
    "named": Named,
    "twice": lambda net: AveragedModel(Passing(net, hand_on)),
    "inside": lambda net: nn.Sequential(Passing(net, hand_on), nn.ReLU()),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name: str) -> None:
    net = WRAPPERS[name](sequence()).eval()
    folded, x = fold(net), data(conv())
    assert type(folded) is type(net) and not any(hasattr(module, "running_mean") for module in folded.modules())
    assert_folded_network(folded(x), net(x), layers=2, terms=72, d=4)


NOT_THIN: dict[str, Callable[..., Any]] = {
    "one-by-one": lambda self, x: self.net[1](self.net[0](x)),
    "twice": lambda self, *args: self.net(self.net(*args)),
    "each": lambda self, *args: [self.net(x) for x in args],
    "other-result": lambda self, *args: (self.net(*args),),
    "some": lambda self, *args, **kwargs: self.net(*args[:1]),
    "tensors": lambda self, *args, **kwargs: (
        self.net[1](self.net[0](*args)) if isinstance(args[0], Tensor) else self.net(*args, **kwargs)
    ),
}


@pytest.mark.parametrize("name", NOT_THIN)
def test_what_does_more_than_hand_on(name: str) -> None:
    """Such a wrapper may call the modules of the Sequential by themselves."""
    net = Passing(sequence(), NOT_THIN[name]).eval()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"'net' to have a forward .*may call one by one"):
        fold(net)
