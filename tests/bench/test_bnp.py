"""BNP's benchmark: the check before timing, a step of each network, Proposition 6's counts."""

import copy

import pytest
import torch

import normkernels as nk
from bench.measure.comparison import Settings
from bench.measure.workload import GateError
from bench.suites import bnp
from bench.suites.memory import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("comparison", bnp.bnp(Settings(quick=True)), ids=lambda c: c.key)
def test_every_network_makes_a_step(comparison):
    assert (bnp.BATCH_NORM in comparison.names) == (comparison.work.shape[0] > 1)
    prepare = comparison.preparer()
    for name in comparison.names:
        step = prepare(name)
        before = copy.deepcopy(step.model.state_dict())
        step.prepare(0)
        step.run()
        step.finish()
        assert any(not torch.equal(before[key], value) for key, value in step.model.state_dict().items())


@pytest.mark.parametrize("batch", [1, 16])
def test_wrong_gradients_are_not_timed(batch, monkeypatch):
    model, (data, *_) = bnp.network(None), bnp.make_batches(batch, CPU, count=1)
    bnp.check_bnp(copy.deepcopy(model), data)
    right = nk.optim.bnp.precondition
    for change in (lambda eps1, eps2: (2 * eps1, eps2), lambda eps1, eps2: (eps1, eps2 + 1e-2)):
        monkeypatch.setattr(nk.optim.bnp, "precondition", lambda *a, change=change: right(*a[:-2], *change(*a[-2:])))
        with pytest.raises(GateError, match="Algorithm 2"):
            bnp.check_bnp(copy.deepcopy(model), data)


def test_operations_of_proposition_6():
    """A layer of n inputs and n' outputs takes 4 n N + 6 n n' + 2 n' + 8 n, the text's BatchNorm 32 n N + 4 n."""
    counts = bnp.operations(16)
    layers = [(3072, 100), (100, 100), (100, 10)]
    assert counts[bnp.BNP] == sum(4 * n * 16 + 6 * n * out + 2 * out + 8 * n for n, out in layers)
    assert counts[bnp.BATCH_NORM] == 2 * (32 * 100 * 16 + 4 * 100)


def test_memory_is_measured_of_the_same_networks():
    found = [c for c in memory(Settings(quick=True)) if bnp.BNP in c.names]
    assert [c.work.shape[0] for c in found] == [16, 512]
    assert all(c.names == (bnp.VANILLA, bnp.BATCH_NORM, bnp.LAYER_NORM, bnp.BNP) for c in found)


def test_the_command_prints_the_counts(capsys):
    bnp.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(bnp.MINI_BATCHES) and "1.95 M" in lines[2]
