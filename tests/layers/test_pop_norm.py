"""POP-Norm: what it computes in training and in evaluation, what it remembers, and where it is BatchNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.layers.pop_norm_checks import (
    DTYPES,
    EVERY_OPTION,
    EVERY_RANK,
    RANKS,
    assert_unchanged,
    buffers,
    check_evaluation,
    check_training,
    values_and_gradients,
    with_affine,
)
from tests.oracles import inputs, popnorm
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_agree, assert_within, largest
from tests.tolerances.moments import mean_floor


@EVERY_RANK
@DTYPES
def test_training_step(rank: str, dtype: torch.dtype) -> None:
    """Output, gradients and running averages are right: of the mean, and of the unbiased variance as BatchNorm's."""
    layer_type, _, shape = RANKS[rank]
    layer = with_affine(layer_type(8, momentum=0.3, dtype=dtype))
    x = inputs.gaussian(shape, dtype=dtype)
    check_training(layer, x)
    m = x.numel() // 8
    mean, var = popnorm.statistics(x.double())
    assert_within("running_mean", layer.running_mean, 0.3 * mean, None, mean_floor(x), 1.0)
    floor = mean_floor(x) * (1 + largest(x.double()))  # the variance is a mean of squares
    assert_within("running_var", layer.running_var, 0.7 + 0.3 * var * m / (m - 1), None, floor, 1.0)
    assert layer.running_mean.dtype == layer.running_var.dtype != torch.float16
    assert layer.num_batches_tracked == 1


@EVERY_RANK
@DTYPES
def test_evaluation(rank: str, dtype: torch.dtype) -> None:
    """Statistics and parameters may be of different batches: r^2 is running_var + beta^2 for today's beta."""
    layer_type, _, shape = RANKS[rank]
    layer = layer_type(8, dtype=dtype)
    layer(inputs.gaussian(shape, dtype=dtype, mean=2.0))
    with_affine(layer).eval()
    before = buffers(layer)
    check_evaluation(layer, inputs.gaussian(shape, dtype=dtype, seed=1))
    assert_unchanged(layer, before)


@EVERY_OPTION
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Either step works by itself (Remark 1). A step that is left out has no parameter."""
    layer = with_affine(nk.POPNorm2d(8, dtype=dtype, **options))
    wanted = [name for name, used in (("weight", layer.scale), ("bias", layer.center)) if used and layer.affine]
    assert [name for name, _ in layer.named_parameters()] == wanted
    assert list(layer.state_dict()) == [*wanted, "running_mean", "running_var", "num_batches_tracked"]
    check_training(layer, inputs.gaussian(inputs.SHAPE_4D, dtype=dtype))
    check_evaluation(layer.eval(), inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, seed=1))
    other = nk.POPNorm2d(8, dtype=dtype, **options).eval()
    other.load_state_dict(layer.state_dict())
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype)
    assert torch.equal(other(x), layer(x))


def test_kappa_divides() -> None:
    """A power of two changes no digit; without the scaling step there is nothing that kappa divides."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    for training in (True, False):
        one, eight = (with_affine(nk.POPNorm2d(8, kappa)).train(training) for kappa in (1, 8))
        assert torch.equal(one(x), 8 * eight(x))
        one, eight = (with_affine(nk.POPNorm2d(8, kappa, scale=False)).train(training) for kappa in (1, 8))
        assert torch.equal(one(x), eight(x))


@pytest.mark.parametrize("training", [True, False])
@EVERY_RANK
def test_root_mean_square(rank: str, training: bool) -> None:
    """A channel's root mean square is |gamma| / kappa, whatever beta is, as Theorem 3 needs it."""
    layer_type, _, shape = RANKS[rank]
    layer = with_affine(layer_type(8, 3.0, eps=0.0, momentum=1.0, dtype=torch.float64))
    x = inputs.gaussian(shape)
    y = layer(x)
    if not training:
        m = x.numel() // 8
        layer.running_var *= (m - 1) / m
        y = layer.eval()(x)
    assert_agree(y.movedim(1, 0).flatten(1).square().mean(1).sqrt(), layer.weight.detach().abs() / 3)


# BatchNorm's.


@EVERY_RANK
@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_beta_and_kappa_it_is_batchnorm(rank: str, momentum: float | None) -> None:
    """Remark 1: at beta = 0 and kappa = 1 they are one function, in training and evaluation, with the same memory."""
    layer_type, batchnorm, shape = RANKS[rank]
    layer, reference = layer_type(8, 1.0, momentum=momentum).double(), batchnorm(8, momentum=momentum).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1.5, 2, 8))
        reference.weight.copy_(layer.weight)
    for seed, training in enumerate((True, True, True, False)):
        x = inputs.gaussian(shape, seed=seed, mean=float(seed), scale=1.0 + seed)
        dy = incoming_gradient(x)
        ours, theirs = (values_and_gradients(each.train(training), x, dy) for each in (layer, reference))
        assert_agree(ours[:3], theirs[:3])  # beta has another gradient: it goes through gamma / r
        assert list(layer.state_dict()) == list(reference.state_dict())
        assert_agree(list(layer.buffers()), list(reference.buffers()))


# 0 keeps the old statistics, 1 takes the new ones.
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@EVERY_OPTION
def test_statistics_are_batchnorms(options: dict[str, Any], dtype: torch.dtype, momentum: float | None) -> None:
    """The statistics are BatchNorm's, whatever the layer makes of them."""
    layer = with_affine(nk.POPNorm2d(8, momentum=momentum, dtype=dtype, **options))
    reference = nn.BatchNorm2d(8, momentum=momentum, dtype=dtype)
    for seed in range(3):
        x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, seed=seed, mean=float(seed), scale=1.0 + seed)
        layer(x)
        reference(x)
        assert_agree(list(layer.buffers()), list(reference.buffers()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_batchnorm_checkpoint(half: bool, assign: bool) -> None:
    """With the same names a checkpoint loads strictly, inside a network, too, and back; statistics stay float32."""
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(with_affine(nn.BatchNorm2d(8))))
    source(torch.randn(5, 3, 7, 7))
    target = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nk.POPNorm2d(8)))
    state = source.half().state_dict() if half else source.state_dict()
    target.load_state_dict(state, assign=assign)
    assert all(torch.equal(value.to(state[key].dtype), state[key]) for key, value in target.state_dict().items())
    assert target[1][0].running_var.dtype == target[1][0].running_mean.dtype == torch.float32
    assert target[1][0].num_batches_tracked == 1
    nn.BatchNorm2d(8).load_state_dict(target[1][0].state_dict())
    with pytest.raises(RuntimeError, match="bias"):
        nk.POPNorm2d(8, center=False).load_state_dict(source[1][0].state_dict())


# Running statistics.


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_without_statistics_uses_the_batch(track: bool) -> None:
    layer = nk.POPNorm2d(8, track_running_stats=track)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    in_training = layer(x)
    in_evaluation = layer.eval()(x)
    assert torch.equal(in_training, in_evaluation) is not track
    if not track:
        assert not list(layer.buffers()) and list(layer.state_dict()) == ["weight", "bias"]
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(torch.randn(1, 8, 1, 1))


def test_reset() -> None:
    layer, fresh = with_affine(nk.POPNorm2d(8)), nk.POPNorm2d(8)
    layer(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32))
    layer.reset_running_stats()
    assert_unchanged(layer, buffers(fresh))
    assert not torch.equal(layer.weight, fresh.weight)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), fresh.parameters(), strict=True))


def test_no_graph_in_buffers() -> None:
    layer = nk.POPNorm2d(8)
    for _ in range(2):
        layer(torch.randn(5, 8, 2, 2, requires_grad=True)).sum().backward()
    assert all(not b.requires_grad and b.grad_fn is None for b in layer.buffers())


@EVERY_OPTION
def test_gradients_of_evaluation(options: dict[str, Any]) -> None:
    """Gradients of any order are right, with a training step between a call and its backward."""
    layer = with_affine(nk.POPNorm2d(2, dtype=torch.float64, **options))
    x = inputs.gaussian((3, 2, 2, 2)).requires_grad_()
    layer(x)
    layer.eval()
    parameters = dict(layer.named_parameters())

    def path(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    assert gradcheck(path, (x, *parameters.values()))
    assert gradgradcheck(path, (x, *parameters.values()))
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    layer.train()(10 * x)
    assert_agree(torch.autograd.grad(loss, x), expected)


def test_frozen() -> None:
    """Fine-tuning goes through a frozen layer: x still gets its gradient."""
    layer = nk.POPNorm2d(8, 2.0, eps=0.0).eval().requires_grad_(False)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(x))
    assert torch.equal(y, x / 2) and torch.equal(x.grad, torch.full_like(x, 0.5))  # fresh: mean 0, variance 1
