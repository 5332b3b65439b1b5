"""FLOPs of our layers, as torch's counter finds them with our formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import normkernels as nk
from normkernels.dispatch.record import OPS

N, C, SIDE, D, T = 6, 8, 5, 4, 5
VALUES = N * C * SIDE * SIDE


def counted(module: nn.Module, training: bool = True) -> int:
    """Return the FLOPs of a step, or of an evaluation."""
    x = torch.randn(N, C, SIDE, SIDE, requires_grad=training)
    with FlopCounterMode(display=False, custom_mapping=nk.analysis.flop_formulas()) as counter:
        y = module.train(training)(x)
        if training:
            y.sum().backward()
    return counter.get_total_flops()


def test_a_training_step_of_whitening() -> None:
    """10 d FLOPs for each value, and the products of Newton's iteration: 3 (T - 1) forward and 7 (T - 1) backward."""
    groups = C // D
    expected = 10 * D * VALUES + 20 * (T - 1) * groups * D**3
    assert counted(nk.IterNorm2d(C, D, num_iterations=T)) == expected
    assert counted(nk.DBN2d(C, D)) == 10 * D * VALUES + 19 * groups * D**3


def test_evaluation_is_one_product() -> None:
    layer = nk.IterNorm2d(C, D)
    layer(torch.randn(N, C, SIDE, SIDE))
    assert counted(layer, training=False) == 2 * D * VALUES


def test_single_channels() -> None:
    assert counted(nk.POPNorm2d(C)) == 10 * VALUES


def test_the_filter_counts_beside_the_convolution() -> None:
    plain, normed = nn.Conv2d(C, C, 3, padding=1, bias=False), nk.ConvNorm2d(C, C, 3, padding=1, bias=False)
    plane = (SIDE + 2) ** 2  # the planes are larger by the kernel's reach
    filters = 2 * N * C * (round(2.5 * plane * math.log2(plane)) + 4 * plane)
    assert counted(normed) > counted(plain) + filters


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_formula(op: str) -> None:
    """A formula takes what torch's counter gives it: shapes in place of tensors."""
    formula = nk.analysis.flop_formulas()[getattr(torch.ops.normkernels, op)]
    for sample in OPS[op].samples(torch.randn(2, C, SIDE, SIDE), D):
        shapes = [shape_of(value) for value in sample]
        flops = formula(*shapes, out_shape=None)
        assert isinstance(flops, int) and flops > 0


def shape_of(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [tensor.shape for tensor in value]
    return value.shape if isinstance(value, torch.Tensor) else value
