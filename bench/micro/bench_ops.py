"""Each op of ours: forward, backward, and both."""

import pytest
import torch

from bench.micro.cases import OPS
from bench.suites.gradients import make_layers, prepare_precondition

WEIGHTS = [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 1, 1), (100, 256)]


@pytest.fixture(scope="module", params=OPS, ids=str)
def op(request, device):
    return request.param.prepare(device)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_op(op, mode, play):
    op.mode = mode
    play(op)


def test_precondition(device, play):
    """BNP's change of gradients, in place; it has no backward."""
    play(prepare_precondition(make_layers(torch.float32, device, WEIGHTS)))
