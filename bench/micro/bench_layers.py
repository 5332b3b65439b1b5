"""Each layer of ours: forward, backward, and both; and a training step with BNP."""

import pytest

from bench.micro.cases import LAYERS
from bench.suites import bnp


@pytest.fixture(scope="module", params=LAYERS, ids=str)
def layer(request, device):
    return request.param.prepare(device)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_layer(layer, mode, play):
    layer.mode = mode
    play(layer)


@pytest.mark.parametrize("batch", [1, 64])
def test_bnp_step(batch, device, play):
    play(bnp.prepare(bnp.BNP, batch, device))
