"""nn.BatchNorm's conventions: construction, state, copies, conversion between types and devices."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.tolerances import assert_agree

WHITENING = [nk.IterNorm1d, nk.IterNorm2d, nk.IterNorm3d, nk.DBN1d, nk.DBN2d, nk.DBN3d]
LAYERS = [*WHITENING, nk.POPNorm1d, nk.POPNorm2d, nk.POPNorm3d]
EVERY_LAYER = pytest.mark.parametrize("layer_type", LAYERS, ids=lambda t: t.__name__)
EVERY_WHITENING = pytest.mark.parametrize("layer_type", WHITENING, ids=lambda t: t.__name__)
BATCHNORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def rank(layer_type: type) -> int:
    return int(layer_type.__name__[-2])


def keys(layer_type: type) -> list[str]:
    """Return the keys of the state_dict, in its order."""
    second = "running_whitening" if layer_type in WHITENING else "running_var"
    return ["weight", "bias", "running_mean", second, "num_batches_tracked"]


def second(layer: nn.Module) -> Tensor:
    """Return the running statistic beside the mean."""
    return layer.get_buffer(keys(type(layer))[3])


def build(layer_type: Any, **options: Any) -> Any:
    """Build a layer of 8 channels, whitened in groups of 4."""
    return layer_type(**{"num_features": 8} | ({"group_size": 4} if layer_type in WHITENING else {}) | options)


def batch(layer_type: type, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(6, 8, *[3] * rank(layer_type), generator=generator) + 1).to(dtype)


def trained(layer_type: Any, **options: Any) -> Any:
    layer = build(layer_type, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 2, 8))
            layer.bias.copy_(torch.linspace(3, 1, 8))
    for seed in range(3):
        layer(batch(layer_type, seed, torch.get_default_dtype()))
    return layer


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


# Construction.


@EVERY_LAYER
def test_names_shapes_and_initial_values(layer_type: type) -> None:
    layer = build(layer_type)
    assert list(layer.state_dict()) == keys(layer_type)
    assert torch.equal(layer.weight, torch.ones(8)) and torch.equal(layer.bias, torch.zeros(8))
    assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.bias, nn.Parameter)
    assert torch.equal(layer.running_mean, torch.zeros(8))
    assert torch.equal(second(layer), torch.eye(4).repeat(2, 1, 1) if layer_type in WHITENING else torch.ones(8))
    assert layer.num_batches_tracked == 0 and layer.num_batches_tracked.dtype == torch.int64
    assert layer.training


@pytest.mark.parametrize("d", [1, 2, 3])
def test_positional_arguments(d: int) -> None:
    """num_features and the whitening's own options come first, then eps, momentum and the rest in BatchNorm's order."""
    iter_norm = getattr(nk, f"IterNorm{d}d")(
        12, 6, 3, 1e-4, 0.2, False, False, "cpu", torch.float64, scaling="frobenius"
    )
    dbn = getattr(nk, f"DBN{d}d")(12, 6, 1e-4, 0.2, True, False, "cpu", torch.float64)
    pop = getattr(nk, f"POPNorm{d}d")(12, 2.0, 1e-4, 0.2, False, False, scale=False, device="cpu", dtype=torch.float64)
    assert iter_norm.group_size == dbn.group_size == 6
    for layer in (iter_norm, dbn, pop):
        assert (layer.num_features, layer.eps, layer.momentum) == (12, 1e-4, 0.2)
        assert layer.track_running_stats is False
    assert (pop.kappa, pop.affine, pop.center, pop.scale) == (2.0, False, True, False)
    assert (iter_norm.num_iterations, iter_norm.scaling, iter_norm.affine) == (3, "frobenius", False)
    assert dbn.affine is True and dbn.weight.dtype == torch.float64


@pytest.mark.parametrize("d", [1, 2, 3])
def test_defaults(d: int) -> None:
    iter_norm, dbn, pop = (getattr(nk, f"{name}{d}d")(128) for name in ("IterNorm", "DBN", "POPNorm"))
    assert (iter_norm.group_size, iter_norm.num_iterations, iter_norm.eps, iter_norm.scaling) == (64, 5, 1e-5, "trace")
    assert (dbn.group_size, dbn.eps) == (16, 1e-3)
    assert (pop.kappa, pop.eps, pop.center, pop.scale) == (4.0, 1e-5, True, True)
    for layer in (iter_norm, dbn, pop):
        assert layer.momentum == 0.1 and layer.affine and layer.track_running_stats


@EVERY_WHITENING
def test_wider_groups_than_the_layer_mean_one_group(layer_type: type) -> None:
    layer = layer_type(8, group_size=64)
    assert layer.running_whitening.shape == (1, 8, 8)
    assert torch.equal(layer(batch(layer_type)), layer_type(8, group_size=8)(batch(layer_type)))


WRONG = {
    "no-features": ({"num_features": 0}, ValueError, "at least 1", "0"),
    "negative-features": ({"num_features": -8}, ValueError, "at least 1", "-8"),
    "fractional-features": ({"num_features": 8.0}, TypeError, "int", "8.0"),
    "negative-eps": ({"eps": -1e-5}, ValueError, "at least 0", "-1e-05"),
    "nan-eps": ({"eps": float("nan")}, ValueError, "at least 0", "nan"),
    "large-momentum": ({"momentum": 1.5}, ValueError, "[0, 1]", "1.5"),
    "negative-momentum": ({"momentum": -0.1}, ValueError, "[0, 1]", "-0.1"),
    "nan-momentum": ({"momentum": float("nan")}, ValueError, "[0, 1]", "nan"),
    "string-momentum": ({"momentum": "0.1"}, TypeError, "number", "'0.1'"),
    "integer-type": ({"dtype": torch.int64}, TypeError, "float32", "int64"),
    "complex-type": ({"dtype": torch.complex64}, TypeError, "float32", "complex64"),
}
WRONG_WHITENING = {
    "non-divisor": ({"num_features": 12, "group_size": 5}, ValueError, "1, 2, 3, 4, 6, 12", "5"),
    "no-group": ({"group_size": 0}, ValueError, "at least 1", "0"),
    "negative-group": ({"group_size": -1}, ValueError, "at least 1", "-1"),
}
WRONG_NEWTON = {
    "negative-T": ({"num_iterations": -1}, ValueError, "at least 0", "-1"),
    "fractional-T": ({"num_iterations": 2.5}, TypeError, "int", "2.5"),
    "scaling": ({"scaling": "max"}, ValueError, "trace, frobenius", "'max'"),
}
WRONG_POP_NORM = {
    "small-kappa": ({"kappa": 0.5}, ValueError, "at least 1", "0.5"),
    "nan-kappa": ({"kappa": float("nan")}, ValueError, "at least 1", "nan"),
    "infinite-kappa": ({"kappa": float("inf")}, ValueError, "finite", "inf"),
    "string-kappa": ({"kappa": "4"}, TypeError, "number", "'4'"),
    "string-center": ({"center": "no"}, TypeError, "True or False", "'no'"),
    "string-scale": ({"scale": "no"}, TypeError, "True or False", "'no'"),
    "nothing": ({"center": False, "scale": False}, ValueError, "at least one", "False"),
}
OWN_WRONG = {"Iter": {**WRONG_WHITENING, **WRONG_NEWTON}, "DBN": WRONG_WHITENING, "POP": WRONG_POP_NORM}
CASES = [
    (layer_type, what, case)
    for layer_type in LAYERS
    for start, own in OWN_WRONG.items()
    if layer_type.__name__.startswith(start)
    for what, case in {**WRONG, **own}.items()
]


@pytest.mark.parametrize(("layer_type", "what", "case"), CASES, ids=[f"{t.__name__}-{k}" for t, k, _ in CASES])
def test_wrong_arguments(layer_type: type, what: str, case: tuple[dict[str, Any], type[Exception], str, str]) -> None:
    options, error, expected, got = case
    with pytest.raises(error) as raised:
        build(layer_type, **options)
    assert expected in str(raised.value) and got in str(raised.value)


@EVERY_LAYER
def test_without_affine(layer_type: type) -> None:
    layer, with_identity = build(layer_type, affine=False), build(layer_type)
    assert layer.weight is None and layer.bias is None and not list(layer.parameters())
    assert list(layer.state_dict()) == keys(layer_type)[2:]
    x = batch(layer_type)
    assert_agree(layer(x), with_identity(x))
    assert_agree(layer.eval()(x), with_identity.eval()(x))


@EVERY_LAYER
def test_repr(layer_type: type) -> None:
    """The text has enough to build the layer again."""
    layer = build(layer_type, eps=0.01, momentum=None, affine=False)
    text = repr(layer)
    for part in (f"{layer_type.__name__}(8", "eps=0.01", "momentum=None", "affine=False", "track_running_stats=True"):
        assert part in text
    own = ("group_size=4",) if layer_type in WHITENING else ("kappa=4.0", "center=True", "scale=True")
    assert all(part in text for part in own)
    if "Iter" in layer_type.__name__:
        assert "num_iterations=5" in text and "scaling=" in text and "trace" in text


@EVERY_LAYER
def test_not_a_batchnorm(layer_type: type) -> None:
    """convert_sync_batchnorm replaces whatever inherits from _BatchNorm; our layers must survive it."""
    layer = build(layer_type)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer, nn.BatchNorm2d(8)))
    assert converted[0] is layer and isinstance(converted[1], nn.SyncBatchNorm)


# State.


@EVERY_LAYER
def test_state_dict_round_trip(layer_type: type) -> None:
    layer, other = trained(layer_type), build(layer_type)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(layer, other)
    x = batch(layer_type)
    assert torch.equal(layer.eval()(x), other.eval()(x))


@EVERY_LAYER
def test_state_dict_is_versioned(layer_type: type) -> None:
    layer = build(layer_type)
    assert isinstance(layer._version, int) and layer._version >= 1
    assert layer.state_dict()._metadata[""]["version"] == layer._version


@EVERY_WHITENING
def test_loading_another_group_size_is_an_error(layer_type: type) -> None:
    with pytest.raises(RuntimeError, match="running_whitening"):
        layer_type(8, group_size=2).load_state_dict(trained(layer_type).state_dict())


@EVERY_WHITENING
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_batchnorm_checkpoint(layer_type: type, group_size: int, assign: bool) -> None:
    """It loads strictly, and inference is what it was: the whitening matrix is diag(1 / sqrt(var + eps))."""
    eps = layer_type(8).eps
    source = BATCHNORM[rank(layer_type)](8, eps=eps)
    with torch.no_grad():
        source.weight.copy_(torch.linspace(-1, 2, 8))
        source.bias.copy_(torch.linspace(3, 1, 8))
    for seed in range(3):
        source(batch(layer_type, seed))
    layer = layer_type(8, group_size=group_size)
    state = source.state_dict()
    layer.load_state_dict(state, assign=assign)
    assert list(state) == list(source.state_dict())  # the caller's dict is not changed
    assert layer.num_batches_tracked == 3
    x = batch(layer_type, 5)
    assert_agree(layer.eval()(x), source.eval()(x))


def test_batchnorm_checkpoint_inside_a_network() -> None:
    """It loads with prefixes, and into a layer that already saw other data."""
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    target = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nk.IterNorm2d(8, 4), nn.ReLU()))
    x = torch.randn(5, 3, 7, 7)
    target(x + 1)
    source(x)
    target.load_state_dict(source.state_dict())
    assert_agree(target.eval()(x), source.eval()(x))


@EVERY_LAYER
def test_batchnorm_checkpoint_of_another_width_is_an_error(layer_type: type) -> None:
    layer = build(layer_type)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError):
        layer.load_state_dict(BATCHNORM[rank(layer_type)](6).state_dict())
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in state.items())


@EVERY_LAYER
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies(layer_type: type, how: Any) -> None:
    """A copy goes on by itself."""
    layer = trained(layer_type)
    twin = how(layer)
    assert same_state(layer, twin) and repr(layer) == repr(twin)
    x = batch(layer_type, 7)
    assert torch.equal(layer(x), twin(x)) and same_state(layer, twin)
    twin(x)
    assert layer.num_batches_tracked == 4 and twin.num_batches_tracked == 5
    assert not torch.equal(layer.running_mean, twin.running_mean)


@EVERY_LAYER
def test_functional_call(layer_type: type) -> None:
    """torch.func.functional_call takes parameters and buffers from elsewhere, as in model averaging."""
    layer, other = build(layer_type).eval(), trained(layer_type).eval()
    x = batch(layer_type)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(layer, state, x), other(x))


# Types and devices.


@EVERY_LAYER
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to-half", "constructor"])
def test_half_types_keep_float32_statistics(layer_type: type, cast: str) -> None:
    """Rounding a whitening matrix to a half type changes the function; the buffers do not even lose bits on the way."""
    dtype = torch.bfloat16 if cast == "bfloat16" else torch.float16
    if cast == "constructor":
        layer = build(layer_type, dtype=dtype)
    else:
        layer = trained(layer_type)
        before = second(layer).clone()
        layer = layer.to(dtype) if cast == "to-half" else getattr(layer, cast)()
        assert torch.equal(second(layer), before)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean.dtype == second(layer).dtype == torch.float32
    assert layer.num_batches_tracked.dtype == torch.int64
    assert list(dict(layer.named_buffers())) == keys(layer_type)[2:]
    x = batch(layer_type, dtype=dtype)
    assert layer(x).dtype == layer.eval()(x).dtype == dtype


@EVERY_LAYER
def test_double(layer_type: type) -> None:
    """The layer is float64 throughout, and goes back."""
    layer = trained(layer_type).double()
    assert all(t.dtype == torch.float64 for k, t in layer.state_dict().items() if k != "num_batches_tracked")
    assert layer(batch(layer_type).double()).dtype == torch.float64
    assert layer.half().running_mean.dtype == torch.float32
    assert layer.float()(batch(layer_type)).dtype == torch.float32


def test_cast_of_a_whole_network() -> None:
    """A parent's .half() reaches the layer by another road than its own."""
    net = nn.Sequential(nn.Sequential(trained(nk.IterNorm2d)), nn.Conv2d(8, 8, 1)).half()
    assert net[0][0].running_whitening.dtype == torch.float32 and net[0][0].weight.dtype == torch.float16
    assert net(batch(nk.IterNorm2d, dtype=torch.float16)).dtype == torch.float16


@EVERY_LAYER
def test_default_dtype(layer_type: type) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = trained(layer_type)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == layer.running_mean.dtype == second(layer).dtype == torch.float64


@EVERY_LAYER
def test_meta_device(layer_type: type) -> None:
    """A layer is built without memory, then materialized, as large models are."""
    layer = build(layer_type, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert same_state(layer, build(layer_type))
    with torch.device("meta"):
        assert second(build(layer_type)).is_meta


@EVERY_LAYER
def test_mismatched_parameters(layer_type: type) -> None:
    """A parameter of another length, type or device, put in by hand, is named, and no buffer changes."""
    x = batch(layer_type)
    for wrong, expected, got in (
        (torch.ones(7), "(8,)", "(7,)"),
        (torch.ones(1, 8), "(8,)", "(1, 8)"),
        (torch.ones(8, dtype=torch.float64), "float32", "float64"),
        (torch.ones(8, device="meta"), "cpu", "meta"),
    ):
        for training in (True, False):
            layer = trained(layer_type).train(training)
            before = {k: v.clone() for k, v in layer.named_buffers()}
            layer.weight = nn.Parameter(wrong)
            with pytest.raises((ValueError, TypeError)) as raised:
                layer(x)
            assert "weight" in str(raised.value) and expected in str(raised.value) and got in str(raised.value)
            assert all(torch.equal(v, before[k]) for k, v in layer.named_buffers())


@EVERY_LAYER
@pytest.mark.parametrize("name", ["affine", "track_running_stats"])
def test_flags_are_true_or_false(layer_type: type, name: str) -> None:
    """Any string counts as true, "no" as well, so strings are refused."""
    with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'no'"):
        build(layer_type, **{name: "no"})
    assert getattr(build(layer_type, **{name: 0}), name) == 0


GROUPED = [(t, {"group_size": d}) for t in WHITENING for d in (1, 4)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("layer_type", "options"), [*GROUPED, (nk.POPNorm1d, {}), (nk.POPNorm2d, {})])
def test_an_activation_in_place(layer_type: type, options: dict[str, Any], training: bool) -> None:
    """nn.ReLU(inplace=True) may stand behind it: autograd allows that only for a y that is no view."""
    layer = trained(layer_type, **options).train(training)
    x = batch(layer_type, 7)
    for layout in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        results = []
        for activation in (torch.relu, torch.relu_):
            leaf = layout.clone().requires_grad_()
            twin = copy.deepcopy(layer)
            y = activation(twin(leaf))
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *twin.parameters()])])
        assert_agree(*results)
