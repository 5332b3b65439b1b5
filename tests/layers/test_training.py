"""Layers in training loops: recomputed, repeated, scaled, skipped, replicated steps; parametrizations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import normkernels as nk
from tests.layers.networks import EVERY_NETWORK, batch, build, counters, loss_of, memory, norm_of, step
from tests.tolerances import assert_agree

# Activation checkpointing. The forward pass runs again in backward, and updates the running statistics again: momentum
# 0.1 twice with one batch. So it is for BatchNorm, and so it is here; a momentum of 1 - sqrt(1 - 0.1) makes up for it.


@EVERY_NETWORK
def test_activation_checkpointing(name: str) -> None:
    """Values and gradients are the same, and running statistics are those of two steps with the batch."""
    net, eager = build(name), build(name)
    expected = step(eager, batch())
    assert_agree(step(net, batch(), lambda x: checkpoint(net, x, use_reentrant=False)), expected)
    eager(batch())
    assert_agree(memory(net), memory(eager))
    assert counters(net) == [2] * len(counters(net))


def test_momentum_that_makes_up_for_checkpointing() -> None:
    net, eager = build("IterNorm2d"), build("IterNorm2d")
    norm_of(net).momentum = 1 - 0.9**0.5
    step(net, batch(), lambda x: checkpoint(net, x, use_reentrant=False))
    eager(batch())
    assert_agree(norm_of(net).running_whitening, norm_of(eager).running_whitening)


@EVERY_NETWORK
def test_gradient_accumulation(name: str) -> None:
    """As in BatchNorm, each part of a batch has statistics of its own, whichever order the passes come in."""
    net, interleaved, eager = build(name), build(name), build(name)
    halves = batch(samples=8).split((5, 3))
    for half in halves:
        loss_of(net(half)).backward()
    sum(loss_of(interleaved(half)) for half in halves).backward()  # type: ignore[union-attr]
    parts = [step(eager, half)[2:] for half in halves]
    expected = [a + b for a, b in zip(*parts, strict=True)]
    for model in (net, interleaved):
        assert_agree([p.grad for p in model.parameters()], expected)
        assert_agree(memory(model), memory(eager))
    assert counters(net) == [2] * len(counters(net))


# Mixed precision.


def scaled_step(net: nn.Module, x: Tensor, scaler: Any, optimizer: Any, spoil: float = 1.0) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(net(x)) * spoil
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@EVERY_NETWORK
def test_a_bad_step_is_skipped(name: str) -> None:
    """Gradients are infinite: the scale is halved, and only the batch's statistics are learned of that step."""
    net = build(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaled_step(net, batch(), scaler, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    assert scaler.get_scale() == 16
    scaled_step(net, batch(), scaler, optimizer, spoil=float("inf"))
    assert scaler.get_scale() == 8
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    scaled_step(net, batch(), scaler, optimizer)
    assert scaler.get_scale() == 8
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert counters(net) == [3] * len(counters(net))
    assert all(value.isfinite().all() for value in net.buffers())


@pytest.mark.parametrize("name", ["IterNorm2d", "DBN2d", "POPNorm2d"])
def test_an_overflowing_batch_leaves_no_trace(name: str) -> None:
    """Activations beyond float16 make the step NaN: nothing of it stays, where BatchNorm's statistics are lost."""
    net, plain = build(name), build("BatchNorm2d")
    for model in (net, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaled_step(model, batch(), scaler, optimizer)
        before = [value.clone() for value in model.state_dict().values()]
        scaled_step(model, batch() * 1e38, scaler, optimizer)
        assert scaler.get_scale() == 8
        if model is net:
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    assert not all(value.isfinite().all() for value in plain.buffers())
    assert net.eval()(batch()).isfinite().all()


# Replicas.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it replicates")
@EVERY_NETWORK
def test_data_parallel_without_devices(name: str) -> None:
    """DataParallel hands everything to the module."""
    net, eager = build(name), build(name)
    parallel = nn.DataParallel(net)
    assert_agree(step(net, batch(), parallel), step(eager, batch()))
    assert_agree(memory(net), memory(eager))
    assert [key.removeprefix("module.") for key in parallel.state_dict()] == list(eager.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@EVERY_NETWORK
def test_data_parallel(name: str) -> None:
    """Each device has its share's statistics; those of the first are remembered, as in BatchNorm."""
    net, eager = build(name).cuda(), build(name).cuda()
    x = batch(samples=8).cuda()
    parallel = nn.DataParallel(net, device_ids=[0, 1])
    first, second = x.split(4)
    twin = copy.deepcopy(eager)
    assert_agree(parallel(x), torch.cat((eager(first), twin(second))))
    assert_agree(memory(net), memory(eager))


# Parametrizations.


PARAMETRIZATIONS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "oni": nk.parametrizations.oni,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", ["IterNorm2d", "ConvNorm2d"])
def test_parametrized_weights(name: str, kind: str) -> None:
    """The gradient of the convolution before a norm, and of ConvNorm, arrives through the parametrization."""
    net: Any = build(name)
    twin: Any = build(name)
    layer, plain = net.layers[0], twin.layers[0]
    PARAMETRIZATIONS[kind](layer, "weight")
    for model in (net, twin):
        model.eval()  # in evaluation spectral_norm does not go on with its power iteration
        norm_of(model).train()
    with torch.no_grad():
        plain.weight.copy_(layer.weight)

    y, z = net(batch()), twin(batch())
    assert_agree(y.detach(), z.detach())
    (grad_weight,) = torch.autograd.grad(loss_of(z), plain.weight)
    originals = list(layer.parametrizations.weight.parameters())
    expected = torch.autograd.grad(layer.weight, originals, grad_weight)
    assert_agree(list(torch.autograd.grad(loss_of(y), originals)), list(expected))
    assert_agree(memory(norm_of(net)), memory(norm_of(twin)))

    with torch.no_grad():  # an optimizer's step reaches evaluation
        originals[-1].mul_(-0.5)
        plain.weight.copy_(layer.weight)
    assert_agree(net.eval()(batch()).detach(), twin.eval()(batch()).detach())
