"""BNP refuses bad arguments and layers that it cannot handle, and leaves out the layers that it is told to skip."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from normkernels.optim import BNP
from tests.optim.bnp_networks import loss_of, network
from tests.oracles import inputs


def test_skip() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3))
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "body": block, "up": nn.ConvTranspose2d(4, 3, 2)})
    model["head"] = nn.Linear(4, 2)
    names: list[tuple[tuple[Any, ...], list[str]]] = [
        ((), ["stem", "body.0", "body.1", "head"]),
        (("stem",), ["body.0", "body.1", "head"]),
        (("body", model["head"]), ["stem"]),
        ((block[1],), ["stem", "body.0", "head"]),
        (("up",), ["stem", "body.0", "body.1", "head"]),
    ]
    for skip, left in names:
        bnp = BNP(model, skip=skip)
        assert list(bnp.state_dict()) == left
        bnp.remove()


def test_skipped_layers_are_left_alone() -> None:
    model = network()
    bnp = BNP(model, skip=["3"])
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    bnp.step()
    same = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]  # type: ignore[arg-type]
    assert same == [False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"skip": ["body"]},
            ValueError,
            "skip: expected names or modules of the model, got 'body'; its layers are 0, 3",
        ),
        ({"skip": [nn.Linear(1, 1)]}, ValueError, "skip: expected names or modules of the model, got Linear"),
        ({"skip": "0"}, TypeError, "skip: expected a list of names or modules, got '0'"),
        ({"skip": nn.Sequential()}, TypeError, "skip: expected a list of names or modules"),
        ({"skip": [0]}, TypeError, "skip: expected names or modules, got 0"),
        ({"skip": [None]}, TypeError, "skip: expected names or modules, got None"),
        ({"skip": ["0", "3"]}, ValueError, "model: expected at least one Linear"),
        ({"rho": 1.5}, ValueError, r"rho: expected a finite number within \[0, 1\], got 1.5"),
        ({"rho": "a"}, TypeError, "rho: expected a number"),
        ({"eps1": -1e-2}, ValueError, "eps1: expected"),
        ({"eps2": float("nan")}, ValueError, "eps2: expected"),
        ({"process_group": True}, TypeError, "process_group: expected a ProcessGroup, None or False, got True"),
    ],
)
def test_arguments_it_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        BNP(model, **arguments)
    assert not any(module._forward_hooks for module in model.modules())


def test_model_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        BNP([nn.Linear(1, 1)])  # type: ignore[arg-type]


def tied(kind: str) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    a: Any = model["a"]
    b: Any = model["b"]
    if kind == "biases":
        b.weight = a.weight
    elif kind == "under another name":
        a.register_parameter("extra", a.weight)
    elif kind == "only bias":
        b.bias = a.bias
    elif kind == "embedding":
        model["b"] = nn.Embedding(4, 4)
        model["b"].weight = a.weight
    elif kind == "parameter":
        model.register_parameter("free", a.weight)
    elif kind == "groups":
        model["a"] = nn.Conv1d(4, 4, 1, bias=False)
        model["b"] = nn.Conv1d(8, 4, 1, groups=2, bias=False)
        model["b"].weight = model["a"].weight
    elif kind == "parametrized":
        parametrizations.orthogonal(b)
    elif kind == "bias parametrized":
        parametrize.register_parametrization(b, "bias", nn.Identity())
    elif kind == "weight norm":
        parametrizations.weight_norm(b)
    elif kind == "spectral norm":
        nn.utils.spectral_norm(b)
    elif kind == "pruned":
        prune.identity(b, "weight")
    elif kind == "lazy":
        model["b"] = nn.LazyLinear(3)
    elif kind == "complex":
        model["b"] = nn.Linear(4, 4, dtype=torch.complex64)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    ("kind", "message", "skip"),
    [
        ("biases", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("only bias", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("embedding", "a, b: expected a weight and bias that belong to one layer", ["a"]),
        ("under another name", "a: expected a weight and bias that belong to one layer", ["a"]),
        ("parameter", "a: expected a weight and bias that belong to one layer", ["a"]),
        ("groups", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("parametrized", "b: expected weight to be a parameter of the layer, got one that is computed", ["b"]),
        ("bias parametrized", "b: expected bias to be a parameter of the layer", ["b"]),
        ("weight norm", "b: expected weight to be a parameter of the layer", ["b"]),
        ("spectral norm", "b: expected weight to be a parameter of the layer", ["b"]),
        ("pruned", "b: expected weight to be a parameter of the layer", ["b"]),
        ("lazy", "b: expected an initialized layer, got LazyLinear, whose weight has no shape", ["b"]),
        ("complex", "b: expected weight in float16, .* got torch.complex64; put the layer in skip", ["b"]),
    ],
)
def test_layers_it_refuses(kind: str, message: str, skip: list[str]) -> None:
    model = tied(kind)
    with pytest.raises(ValueError, match=message):
        BNP(model)
    assert "c" in BNP(model, skip=skip).state_dict()


def test_a_layer_is_skipped_with_those_that_share_its_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    with pytest.raises(ValueError, match="0, 1: expected a weight and bias that belong to one layer"):
        BNP(model, skip=["1"])
    assert list(BNP(model, skip=["0", "1"]).state_dict()) == ["2"]


def test_a_second_bnp() -> None:
    model = network()
    BNP(model, skip=["0"])
    with pytest.raises(
        ValueError, match=re.escape("model: expected layers without BNP, got one on 3; remove() it first")
    ):
        BNP(model)
    BNP(model, skip=["3"])


def test_conv_norm_and_transposed_convolutions_are_no_layers() -> None:
    import normkernels as nk

    model = nn.Sequential(nk.ConvNorm2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 2, 1))
    assert list(BNP(model).state_dict()) == ["2"]


def test_multihead_attention_keeps_the_gradients_of_its_projection() -> None:
    """Its out_proj is a Linear that is never called."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    bnp = BNP(model)
    x = torch.randn(5, 3, 8, generator=inputs.generator(0))
    model["head"](model["attention"](x, x, x)[0]).sin().sum().backward()
    projection: Any = model["attention"].out_proj
    before = projection.weight.grad.clone()
    bnp.step()
    assert torch.equal(projection.weight.grad, before)


def test_weights_tied_after_bnp_was_made() -> None:
    """The one gradient of two layers would be preconditioned twice."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    bnp = BNP(model)
    model[1].weight = model[0].weight
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="1: expected a weight of its own, got that of 0"):
        bnp.step()
