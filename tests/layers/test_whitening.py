"""IterNorm and DBN: what they compute in training and in evaluation, and what they remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.oracles import inputs, iternorm
from tests.oracles.run import Config, Result, incoming_gradient, oracle, plain_path
from tests.tolerances import assert_agree, assert_within, largest
from tests.tolerances.whitening import assert_iter_norm, floors, whiten_floors

# Layers for each rank that they take, and an input of that rank.
RANKS = {
    "IterNorm1d-NC": (nk.IterNorm1d, inputs.SHAPE_2D),
    "IterNorm1d-NCL": (nk.IterNorm1d, inputs.SHAPE_3D),
    "IterNorm2d": (nk.IterNorm2d, inputs.SHAPE_4D),
    "IterNorm3d": (nk.IterNorm3d, inputs.SHAPE_5D),
    "DBN1d-NC": (nk.DBN1d, inputs.SHAPE_2D),
    "DBN1d-NCL": (nk.DBN1d, inputs.SHAPE_3D),
    "DBN2d": (nk.DBN2d, inputs.SHAPE_4D),
    "DBN3d": (nk.DBN3d, inputs.SHAPE_5D),
}
EVERY_LAYER = pytest.mark.parametrize(("layer_type", "shape"), RANKS.values(), ids=RANKS.keys())
BOTH = pytest.mark.parametrize("layer_type", [nk.IterNorm2d, nk.DBN2d], ids=["IterNorm2d", "DBN2d"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)


def config_of(layer: nn.Module) -> Config:
    newton = "IterNorm" in type(layer).__name__
    return Config(
        layer.group_size, layer.num_iterations if newton else 0, layer.eps, layer.scaling if newton else "trace",
        "newton" if newton else "eigh",
    )  # fmt: skip


def with_affine(layer: Any) -> Any:
    """Set weights of both signs, and biases, far from 1 and 0."""
    c = layer.num_features
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1.5, 2, c))
        layer.bias.copy_(torch.linspace(3, -1, c))
    return layer


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in layer.named_buffers()}


def assert_unchanged(layer: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in layer.named_buffers():
        assert torch.equal(value, before[key]), key


def unharmed(layer: nn.Module, call: Callable[[], object]) -> None:
    """Check that call raises a ValueError or TypeError, and that no buffer has changed."""
    before = buffers(layer)
    with pytest.raises((ValueError, TypeError)):
        call()
    assert_unchanged(layer, before)


@EVERY_LAYER
@DTYPES
def test_training_step(layer_type: type, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and gradients of x, weight and bias are right, and running statistics follow eq. 8."""
    layer = with_affine(layer_type(8, group_size=4, momentum=0.3, dtype=dtype))
    config = config_of(layer)
    x = inputs.gaussian(shape, dtype=dtype, group_size=4)
    dy = incoming_gradient(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)

    weight, bias = layer.weight.detach(), layer.bias.detach()
    reference, plain = oracle(config, x, dy, weight, bias), plain_path(config, x, dy, weight, bias)
    _, mean, w = nk.ops.iter_norm(x, 4, max(config.num_iterations, 0), config.eps, method=config.method)
    got = Result(y.detach(), mean, w, leaf.grad, layer.weight.grad, layer.bias.grad)
    assert_iter_norm(got, reference, plain, x, dy, weight, config)

    floor = floors(x, dy, weight, reference, config)
    w_reference = 0.7 * torch.eye(4, dtype=torch.float64) + 0.3 * reference.w
    assert_within("running_mean", layer.running_mean, 0.3 * reference.mean, None, floor.mean, 1.0)
    assert_within("running_whitening", layer.running_whitening, w_reference, None, floor.w, 1.0)
    assert layer.num_batches_tracked == 1


@EVERY_LAYER
@DTYPES
def test_evaluation(layer_type: type, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """It is one affine map with the running statistics: values, and gradients of everything, without touching them."""
    layer = with_affine(layer_type(8, group_size=4, dtype=dtype))
    x = inputs.gaussian(shape, dtype=dtype, group_size=4)
    layer(x)
    layer.eval()
    before = buffers(layer)
    dy = incoming_gradient(x)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    assert_unchanged(layer, before)

    given = [x, layer.running_mean, layer.running_whitening, layer.weight.detach(), layer.bias.detach()]
    exact = [t.double().requires_grad_() for t in given]
    y_ref = iternorm.whiten(*exact)
    y_ref.backward(dy.double())
    grads = [t.grad for t in exact]
    floor = whiten_floors(given, dy, y_ref.detach(), grads)
    for key, got, ref in (
        ("y", y.detach(), y_ref.detach()), ("x", leaf.grad, grads[0]),
        ("weight", layer.weight.grad, grads[3]), ("bias", layer.bias.grad, grads[4]),
    ):  # fmt: skip
        assert_within(key, got, ref, None, floor[key], largest(ref))


@BOTH
def test_eval_gradient_when_the_layer_is_frozen(layer_type: type) -> None:
    """Fine-tuning goes through a frozen norm: x still gets its gradient."""
    layer = layer_type(8, group_size=4).eval().requires_grad_(False)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32).requires_grad_()
    layer(x).backward(torch.ones(inputs.SHAPE_4D))
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))  # fresh statistics are mean 0 and W = I


@BOTH
def test_fresh_layer_in_evaluation_is_the_identity(layer_type: type) -> None:
    """Eq. 8 starts from mean 0 and W = I: evaluating before training must not fail or give zeros."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    assert torch.equal(layer_type(8, group_size=4).eval()(x), x)


# Running statistics over several batches.


def batches(count: int = 4) -> list[Tensor]:
    return [inputs.gaussian(inputs.SHAPE_4D, group_size=4, seed=i, mean=float(i), scale=1.0 + i) for i in range(count)]


def batch_statistics(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    c = config_of(layer)
    _, mean, w = iternorm.iter_norm(x, c.group_size, c.num_iterations, c.eps, scaling=c.scaling, method=c.method)
    return mean, w


# 0 keeps the old statistics, 1 takes the new ones, .1 is the default; None is the cumulative average.
@BOTH
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_momentum(layer_type: type, momentum: float | None) -> None:
    layer = layer_type(8, group_size=4, momentum=momentum, dtype=torch.float64)
    mean, w = torch.zeros(8, dtype=torch.float64), torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    for i, x in enumerate(batches(), start=1):
        layer(x)
        rate = 1 / i if momentum is None else momentum
        batch_mean, batch_w = batch_statistics(layer, x)
        mean, w = (1 - rate) * mean + rate * batch_mean, (1 - rate) * w + rate * batch_w
        assert layer.num_batches_tracked == i
    assert_agree(layer.running_mean, mean)
    assert_agree(layer.running_whitening, w)


@BOTH
def test_statistics_follow_batchnorms(layer_type: type) -> None:
    """The running mean and the counter are BatchNorm's own, batch for batch."""
    layer, reference = layer_type(8, group_size=4, dtype=torch.float64), nn.BatchNorm2d(8, dtype=torch.float64)
    for x in batches():
        layer(x)
        reference(x)
        assert_agree(layer.running_mean, reference.running_mean)
        assert torch.equal(layer.num_batches_tracked, reference.num_batches_tracked)


@BOTH
def test_group_size_one_is_batchnorm(layer_type: type) -> None:
    """Eq. 1: one channel per group, converged, is standardization."""
    options = {"num_iterations": 20} if layer_type is nk.IterNorm2d else {}
    x = inputs.gaussian(inputs.SHAPE_4D)
    layer = with_affine(layer_type(8, 1, eps=1e-5, dtype=torch.float64, **options))
    reference = with_affine(nn.BatchNorm2d(8, dtype=torch.float64))
    assert_agree(layer(x), reference(x))


@BOTH
@pytest.mark.parametrize("track", [True, False])
def test_evaluation_without_statistics_uses_the_batch(layer_type: type, track: bool) -> None:
    layer = layer_type(8, group_size=4, track_running_stats=track)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    in_training = layer(x)
    in_evaluation = layer.eval()(x)
    assert torch.equal(in_training, in_evaluation) is not track
    if not track:
        assert layer.running_mean is None and layer.running_whitening is None and layer.num_batches_tracked is None
        assert not layer.state_dict().keys() - {"weight", "bias"}
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(torch.randn(1, 8, 1, 1))


@BOTH
def test_reset(layer_type: type) -> None:
    layer, fresh = with_affine(layer_type(8, group_size=4)), layer_type(8, group_size=4)
    layer(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32))
    layer.reset_running_stats()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fresh.buffers(), strict=True))
    assert not torch.equal(layer.weight, fresh.weight)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), fresh.parameters(), strict=True))


@BOTH
def test_no_graph_in_buffers(layer_type: type) -> None:
    """A buffer that remembers its history keeps every batch alive."""
    layer = layer_type(8, group_size=4)
    for _ in range(2):
        layer(torch.randn(5, 8, 2, 2, requires_grad=True)).sum().backward()
    assert all(not b.requires_grad and b.grad_fn is None for b in layer.buffers())


# Bad batches.


@BOTH
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_batch_leaves_the_statistics_alone(layer_type: type, bad: float, momentum: float | None) -> None:
    """One overflow under AMP must not poison inference for ever: the output shows it, no buffer does."""
    layer = layer_type(8, group_size=4, momentum=momentum)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    layer(x)
    before = buffers(layer)
    broken = x.clone()
    broken[3, 6, 0, 0] = bad
    y = layer(broken)
    assert y[:, 4:].isnan().all() and y[:, :4].isfinite().all()
    assert_unchanged(layer, before)
    layer(x)
    assert layer.num_batches_tracked == 2
    assert all(b.isfinite().all() for b in layer.buffers())


@BOTH
def test_overflow_leaves_the_statistics_alone(layer_type: type) -> None:
    """The mean of the batch is finite, its covariance is not."""
    layer = layer_type(8, group_size=4)
    before = buffers(layer)
    layer(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, scale=1e25))
    assert_unchanged(layer, before)


@BOTH
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (3, 8, 0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(layer_type: type, training: bool, shape: tuple[int, ...]) -> None:
    layer = layer_type(8, group_size=4).train(training)
    before = buffers(layer)
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == shape and x.grad is not None and x.grad.shape == shape
    assert not layer.weight.grad.any() and not layer.bias.grad.any()
    assert_unchanged(layer, before)


@EVERY_LAYER
def test_one_value_per_channel(layer_type: type, shape: tuple[int, ...]) -> None:
    """It raises in training, as BatchNorm; evaluation has statistics and works."""
    layer = layer_type(8, group_size=4)
    x = torch.randn(1, 8, *[1] * (len(shape) - 2))
    before = buffers(layer)
    with pytest.raises(ValueError, match="more than one value per channel") as raised:
        layer(x)
    assert str(tuple(x.shape)) in str(raised.value)
    assert_unchanged(layer, before)
    assert torch.equal(layer.eval()(x), x)


WRONG = {
    "channels": (torch.randn(4, 7, 3, 3), ValueError, "8", "7"),
    "rank-3": (torch.randn(4, 8, 3), ValueError, "4D", "3D"),
    "rank-5": (torch.randn(4, 8, 3, 3, 3), ValueError, "4D", "5D"),
    "unbatched": (torch.randn(8, 3, 3), ValueError, "4D", "3D"),
    "integer": (torch.ones(4, 8, 3, 3, dtype=torch.int32), TypeError, "float32", "int32"),
    "complex": (torch.ones(4, 8, 3, 3, dtype=torch.complex64), TypeError, "float32", "complex64"),
    "double-into-float": (torch.randn(4, 8, 3, 3).double(), TypeError, "float64", "float32"),
    "another-device": (torch.empty(4, 8, 3, 3, device="meta"), ValueError, "meta", "cpu"),
    "not-a-tensor": ([[1.0]], TypeError, "Tensor", "list"),
}


@BOTH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(layer_type: type, what: str, training: bool) -> None:
    """Nothing is reshaped or cast silently, and nothing is remembered of a failed call."""
    x, error, expected, got = WRONG[what]
    layer = layer_type(8, group_size=4).train(training)
    before = buffers(layer)
    with pytest.raises(error) as raised:
        layer(x)
    assert expected in str(raised.value) and got in str(raised.value)
    assert_unchanged(layer, before)


@EVERY_LAYER
def test_other_ranks_are_refused(layer_type: type, shape: tuple[int, ...]) -> None:
    layer = layer_type(8, group_size=4)
    own = {2, 3} if "1d" in layer_type.__name__ else {len(shape)}
    for rank in {1, 2, 3, 4, 5, 6} - own:
        unharmed(layer, lambda rank=rank: layer(torch.randn(8, 8, 2, 2, 2, 2)[(..., *[0] * (6 - rank))]))


# Memory formats and types.


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(layer_type: type, training: bool) -> None:
    layer = layer_type(8, group_size=4).train(training)
    x = torch.randn(5, 8, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_between_convolutions(layer_type: type, dtype: torch.dtype, training: bool) -> None:
    """float32 parameters, half-type activations: the layer follows the activations, as BatchNorm does."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer_type(8, group_size=4), nn.Conv2d(8, 4, 3)).train(training)
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
    with torch.autocast("cpu", dtype):
        loss = net(torch.randn(4, 3, 9, 9)).float().square().mean()
    loss.backward()
    assert seen[0].dtype == seen[1].dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in net.parameters())  # fmt: skip
    assert net[1].running_whitening.dtype == torch.float32
    if training:  # the layer's own result is what it gives outside of autocast
        assert torch.equal(nk.ops.iter_norm(
            seen[0].detach(), 4, eps=net[1].eps, weight=net[1].weight, bias=net[1].bias,
            method=config_of(net[1]).method)[0], seen[1])  # fmt: skip


@BOTH
def test_a_network_of_whitened_layers_trains(layer_type: type) -> None:
    """The loss falls. Users report of other implementations NaN as soon as several layers are whitened."""
    torch.manual_seed(0)
    blocks = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), layer_type(8, 4), nn.ReLU())]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 36, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.randn(24, 8, 6, 6), torch.arange(24) % 3
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
