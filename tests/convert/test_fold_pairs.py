"""fold with pairs: what the caller says of forwards that cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import fold
from tests.convert.foldable import ITERNORM, Graph, bn, conv, data, hooked, make, pair, same_state, state, trained
from tests.tolerances.folding import assert_folded_network


class Untraceable(nn.Module):
    """A network that goes through a Sequential, then decides by its values; one pair can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), trained(ITERNORM(2)), nn.ReLU(), conv(), trained(bn()))
        self.block = Graph(pair, conv=conv(), bn=trained(bn()))
        self.after, self.sync = nn.ConvTranspose2d(8, 8, 3), trained(nn.SyncBatchNorm(8))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(x)
        y: Tensor = self.block(x) if x.mean() < 1e9 else x
        return self.sync(self.after(y))


PAIRS = [("features.0", "features.1"), ["features.3", "features.4"], ("after", "sync")]


@pytest.mark.parametrize("example", [True, False])
def test_pairs_are_folded_besides_what_is_found(example: bool) -> None:
    net, x = Untraceable(), data(conv())
    before = state(net)
    with pytest.raises(ValueError, match=r"'features\.1' .*may call one by one(.|\n)*'sync' .*TraceError"):
        fold(net)
    folded = fold(net, pairs=iter(PAIRS), example_inputs=x if example else None)
    names = {name for name, module in net.named_modules() if hasattr(module, "running_mean")}
    assert all(type(folded.get_submodule(name)) is nn.Identity for name in names) and same_state(net, before)
    assert_folded_network(folded(x), net(x), layers=4, terms=72, d=4)


def test_some_pairs() -> None:
    """A norm that is not named stays, and is reported."""
    net, x = Untraceable(), data(conv())
    with pytest.raises(ValueError, match=r"'features\.4' (.|\n)*'sync'") as raised:
        fold(net, pairs=PAIRS[:1])
    assert "features.1" not in str(raised.value) and "block" not in str(raised.value)
    with pytest.warns(UserWarning, match=r"'features\.4' (.|\n)*'sync'"):
        folded = fold(net, strict=False, pairs=PAIRS[:1])
    assert [type(folded.features[i]) for i in (1, 4)] == [nn.Identity, nn.BatchNorm2d]
    assert_folded_network(folded(x), net(x), layers=2, terms=72, d=4)


def test_pairs_that_are_found_anyway() -> None:
    net = nn.Sequential(conv(), bn(), nn.Dropout(), trained(ITERNORM(2))).double().eval()
    x = data(net[0])
    folded = fold(net, pairs=[("0", "3")])  # the BatchNorm in between is merged
    assert_folded_network(folded(x), net(x), layers=2, terms=72, d=4)


def test_ranks_of_pairs() -> None:
    """Input of another rank is refused, as it is without pairs."""
    path = lambda self, x: pair(self, x) if x.sum() < 1e9 else x  # noqa: E731
    net = Graph(path, conv=make(nn.Linear, 8), bn=trained(nn.BatchNorm1d(8).double())).eval()
    folded = fold(net, pairs=[("conv", "bn")])
    folded(torch.randn(3, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="'bn': expected 2D input"):
        folded(torch.randn(3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"pairs: .*'conv', 'bn': expected 2D input beside Linear, got 3D"):
        fold(net, pairs=[("conv", "bn")], example_inputs=torch.randn(3, 8, 8))


def traceable(**modules: nn.Module) -> nn.Module:
    """Return two pairs, one behind the other, that can be traced."""
    parts = {"conv": conv(), "bn": bn(), "conv2": conv(), "bn2": bn()}
    return Graph(lambda self, x: self.bn2(self.conv2(pair(self, x).relu())), **parts | modules).double().eval()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("pairs", "error", "said"),
    [
        ("conv", TypeError, "pairs: expected tuples of two names, got 'conv'"),
        (3, TypeError, "pairs: expected tuples of two names, got 3"),
        (["conv", "bn"], TypeError, "names of a layer and of the BatchNorm or other norm behind it, got 'conv'"),
        ([("conv", "bn", "bn")], TypeError, "got .'conv', 'bn', 'bn'."),
        ([("conv", "norm")], ValueError, "names of modules of the model, got 'norm'"),
        ([("", "bn")], ValueError, "names of modules of the model, got ''"),
        ([("conv", ["bn"])], ValueError, "names of modules of the model, got .'bn'"),
        ([("bn", "conv")], ValueError, "'bn': expected one of Linear, Conv1d, .* got BatchNorm2d"),
        ([("conv", "conv2")], ValueError, "'conv2': expected BatchNorm, .* got Conv2d"),
        ([("conv", "bn"), ("conv", "bn2")], ValueError, "each module in one of them, got 'conv' in 2"),
        ([("conv", "bn"), ("conv2", "bn")], ValueError, "each module in one of them, got 'bn' in 2"),
        ([("conv", "bn2"), ("conv2", "bn")], ValueError, "'conv2', 'bn': expected calls one behind .* got 'conv'"),
        ([("conv", "bn2")], ValueError, "'conv', 'bn2': expected calls one behind the other, got 'conv2' in front"),
    ],
    ids=str,
)
def test_wrong_pairs(pairs: Any, error: type[Exception], said: str, strict: bool) -> None:
    """Wrong pairs are an error whatever strict says, because they were asked for."""
    net = traceable()
    with pytest.raises(error, match=said):
        fold(net, strict=strict, pairs=pairs)


PARTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "channels": (Untraceable, {"sync": nn.SyncBatchNorm(4)}, "'after', 'sync': expected 8 features .*got 4"),
    "rank": (Untraceable, {"sync": nn.BatchNorm1d(8)}, "'after', 'sync': expected a norm for 4D input"),
    "hook": (Untraceable, {"after": hooked(conv(), "forward_hook")}, "'after', 'sync': expected no hooks on 'after'"),
    "statistics": (
        Untraceable, {"sync": nn.BatchNorm2d(8, track_running_stats=False)}, "'after', 'sync': expected running stat",
    ),
    "groups": (
        Untraceable, {"after": conv(groups=8), "sync": trained(nk.IterNorm2d(8, 4))}, "'after', 'sync': .*misaligned",
    ),
    "not-called": (lambda: traceable(after=conv(), sync=bn()), {}, "'after', 'sync': expected a call of it, found"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_pairs_that_cannot_be_folded(name: str) -> None:
    build, change, reason = PARTS[name]
    net = build()
    for part, module in change.items():
        setattr(net, part, module)
    net.double().eval()
    with pytest.raises(ValueError, match=f"pairs: expected a layer and the norm behind it, got {reason}"):
        fold(net, strict=False, pairs=[("after", "sync")])


def test_a_layer_of_another_forward() -> None:
    """The layer is in a forward that is traced and does not call the norm."""
    net = Untraceable()
    net.block = Graph(lambda self, x: self.conv(x).relu(), conv=conv())
    with pytest.raises(ValueError, match=r"'block\.conv' in front of it, got one in another forward"):
        fold(net.eval(), pairs=[("block.conv", "sync")])
    net.block.spare = conv()
    with pytest.raises(ValueError, match=r"'block\.spare' in front of it, got none"):
        fold(net.eval(), pairs=[("block.spare", "sync")])


def test_training_mode() -> None:
    net = Untraceable()
    net.features[1].train()
    with pytest.raises(ValueError, match=r"'features\.1': expected evaluation mode"):
        fold(net, pairs=PAIRS)


class Crossed(nn.Module):
    """A network whose norms are behind other layers than it seems, which tracing does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn, self.bn2 = conv(), conv(), trained(bn()), trained(bn())
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            return x
        return self.bn2(self.conv(self.bn(self.conv2(x).relu()).relu()).relu())


def test_pairs_that_are_not_neighbors_are_shown_by_example() -> None:
    net = Crossed()
    fold(net, pairs=[("conv", "bn"), ("conv2", "bn2")])  # the caller is believed
    with pytest.raises(ValueError, match="example_inputs: expected the same outputs without 'bn', 'bn2', got outputs"):
        fold(net, pairs=[("conv", "bn"), ("conv2", "bn2")], example_inputs=data(conv()))
