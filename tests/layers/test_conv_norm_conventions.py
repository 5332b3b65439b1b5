"""ConvNorm as a drop-in: nn.Conv's conventions, memory formats, autocast, compilation, bad input."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.layers.conv_norm_checks import (
    AXES,
    CONVS,
    DETACH,
    LAYERS,
    NAMES,
    agree,
    build,
    check,
    edit_data,
    edit_in_place,
    parameters,
    plane,
    result,
)
from tests.oracles import convnorm
from tests.oracles.convnorm import Config
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_within, largest
from tests.tolerances.spectral import assert_conv_norm, conv_norm_floors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


# nn.Conv's conventions.


@AXES
def test_signature_is_convs(axes: int) -> None:
    """Names, order and defaults are those of nn.Conv, then keywords only."""
    ours = list(inspect.signature(LAYERS[axes]).parameters.values())
    theirs = list(inspect.signature(CONVS[axes]).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert {p.name: p.default for p in ours[len(theirs) :]} == {"affine": True, "eps": 1e-8, "detach_spectrum": True}
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@AXES
def test_names_and_shapes(axes: int) -> None:
    layer, conv = LAYERS[axes](6, 4, 3, groups=2), CONVS[axes](6, 4, 3, groups=2)
    assert list(layer.state_dict()) == list(NAMES) and not list(layer.buffers())
    for name in ("weight", "bias"):
        assert getattr(layer, name).shape == getattr(conv, name).shape
    assert layer.affine_weight.shape == (4, 1, *[3] * axes)
    assert all(isinstance(getattr(layer, name), nn.Parameter) for name in NAMES)
    bare = LAYERS[axes](6, 4, 3, bias=False, affine=False)
    assert list(bare.state_dict()) == ["weight"] and bare.bias is None and bare.affine_weight is None


@AXES
def test_initial_weight_is_convs(axes: int) -> None:
    """The draws are the same, so that a seed gives the same network with either layer."""
    torch.manual_seed(5)
    layer = LAYERS[axes](3, 4, 3)
    torch.manual_seed(5)
    conv = CONVS[axes](3, 4, 3)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


@AXES
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_checkpoint(axes: int, bias: bool, assign: bool) -> None:
    """It loads strictly, inside a network: the affine kernel becomes the identity. The dict stays as it was."""
    source: Any = nn.Sequential(CONVS[axes](3, 4, 3, bias=bias), nn.ReLU())
    target: Any = nn.Sequential(build(3, 4, 3, axes=axes, bias=bias), nn.ReLU())
    state = source.state_dict()
    keys = list(state)
    target.load_state_dict(state, assign=assign)
    assert list(state) == keys
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[0].affine_weight, LAYERS[axes](3, 4, 3).affine_weight)
    assert target[0].affine_weight.requires_grad
    bare = LAYERS[axes](3, 4, 3, bias=bias, affine=False)
    bare.load_state_dict(source[0].state_dict())


@AXES
def test_state_dict_round_trip(axes: int) -> None:
    """The spectrum of an evaluation is no part of the state_dict."""
    layer, other = build(3, 4, 3, axes=axes).eval(), LAYERS[axes](3, 4, 3).eval()
    x = plane(2, 3, *(9, 8)[:axes])
    y = layer(x)
    other(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("key", ["weight", "affine_weight"])
def test_checkpoint_of_another_shape_is_an_error(key: str) -> None:
    layer = build(3, 4, 3)
    with pytest.raises(RuntimeError, match=key):
        layer.load_state_dict(layer.state_dict() | {key: torch.ones(4, 3, 5, 5)})


@AXES
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("training", [True, False])
def test_copies(axes: int, how: Any, training: bool) -> None:
    """A layer that remembers a spectrum is copied, with and without a graph; the copy goes on by itself."""
    layer, x = build(3, 4, 3, axes=axes).train(training), plane(2, 3, *(9, 8)[:axes])
    y = layer(x)
    twin = how(layer)
    assert repr(twin) == repr(layer) and torch.equal(twin(x), y)
    edit_in_place(twin)
    assert not torch.allclose(twin(x), y) and torch.equal(layer(x), y)


@AXES
def test_unbatched(axes: int) -> None:
    layer = build(3, 4, 3, Config(padding=1), axes=axes)
    x = plane(1, 3, *(9, 8)[:axes])
    assert layer(x[0]).shape == (4, *(9, 8)[:axes])
    agree(layer(x[0])[None], layer(x), layer, x, Config(padding=1))


@AXES
def test_empty_batch(axes: int) -> None:
    layer = build(3, 4, 3, Config(padding=1), axes=axes)
    x = torch.empty(0, 3, *(9, 8)[:axes], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4, *(9, 8)[:axes]) and x.grad is not None and x.grad.shape == x.shape
    assert not layer.weight.grad.any() and not layer.bias.grad.any() and not layer.affine_weight.grad.any()


@AXES
@pytest.mark.parametrize("training", [True, False])
def test_meta_device_and_types(axes: int, training: bool) -> None:
    layer: Any = LAYERS[axes](3, 4, 3, device="meta", dtype=torch.float64).train(training)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.affine_weight, LAYERS[axes](3, 4, 3, dtype=torch.float64).affine_weight)
    assert layer(plane(2, 3, *(9, 8)[:axes], dtype=torch.float64)).dtype == torch.float64


@AXES
def test_repr(axes: int) -> None:
    """The text is that of nn.Conv, with what is not a default of ours."""
    text = repr(LAYERS[axes](6, 4, 3, stride=2, affine=False, eps=0.01, detach_spectrum=False))
    for part in (f"ConvNorm{axes}d(6, 4", "stride=", "affine=False", "eps=0.01", "detach_spectrum=False"):
        assert part in text


# Memory formats, autocast, compilation.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [Config(1, 1), Config(2, 0), Config(1, 4), Config(1, "same")], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_channels_last_is_kept(affine: bool, config: Config, training: bool) -> None:
    layer = build(8, 6, 3, config, affine=affine).train(training)
    x = plane(3, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert layer(x.contiguous()).is_contiguous()
    check(layer, x, config)
    check(layer.to(memory_format=torch.channels_last), x, config)


@AXES
@DETACH
@pytest.mark.parametrize("training", [True, False])
def test_autocast(axes: int, detach: bool, training: bool) -> None:
    """The layer follows nn.Conv into bfloat16, its spectrum and filter do not: y is as good as the plain path's."""
    config = Config(stride=2, padding=1, detach_spectrum=detach)
    layer = build(16, 8, 3, config, axes=axes).train(training)
    x = plane(2, 16, *(13, 12)[:axes])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        for _ in range(2):  # from the cache, and of half-type activations
            assert layer(x.bfloat16()).dtype == y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    given = [t.bfloat16() for t in parameters(layer)]
    exact = convnorm.conv_norm(x.double(), config, *[t.double() for t in parameters(layer)])
    plain = convnorm.conv_norm(x.bfloat16(), config, *given)
    floors = conv_norm_floors(x.bfloat16(), given, config, exact, exact)
    # Besides what floors counts, x and the parameters were rounded to bfloat16 here.
    assert_within("y", y.detach(), exact, plain, 2 * floors.y, largest(exact))


def test_autocast_of_a_network() -> None:
    """The network needs no cast by hand between the layers, and trains a step."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nk.ConvNorm2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(plane(4, 3, 9, 9)).float().square().mean()
    loss.backward()
    assert seen[0].dtype == seen[1].dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("axes", "detach", "stride"), [(1, False, 1), (1, True, 2), (2, False, 2), (2, True, 1)])
def test_compiles_without_graph_breaks(axes: int, detach: bool, stride: int) -> None:
    """The layer compiles in training, in evaluation, and after the weights changed under the compiled module."""
    torch.compiler.reset()
    config = Config(stride=stride, padding=1, detach_spectrum=detach)
    layer, x = build(3, 4, 3, config, axes=axes), plane(2, 3, *(9, 8)[:axes])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    dy = incoming_gradient(layer(x))

    def compare() -> None:
        expected = result(layer, x, dy)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.backward(dy)
        floors = conv_norm_floors(x, parameters(layer), config, dy, expected[0], expected[1:])
        got = [y.detach(), leaf.grad, *(getattr(layer, n).grad for n in NAMES)]
        floors = replace(floors, **{k: 2 * v for k, v in floors.__dict__.items()})
        assert_conv_norm(got, [t.double() for t in expected], [None] * 5, floors)

    compare()
    layer.eval()
    compare()
    for edit in (edit_in_place, edit_data):
        edit(layer)
        compare()
        with torch.no_grad():
            agree(compiled(x), layer(x), layer, x, config)


def test_compiled_under_autocast() -> None:
    torch.compiler.reset()
    layer, x = build(8, 4, 3, Config(padding=1)), plane(2, 8, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    given: Any = [t.bfloat16() for t in parameters(layer)]
    floors = conv_norm_floors(x.bfloat16(), given, Config(padding=1), expected, expected.double())
    assert_within("y", y.detach(), expected.detach().double(), None, 2 * floors.y, largest(expected))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_with_dynamic_shapes(training: bool) -> None:
    """Batch and plane may be symbols."""
    torch.compiler.reset()
    config = Config(stride=2, padding=1)
    layer = build(3, 4, 3, config).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 9, 8), (3, 3, 13, 11), (2, 3, 16, 7)):
        x = plane(*shape)
        agree(compiled(x), layer(x), layer, x, config)


# Bad input.


@AXES
@pytest.mark.parametrize("stride", [2, 3])
def test_same_needs_stride_1(axes: int, stride: int) -> None:
    with pytest.raises(ValueError, match="same"):
        LAYERS[axes](3, 4, 3, stride=stride, padding="same")


@pytest.mark.parametrize(
    ("arguments", "expected", "got"),
    [
        ({"in_channels": 6, "groups": 4}, "6", "4"),
        ({"out_channels": 9, "groups": 2}, "9", "2"),
        ({"groups": 0}, "groups", "0"),
        ({"padding": "some"}, "same", "some"),
        ({"padding_mode": "mirror"}, "reflect", "mirror"),
        ({"eps": -1.0}, "eps", "-1"),
    ],
    ids=str,
)
def test_wrong_construction(arguments: dict[str, Any], expected: str, got: str) -> None:
    with pytest.raises(ValueError) as raised:
        nk.ConvNorm2d(**({"in_channels": 6, "out_channels": 8, "kernel_size": 3} | arguments))
    assert expected in str(raised.value) and got in str(raised.value)


WRONG = {
    "channels": (torch.randn(2, 5, 9, 8), ValueError, "6", "5"),
    "rank-2": (torch.randn(9, 8), ValueError, "4D", "2D"),
    "rank-5": (torch.randn(2, 6, 9, 8, 7), ValueError, "4D", "5D"),
    "integer": (torch.ones(2, 6, 9, 8, dtype=torch.int32), TypeError, "float32", "int32"),
    "complex": (torch.ones(2, 6, 9, 8, dtype=torch.complex64), TypeError, "float32", "complex64"),
    "not-a-tensor": ([[1.0]], TypeError, "Tensor", "list"),
    "too-low": (torch.randn(2, 6, 2, 8), ValueError, "5", "2"),
    "too-narrow": (torch.randn(2, 6, 9, 1), ValueError, "5", "1"),
    "empty-plane": (torch.randn(2, 6, 0, 8), ValueError, "5", "0"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what: str, training: bool) -> None:
    """With 5 x 5 and padding 1 a plane of 2 is padded to 4. Nothing is remembered of a failed call."""
    x, error, expected, got = WRONG[what]
    layer, good = build(6, 4, 5, Config(padding=1)).train(training), plane(2, 6, 9, 8)
    y, before = layer(good), {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error) as raised:
        layer(x)
    assert expected in str(raised.value) and got in str(raised.value)
    assert list(layer.state_dict()) == list(before) and not list(layer.buffers())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer(good), y)


@pytest.mark.parametrize("training", [True, False])
def test_other_ranks_are_refused_in_one_dimension(training: bool) -> None:
    layer = build(6, 4, 3, axes=1).train(training)
    for x in (torch.randn(6), torch.randn(2, 6, 9, 8)):
        with pytest.raises(ValueError, match=rf"3D.*{x.ndim}D"):
            layer(x)
    with pytest.raises(ValueError) as raised:
        layer(torch.randn(2, 5, 9))
    assert "6" in str(raised.value) and "5" in str(raised.value)


@pytest.mark.parametrize("name", ["bias", "affine", "detach_spectrum"])
@pytest.mark.parametrize("value", ["no", None, 2])
def test_flags_are_true_or_false(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected True or False, got {value!r}"):
        nk.ConvNorm2d(3, 4, 3, **{name: value})
