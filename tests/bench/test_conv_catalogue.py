"""ConvNorm's providers pass their own check, and a wrong one does not; a spectrum's memory is measured."""

from dataclasses import replace

import pytest
import torch

import normkernels as nk
from bench.measure.comparison import Comparison
from bench.measure.timing import Plan
from bench.measure.workload import GateError, Inputs, Workload, prepare_layer
from bench.providers import conv_catalogue as cat
from bench.suites.memory import measure_memory

SMALL = Workload((4, 8, 6, 6))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("provider", cat.conv_norm_layers(), ids=lambda p: p.name)
def test_layers(provider, channels_last, stride):
    output = (4, 8, 6 // stride, 6 // stride)
    work = replace(SMALL, stride=stride, output=output, channels_last=channels_last)
    call = prepare_layer(provider, Inputs(work))
    for turn in range(2):
        call.prepare(turn)
        call.run()
        assert call.y.shape == output
        call.finish()


@pytest.mark.parametrize("size", [6, 34])
@pytest.mark.parametrize("provider", cat.filters(), ids=lambda p: p.name)
def test_filters(provider, size):
    prepare_layer(provider, Inputs(Workload((2, 4, size, size))))


@pytest.mark.parametrize("provider", cat.spectra((10, 8)), ids=lambda p: p.name)
def test_spectra(provider):
    prepare_layer(provider, Inputs(Workload((6, 5, 3, 3), mode="inference", output=(6, 10, 5))))


def test_a_wrong_filter_is_not_timed(monkeypatch):
    right = nk.ops.spectral_filter
    monkeypatch.setattr(nk.ops, "spectral_filter", lambda z, v: right(z, v * torch.linspace(1, 1.01, v.shape[-1])))
    with pytest.raises(GateError, match="expected y within"):
        prepare_layer(cat.filters()[0], Inputs(Workload((2, 4, 9, 9))))


def test_memory_without_a_backward_pass(monkeypatch):
    """The spectrum's input is a weight: nothing is saved, and the probe only goes forward."""
    work = Workload((6, 5, 3, 3), mode="inference", output=(6, 34, 18))
    comparison = Comparison("memory", work, cat.spectra((34, 34)), Plan(), ())
    monkeypatch.setattr("bench.suites.memory.probe", lambda comparison, provider: 1 << 20)
    use = measure_memory(comparison, "kernel_spectrum")
    assert use.saved == 0 and use.peak == 1 << 20 and use.input == 6 * 5 * 9 * 4
