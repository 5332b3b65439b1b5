"""The benchmark of folding: what is compared, and the check before timing."""

import pytest
import torch
from torch import nn

import normkernels as nk
from bench.measure.comparison import Settings
from bench.measure.results import Results
from bench.measure.timing import Measurement
from bench.measure.workload import GateError, Inputs
from bench.providers.names import VGG_ITERNORM
from bench.suites import fold as folding
from bench.suites.bnp import VANILLA
from bench.suites.goals import GOALS, evaluate


@pytest.fixture(scope="module")
def comparison():
    (found,) = folding.fold(Settings(quick=True))
    return found


def test_networks_differ_by_their_norms_alone(comparison):
    assert comparison.names == (VANILLA, folding.FOLDED, VGG_ITERNORM)
    prepare = comparison.preparer()
    calls = {name: prepare(name) for name in comparison.names}
    for call in calls.values():
        call.prepare(0)
        call.run()
        assert call.y.shape == comparison.work.output_shape
        call.finish()
    kinds = {name: [type(m) for m in call.layer.modules()] for name, call in calls.items()}
    assert kinds[VANILLA] == kinds[folding.FOLDED]
    assert kinds[VGG_ITERNORM].count(nk.IterNorm2d) == 20 and nk.IterNorm2d not in kinds[VANILLA]
    convolutions = {
        name: [m.weight.shape for m in call.layer.modules() if isinstance(m, nn.Conv2d)] for name, call in calls.items()
    }
    assert convolutions[VANILLA] == convolutions[folding.FOLDED] == convolutions[VGG_ITERNORM]
    assert not any(module.training for call in calls.values() for module in call.layer.modules())


def test_a_wrong_fold_is_not_timed(comparison, monkeypatch):
    right = nk.convert.fold

    def wrong(model):
        folded = right(model)
        with torch.no_grad():
            folded.stage4[1].conv2.bias += 0.1
        return folded

    monkeypatch.setattr(nk.convert, "fold", wrong)
    with pytest.raises(GateError, match="folded: expected y within"):
        folding.prepare(folding.FOLDED, Inputs(comparison.work))


def test_the_goal_is_about_it(comparison):
    results = Results("a machine", "torch", "abc")
    samples = {VANILLA: [1.0, 1.0], folding.FOLDED: [1.01, 1.01], VGG_ITERNORM: [1.3, 1.3]}
    results.add_times(comparison, Measurement(samples))
    (verdict,) = evaluate(results, tuple(goal for goal in GOALS if goal.kernel == "fold"))
    assert verdict.state == "met" and verdict.measured.p50 == pytest.approx(1.01)
