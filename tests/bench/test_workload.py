"""Inputs, the correctness check before timing, and the baselines themselves against float64."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from bench.measure.workload import (
    NORM_PASSES,
    TOLERANCE,
    GateError,
    GraphCall,
    Inputs,
    Provider,
    Workload,
    make_input,
    prepare_layer,
)
from bench.providers import catalogue as cat
from bench.providers.baselines import plain_whitening

SMALL = Workload((8, 16, 6, 6))
BASELINES = [
    cat.plain_iter_norm(group_size=8),
    cat.transposed_iter_norm(group_size=8),
    cat.eigh_dbn(group_size=8),
    cat.plain_pop_norm_layer(),
    cat.batch_norm(),
    cat.conv3x3(),
    cat.grouped_conv1x1(8),
]
OURS = [cat.iter_norm(group_size=8), cat.dbn(group_size=8), cat.pop_norm()]


@pytest.mark.parametrize("mode", ["full", "forward", "backward"])
@pytest.mark.parametrize("provider", BASELINES + OURS, ids=lambda p: p.name)
def test_every_provider_passes_its_check_and_runs(provider, mode):
    call = prepare_layer(provider, Inputs(Workload(SMALL.shape, mode=mode)))
    for turn in range(3):
        call.prepare(turn)
        call.run()
        call.finish()
    assert call.y is None
    assert call.current.x.grad is None


@pytest.mark.parametrize("provider", [*OURS, cat.batch_norm(), cat.grouped_conv1x1(8)], ids=lambda p: p.name)
@pytest.mark.parametrize("channels_last", [False, True])
def test_inference(provider, channels_last):
    call = prepare_layer(provider, Inputs(Workload(SMALL.shape, mode="inference", channels_last=channels_last)))
    assert not call.layer.training
    call.prepare(0)
    call.run()
    assert not call.y.requires_grad
    call.finish()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_types(dtype):
    for provider in (cat.plain_iter_norm(group_size=8), cat.iter_norm(group_size=8), cat.batch_norm()):
        prepare_layer(provider, Inputs(Workload(SMALL.shape, dtype)))


class Wrong(nn.BatchNorm2d):
    """A layer with the right output and a gradient that is off by two percent."""

    def forward(self, x):
        y = super().forward(x)
        return y + 0.02 * (x - x.detach())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w: Wrong(w.channels), "expected dx within"),
        (lambda w: nn.BatchNorm2d(w.channels, eps=0.1), "expected y within"),
        (lambda w: nn.Sequential(nn.BatchNorm2d(w.channels), nn.Flatten()), "expected torch.float32"),
        (lambda w: nn.Identity(), "expected a new output"),
    ],
)
def test_a_wrong_layer_is_not_timed(build, message):
    reference = cat.batch_norm().reference

    def sloppy(layer, tensors, x):
        named = {name.removeprefix("0."): tensor for name, tensor in tensors.items()}
        return reference(layer, named or {"weight": torch.ones(16), "bias": torch.zeros(16)}, x)

    with pytest.raises(GateError, match=message):
        prepare_layer(Provider("wrong", build, sloppy, NORM_PASSES), Inputs(SMALL))


def test_inputs_are_several_different_and_reproducible():
    inputs = Inputs(SMALL)
    assert len(inputs.sets) >= 2
    assert not torch.equal(inputs[0].x, inputs[1].x)
    assert inputs[0] is inputs[len(inputs.sets)]
    assert torch.equal(make_input(SMALL, 0), inputs[0].x.detach())


def test_the_plain_reference_whitens():
    x = torch.randn(64, 6, 5, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    one, zero = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    y = plain_whitening(x, one, zero, 3, None, 0.0).transpose(0, 1).reshape(2, 3, -1)
    cov = y @ y.mT / y.shape[-1]
    torch.testing.assert_close(cov, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    many = plain_whitening(x, one, zero, 3, 25, 0.0).transpose(0, 1).reshape(2, 3, -1)
    torch.testing.assert_close(many, y, rtol=1e-6, atol=1e-6)


def graph_call(device, mode="full"):
    inputs = Inputs(Workload((4, 8, 6, 6), mode=mode, device=torch.device(device)))
    return GraphCall(prepare_layer(cat.batch_norm(), inputs))


@pytest.mark.parametrize("mode", ["full", "inference"])
def test_the_outputs_of_a_graph_are_checked(monkeypatch, mode):
    """With stand-ins for CUDA, capturing runs the call and a replay does nothing, which is found out."""

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    call = graph_call("cpu", mode)
    assert call.call.y is None, "it would keep an autograd graph of the other stream alive"
    assert len({id(graph) for graph, _, _ in call.captured}) == len(call.call.inputs.sets)
    call.prepare(1)
    call.run()
    assert [graph.replays for graph, _, _ in call.captured[:2]] == [0, 1]
    call.finish()
    call.prepare(0)
    call.finish()
    call.run()
    with pytest.raises(ValueError, match="NaN"):
        call.finish()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["full", "inference"])
def test_a_graph_computes_everything_anew(mode):
    call = graph_call("cuda", mode)
    results = []
    for turn in range(2 * len(call.captured)):
        call.prepare(turn)
        call.run()
        results.append([tensor.clone() for tensor in call.current[1:] if tensor is not None])
        call.finish()  # overwrites them
    torch.testing.assert_close(results[: len(call.captured)], results[len(call.captured) :])
