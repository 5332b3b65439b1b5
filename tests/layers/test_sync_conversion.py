"""Synchronized layers in one process: conversion, checkpoints, signatures, and errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import normkernels as nk

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def test_training_without_a_process_group() -> None:
    x = torch.randn(4, 8, 3, 3)
    for layer in (nk.SyncIterNorm(8), nk.SyncDBN(8)):
        name = type(layer).__name__
        with pytest.raises(RuntimeError, match=rf"{name}\(8, .*expected torch.distributed.init_process_group"):
            layer(x)
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.eval()(x), x)  # evaluation needs no process group


def test_process_group_of_another_type() -> None:
    for group in ("default", 0, [0, 1], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(
            TypeError, match=r"process_group: expected None or a torch\.distributed\.ProcessGroup .*, got"
        ):
            nk.SyncIterNorm(8, process_group=group)
        layer = nk.SyncDBN(8)
        with pytest.raises(TypeError, match="process_group"):
            layer.process_group = group
        model = nn.Sequential(nk.IterNorm2d(8))
        with pytest.raises(TypeError, match="process_group"):
            nk.SyncIterNorm.convert_sync_iternorm(model, group)
        assert type(model[0]) is nk.IterNorm2d


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (8,), (1, 8, 1, 1, 1, 1)])
def test_input_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        nk.SyncIterNorm(8)(torch.randn(shape))


def test_conversion_keeps_everything() -> None:
    shared = nk.IterNorm1d(8, 4, num_iterations=3, scaling="frobenius", momentum=None)
    model = nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(shared, nk.DBN2d(8), nk.IterNorm3d(8)), "c": nn.BatchNorm2d(8)}
    )
    calls: list[str] = []
    shared.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = dict(model.named_modules(remove_duplicate=False))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = repr(shared).partition("(")[2]

    model.eval()
    assert nk.SyncIterNorm.convert_sync_iternorm(model) is model
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert [type(m) for m in (model["a"], *model["b"], model["c"])] == [
        nk.SyncIterNorm, nk.SyncIterNorm, nk.SyncDBN, nk.SyncIterNorm, nn.BatchNorm2d,
    ]  # fmt: skip
    assert repr(shared) == f"SyncIterNorm({options}"
    assert not shared.training and shared.process_group is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model["a"](torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert calls == ["hook"] and (shared.bias == -3.0).all()
    assert nk.SyncIterNorm.convert_sync_iternorm(model) is model  # once more changes nothing
    assert type(shared) is nk.SyncIterNorm

    assert isinstance(nk.SyncIterNorm.convert_sync_iternorm(nk.DBN1d(8)), nk.SyncDBN)


def test_conversion_with_nothing_to_convert() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="module: expected IterNorm or DBN layers in it, got none in Sequential"):
        nk.SyncIterNorm.convert_sync_iternorm(model)


class Frozen(nk.IterNorm2d):
    """A subclass that does something else, which another class would not do."""


@pytest.mark.parametrize(
    "made", [lambda: Frozen(8), lambda: nn.utils.parametrizations.weight_norm(nk.DBN2d(8))], ids=["own", "parametrized"]
)
def test_conversion_of_a_subclass_is_refused(made: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nk.IterNorm2d(8), made())
    before = type(model[1])
    with pytest.raises(ValueError, match=rf"'1': expected IterNorm1d, .*, got {before.__name__}, which may do more"):
        nk.SyncIterNorm.convert_sync_iternorm(model)
    assert type(model[0]) is nk.IterNorm2d and type(model[1]) is before
    with pytest.raises(TypeError, match=r"module: expected nn\.Module, got int"):
        nk.SyncIterNorm.convert_sync_iternorm(5)  # type: ignore[arg-type]


def test_conversion_without_a_group_keeps_the_groups_that_there_are() -> None:
    model = nn.Sequential(nk.SyncIterNorm(8), nk.IterNorm2d(8))
    model[0]._group_name = "some"
    nk.SyncIterNorm.convert_sync_iternorm(model)
    assert model[0]._group_name == "some" and model[1]._group_name is None


def test_checkpoints_are_those_of_the_plain_layers() -> None:
    x = torch.randn(6, 8, 5, 3)
    for plain, layer in ((nk.IterNorm2d(8, 4), nk.SyncIterNorm(8, 4)), (nk.DBN2d(8, 4), nk.SyncDBN(8, 4))):
        plain(x)
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.eval()(x), plain.eval()(x))
        back = type(plain)(8, 4)
        back.load_state_dict(layer.state_dict())
        assert torch.equal(back.eval()(x), plain(x))


def test_signature_is_the_plain_layer_s_and_a_process_group() -> None:
    layer = nk.SyncIterNorm(8, 4, 3, 1e-3, None, False, False, scaling="frobenius", process_group=None)
    plain = nk.IterNorm2d(8, 4, 3, 1e-3, None, False, False, scaling="frobenius")
    assert repr(layer).partition("(")[2] == repr(plain).partition("(")[2]
    with pytest.raises(ValueError, match="group_size: expected a divisor"):
        nk.SyncIterNorm(8, 3)
    for kind, other in ((nk.SyncIterNorm, nk.IterNorm2d), (nk.SyncDBN, nk.DBN2d)):
        own, like = (list(inspect.signature(each).parameters.values()) for each in (kind, other))
        assert own[:-1] == like and own[-1].name == "process_group"
