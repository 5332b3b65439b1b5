"""load_iternorm_state: checkpoints of the original implementation evaluate as they did there."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import load_iternorm_state
from tests.tolerances import assert_identity

SAMPLE = {1: (6, 8), 2: (6, 8, 4, 3), 3: (6, 8, 4, 3, 2)}  # and (N, C, L) below
AFFINE_SHAPES = [(1, 8), (1, 8, 1), (1, 8, 1, 1), (1, 8, 1, 1, 1)]


def entries(groups: int = 2, d: int = 4, shape: tuple[int, ...] = (1, 8, 1, 1), seed: int = 0) -> dict[str, Tensor]:
    """Draw the entries of a layer of 8 channels; each group has another W, not symmetric, to show a transposed one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"weight": shape, "bias": shape, "running_mean": (groups, d, 1), "running_wm": (groups, d, d)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def evaluation(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Compute section 3.3 with the buffers as the original keeps them, groups as rows: a channel at a time."""
    weight, bias = state["weight"].flatten(), state["bias"].flatten()
    mean, wm = state["running_mean"], state["running_wm"]
    groups, d, _ = wm.shape
    rows = []
    for k in range(groups * d):
        g = k // d
        terms = [wm[g, k % d, j] * (x[:, g * d + j] - mean[g, j, 0]) for j in range(d)]
        rows.append(weight[k] * torch.stack(terms).sum(0) + bias[k])
    return torch.stack(rows, 1)


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 8, 3), norm=nk.IterNorm2d(8, 4), act=nn.ReLU(), bn=nn.BatchNorm2d(8),
            head=nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 8), nk.IterNorm1d(8, 8)),
        )
    ).double()  # fmt: skip


def checkpoint(**changes: Any) -> dict[str, Any]:
    """Return a checkpoint of the network; a change to None drops the key."""
    torch.manual_seed(1)
    source = network()
    source(torch.randn(5, 3, 6, 6, dtype=torch.float64))
    state = OrderedDict((k, v.clone()) for k, v in source.state_dict().items() if not k.startswith(("norm", "head.2")))
    state |= {f"norm.{name}": value for name, value in entries().items()}
    state |= {f"head.2.{name}": value for name, value in entries(1, 8, (1, 8), seed=1).items()}
    state |= {key.replace("__", "."): value for key, value in changes.items()}
    return OrderedDict((key, value) for key, value in state.items() if value is not None)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("rank", SAMPLE)
@pytest.mark.parametrize("shape", AFFINE_SHAPES, ids=str)
@pytest.mark.parametrize("d", [1, 4, 8])
def test_it_evaluates_as_the_original(rank: int, shape: tuple[int, ...], d: int) -> None:
    layer = getattr(nk, f"IterNorm{rank}d")(8, d).double()
    state = entries(8 // d, d, shape)
    before = {key: value.clone() for key, value in state.items()}
    result = load_iternorm_state(layer, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert same(state, before)  # the caller's dict is not changed
    x = torch.randn(SAMPLE[rank], dtype=torch.float64) + 2
    assert_identity(layer.eval()(x), evaluation(x, state))
    if rank == 1:
        assert_identity(layer(x.unsqueeze(2).expand(-1, -1, 3)), evaluation(x.unsqueeze(2).expand(-1, -1, 3), state))


def test_a_whole_network() -> None:
    model, state = network(), checkpoint()
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    result = load_iternorm_state(model, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert model.norm.num_batches_tracked == model.head[2].num_batches_tracked == 2  # not in the checkpoint
    assert model.bn.num_batches_tracked == 1  # in it
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    model.eval()
    y = model.conv(x)
    z = model.head[:2](model.bn(torch.relu(evaluation(y, entries()))))
    assert_identity(model(x), evaluation(z, entries(1, 8, (1, 8), seed=1)))
    for name in ("conv.weight", "bn.running_var", "head.1.bias"):
        assert torch.equal(model.state_dict()[name], state[name])


def test_training_goes_on() -> None:
    """The loaded statistics are the first term of the moving average, with momentum as in the original."""
    layer = nk.IterNorm2d(8, 4, momentum=0.25).double()
    state = entries()
    load_iternorm_state(layer, state)
    x = torch.randn(SAMPLE[2], dtype=torch.float64)
    _, mean, W = nk.ops.iter_norm(x, 4)
    layer(x)
    assert_identity(layer.running_mean, 0.75 * state["running_mean"].flatten() + 0.25 * mean)
    assert_identity(layer.running_whitening, 0.75 * state["running_wm"] + 0.25 * W)


def test_type_of_the_model() -> None:
    """As in load_state_dict, values are rounded to the model's type, statistics to float32."""
    layer = nk.IterNorm2d(8, 4).half()
    state = entries()
    load_iternorm_state(layer, state)
    assert torch.equal(layer.weight, state["weight"].flatten().half())
    assert torch.equal(layer.running_whitening, state["running_wm"].float())


def test_without_affine() -> None:
    layer = nk.IterNorm2d(8, 4, affine=False).double()
    state = {key: value for key, value in entries().items() if key.startswith("running")}
    load_iternorm_state(layer, state)
    x = torch.randn(SAMPLE[2], dtype=torch.float64)
    ones = {"weight": torch.ones(8), "bias": torch.zeros(8)}
    assert_identity(layer.eval()(x), evaluation(x, state | ones))


def test_sync_iter_norm() -> None:
    """SyncIterNorm, which takes inputs of every rank, is loaded as IterNorm is."""
    layer = nk.SyncIterNorm(8, 4).double()
    load_iternorm_state(layer, entries())
    x = torch.randn(SAMPLE[2], dtype=torch.float64)
    assert_identity(layer.eval()(x), evaluation(x, entries()))


def test_shared_layer() -> None:
    """The layer has entries under both of its names, as in the state_dict of a shared module."""
    norm = nk.IterNorm2d(8, 4).double()
    model = nn.Sequential(norm, nn.ReLU(), norm)
    state = {f"{i}.{name}": value for i in (0, 2) for name, value in entries().items()}
    load_iternorm_state(model, state)
    x = torch.randn(SAMPLE[2], dtype=torch.float64)
    assert_identity(model.eval()(x), evaluation(torch.relu(evaluation(x, entries())), entries()))


def test_metadata_is_handed_on() -> None:
    """Modules read older checkpoints by the metadata: a BatchNorm of version 1 had no counter."""
    model, state = network(), checkpoint(bn__num_batches_tracked=None)
    with pytest.raises(RuntimeError, match=r"bn\.num_batches_tracked"):
        state._metadata = {"bn": {"version": 2}}  # type: ignore[attr-defined]
        load_iternorm_state(model, state)
    state._metadata = {"bn": {"version": 1}}  # type: ignore[attr-defined]
    assert load_iternorm_state(model, state).missing_keys == []


def test_strict() -> None:
    """Other modules are as in load_state_dict; a layer without any key is left alone if strict is False."""
    state = checkpoint(conv__bias=None, extra=torch.ones(1))
    result = load_iternorm_state(network(), state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["conv.bias"], ["extra"])
    with pytest.raises(RuntimeError, match=r"conv\.bias"):
        load_iternorm_state(network(), state)

    model = network()
    before = snapshot(model.norm)
    state = checkpoint(**{f"norm__{name}": None for name in entries()})
    result = load_iternorm_state(model, state, strict=False)
    assert result.missing_keys == [f"norm.{key}" for key in before]
    assert same(snapshot(model.norm), before)
    assert torch.equal(model.head[2].running_whitening, state["head.2.running_wm"])


two = entries(4, 2)
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "groups": (
        {"norm__running_mean": two["running_mean"], "norm__running_wm": two["running_wm"]},
        ["norm.running_mean", "(2, 4, 1)", "(4, 2, 1)", "group_size=4"],
    ),
    "groups-of-the-matrix": ({"norm__running_wm": two["running_wm"]}, ["norm.running_wm", "(2, 4, 4)", "(4, 2, 2)"]),
    "channels": ({"norm__weight": torch.ones(1, 6, 1, 1)}, ["norm.weight", "(1, 8, 1, 1)", "(1, 6, 1, 1)"]),
    "own-weight": ({"head__2__bias": torch.ones(8)}, ["head.2.bias", "(1, 8)", "(8,)"]),
    "no-mean": ({"norm__running_mean": None}, ["'norm'", "running_mean, running_wm for", "got weight, bias, runn"]),
    "no-matrix": ({"norm__running_wm": None}, ["'norm'", "running_wm", "got weight, bias, running_mean"]),
    "no-weight": ({"norm__weight": None}, ["'norm'", "weight, bias", "got bias"]),
    "nothing": ({f"norm__{name}": None for name in entries()}, ["'norm'", "weight, bias", "none"]),
    "at-batchnorm": ({"bn__running_wm": two["running_wm"]}, ["'bn'", "IterNorm", "BatchNorm2d"]),
    "at-no-module": ({"module__norm__running_wm": two["running_wm"]}, ["'module.norm'", "IterNorm", "no module"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "strict"), [(what, strict) for what in WRONG for strict in (True, False) if strict or what != "nothing"]
)
def test_wrong_checkpoints(what: str, strict: bool) -> None:
    """The error names what is wrong, and the model is as it was."""
    changes, parts = WRONG[what]
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        load_iternorm_state(model, checkpoint(**changes), strict=strict)
    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert same(snapshot(model), before)


def test_more_refusals() -> None:
    layer = nk.IterNorm2d(8, 4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"^'model': expected a checkpoint with weight, bias for IterNorm2d"):
        load_iternorm_state(layer, entries())
    with pytest.raises(ValueError, match=r"expected an IterNorm for .*'0\.running_wm', got DBN2d"):
        load_iternorm_state(nn.Sequential(nk.DBN2d(8, 4)), {f"0.{key}": value for key, value in entries().items()})
    with pytest.raises(ValueError, match=r"\(1, 64, 64\).*group_size=64.*\(2, 32, 32\)"):
        wide = {"running_mean": torch.zeros(1, 64, 1), "running_wm": torch.eye(32).repeat(2, 1, 1)}
        load_iternorm_state(nk.IterNorm2d(64, affine=False), wide)
    with pytest.raises(TypeError, match=r"'running_wm': expected a torch\.Tensor, got list"):
        load_iternorm_state(nk.IterNorm2d(8, 4), entries() | {"running_wm": [1.0]})
    with pytest.raises(
        ValueError, match=r"^'model': expected an IterNorm for the checkpoint's 'running_wm', got DBN2d"
    ):
        load_iternorm_state(nk.DBN2d(8, 4), entries())
    with pytest.raises(TypeError, match="state_dict: expected a mapping from names to tensors, got NoneType"):
        load_iternorm_state(layer, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict: expected a mapping from names to tensors, got the key 3"):
        load_iternorm_state(layer, {3: torch.ones(8)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"model: expected nn\.Module, got dict"):
        load_iternorm_state(entries(), entries())  # type: ignore[arg-type]


def test_the_layer_that_was_loaded_saves_its_own_checkpoint() -> None:
    model = network()
    load_iternorm_state(model, checkpoint())
    other = network()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(other.eval()(x), model.eval()(x))
