"""fold with example_inputs, which compare and show ranks; and what it does about ranks without them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels.convert import fold
from tests.convert.foldable import CHANNELS, NORMS, Graph, bn, conv, data, images, make, pair, resnet, trained
from tests.tolerances import assert_agree
from tests.tolerances.folding import assert_folded, assert_folded_network

RANKS = ["BatchNorm", "SyncBatchNorm", "IterNorm", "DBN", "POPNorm"]


def linear_and(norm: str) -> Any:
    return nn.Sequential(make(nn.Linear, CHANNELS), trained(NORMS[norm](1).double())).eval()


def vectors() -> Tensor:
    return torch.randn(5, CHANNELS, dtype=torch.float64)


def sequences() -> Tensor:
    """Draw as many positions as features: the shape does not tell which of the two is normalized."""
    return torch.randn(5, CHANNELS, CHANNELS, dtype=torch.float64)


# Ranks.


@pytest.mark.parametrize("how", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("norm", RANKS)
def test_sequences_are_refused_when_they_come(norm: str, how: Any) -> None:
    net = linear_and(norm)
    folded = how(fold(net))
    assert type(folded[1]) is nn.Identity and folded.state_dict().keys() == {"0.weight", "0.bias"}
    assert_folded(folded, net[0], net[1], vectors())
    assert net(sequences()).shape == (5, CHANNELS, CHANNELS)
    with pytest.raises(ValueError, match=rf"'1': expected 2D input, for which its .*{norm}.*, got \(5, 8, 8\)"):
        folded(sequences())


def test_sequences_in_front_of_a_linear_are_refused_when_they_come() -> None:
    net = nn.Sequential(trained(NORMS["IterNorm"](1).double()), make(nn.Linear, CHANNELS)).eval()
    folded, x = fold(net), vectors()
    assert_agree(folded(x), net(x))
    with pytest.raises(ValueError, match="'0': expected 2D input"):
        folded(sequences())


def test_no_batch_in_front_of_a_convolution_is_refused_when_it_comes() -> None:
    """Without a batch BatchNorm1d takes (C, L) for (N, C)."""
    net = nn.Sequential(make(nn.Conv1d, CHANNELS, kernel_size=1), trained(NORMS["BatchNorm"](1).double())).eval()
    folded = fold(net)
    assert_folded(folded, net[0], net[1], data(net[0]))
    assert net(sequences()[0]).shape == (CHANNELS, CHANNELS)
    with pytest.raises(ValueError, match=r"'1': expected 3D input, .* got \(8, 8\)"):
        folded(sequences()[0])


def test_nothing_is_guarded_that_takes_one_rank() -> None:
    folded = fold(resnet())
    assert not any(module._forward_pre_hooks for module in folded.modules())


@pytest.mark.parametrize("norm", RANKS)
def test_vectors_are_shown(norm: str) -> None:
    net = linear_and(norm)
    folded = fold(net, example_inputs=vectors())
    assert_folded(folded, net[0], net[1], vectors())
    assert not folded[1]._forward_pre_hooks


@pytest.mark.parametrize("norm", RANKS)
def test_sequences_are_shown(norm: str) -> None:
    """On sequences the norm is no function of features; it stays, beside a pair that folds."""
    net = nn.Sequential(linear_and(norm), nn.ReLU(), make(nn.Conv1d, CHANNELS), trained(NORMS[norm](1).double()))
    reason = r"'0\.1' .*expected 2D input beside Linear, got 3D input in example_inputs"
    with pytest.raises(ValueError, match=reason):
        fold(net.eval(), example_inputs=sequences())
    with pytest.warns(UserWarning, match=reason):
        folded = fold(net, strict=False, example_inputs=sequences())
    assert type(folded[0][1]) is type(net[0][1]) and type(folded[3]) is nn.Identity
    x = sequences()
    assert_folded_network(folded(x), net(x), layers=2, terms=24, d=4)


def test_guards_compile_and_export() -> None:
    torch.compiler.reset()
    folded, x = fold(linear_and("BatchNorm")), vectors()
    assert torch.equal(torch.compile(folded, backend="eager", fullgraph=True)(x), folded(x))
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), folded(x))


# Kinds of inputs.


@dataclass
class Output:
    y: Tensor
    size: int


class Several(nn.Module):
    """A model that takes arguments of several kinds, and returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), trained(bn().double())
        self.eval()

    def forward(self, x: Tensor, *, sizes: dict[str, Any], scale: float = 1.0, index: Tensor | None = None) -> Any:
        y = self.bn(self.conv(x)) * scale
        x.zero_()
        if index is not None:
            y = y[:, index]
        noise = torch.rand(1) + torch.zeros(1)
        return OrderedDict(out=Output(y, 3), rest=[(y.mean() + sizes["a"], None), "name", noise])


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.randn(2, 8, 5, 5), "sizes": {"a": torch.ones(2)}, "index": torch.tensor([1, 2])},
        {"x": torch.randn(2, 8, 5, 5, dtype=torch.float16), "sizes": {"a": 2.0}, "scale": 0.5},
    ],
)
def test_kinds_of_inputs(inputs: dict[str, Any]) -> None:
    """Inputs may be of any type; they stay as they are, whatever the model does with them."""
    net = Several()
    before, seed = copy.deepcopy(inputs), torch.get_rng_state()
    folded = fold(net, example_inputs=inputs)
    assert type(folded.bn) is nn.Identity
    assert torch.equal(inputs["x"], before["x"]) and torch.equal(torch.get_rng_state(), seed)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_type(dtype: torch.dtype) -> None:
    """Merged weights are compared before they are rounded."""
    net = resnet().to(dtype)
    for inputs in (images(dtype), (images(torch.float32),), {"x": images()}):
        folded = fold(net, example_inputs=inputs)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert all(torch.equal(p, q) for p, q in zip(folded.parameters(), fold(net).parameters(), strict=True))


# Differences that example inputs show.


class Peeking(nn.Module):
    """A model that reads a weight where tracing does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(conv(), bn()), nn.Sequential(conv(), bn())
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        y = self.second(self.first(x))
        return {"y": y, "penalty": [1e-3 * sum(p.square().sum() for p in self.second.parameters())]}


def test_a_difference_is_shown() -> None:
    """The error has the names of the norms that make a difference, in an output that is small beside the other."""
    net = Peeking()
    fold(net)
    with pytest.raises(ValueError, match=r"same outputs without 'second.1', got outputs that differ by") as raised:
        fold(net, example_inputs=1e6 * images().repeat(1, 3, 1, 1)[:, :8])
    assert "first" not in str(raised.value)
    with pytest.raises(ValueError, match="same outputs"):
        fold(net, strict=False, example_inputs=images().repeat(1, 3, 1, 1)[:, :8])


def test_shapes_that_differ_are_shown() -> None:
    def path(self: Any, x: Tensor) -> Any:
        return pair(self, x), torch.ones(len([*self.modules()]) + len(dict(self.bn.named_buffers())))

    net = Graph(path, conv=conv(), bn=bn().double()).eval()
    with pytest.raises(ValueError, match="without 'bn', got outputs of other shapes"):
        fold(net, example_inputs=data(net.conv))


def test_infinities_are_compared() -> None:
    net = Graph(lambda self, x: pair(self, x).log(), conv=conv(), bn=trained(bn().double())).eval()
    assert not net(data(net.conv)).isfinite().all()
    fold(net, example_inputs=data(net.conv))


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        ("x", TypeError, "expected a tensor, a tuple of arguments or a dict of keyword arguments, got str"),
        ([torch.ones(1)], TypeError, "got list"),
        ({1: torch.ones(1)}, TypeError, "names of arguments as keys, got 1"),
        ({"y": torch.ones(1)}, ValueError, r"arguments of ResNet.forward\(x.*\).*, got y=a tensor \(1,\): .*'y'|'x'"),
        ((images(), images()), ValueError, r"arguments of ResNet.forward.*got a tensor \(8, 3, 12, 12\), a tensor"),
        ((), ValueError, "got no arguments: missing a required argument: 'x'"),
        (torch.randn(2, 4, 8, 8), ValueError, r"got a tensor \(2, 4, 8, 8\): 'conv1' raises RuntimeError: .* channels"),
        ((None,), ValueError, "got None: 'conv1' raises TypeError"),
    ],
    ids=["text", "list", "number as key", "other name", "too many", "none", "channels", "None"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_inputs_that_the_model_does_not_take(inputs: Any, error: Any, said: str, strict: bool) -> None:
    with pytest.raises(error, match=f"example_inputs: .*{said}"):
        fold(resnet(), strict=strict, example_inputs=inputs)


def test_outputs_that_are_nothing() -> None:
    net = Graph(lambda self, x: "done" if pair(self, x) is None else None, conv=conv(), bn=bn().double()).eval()
    with pytest.raises(ValueError, match="a model that gives tensors to compare, got none"):
        fold(net, example_inputs=data(net.conv))


def test_example_inputs_of_a_model_without_norms() -> None:
    """They are tried as well."""
    net = nn.Sequential(conv()).eval()
    with pytest.raises(ValueError, match=r"example_inputs: .*'0' raises"):
        fold(net, example_inputs=torch.randn(2, 3, 5, 5))
