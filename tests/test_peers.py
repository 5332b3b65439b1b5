"""One test for each way in which another implementation of IterNorm or DBN fails, so that ours never will.

The implementation is named first in each docstring. Measured on their code; none of it is here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances import assert_agree
from tests.tolerances.whitening import SAVED_FOR_BACKWARD, assert_iter_norm

BOTH = pytest.mark.parametrize("layer_type", [nk.IterNorm2d, nk.DBN2d], ids=["IterNorm2d", "DBN2d"])


def check(config: Config, x: Tensor, *, stable: bool = False) -> None:
    """Check output and gradients of iter_norm by the rule of tests/tolerances."""
    dy = incoming_gradient(x)
    got = run(nk.ops.iter_norm, config, x, dy)
    assert_iter_norm(got, oracle(config, x, dy, stable=stable), plain_path(config, x, dy), x, dy, None, config)


@BOTH
def test_several_groups_train_on_a_cpu(layer_type: type) -> None:
    """IterNorm-pytorch: more than one group raises on a CPU, as its running buffer is an expanded view."""
    layer = layer_type(12, group_size=3)
    layer(torch.randn(4, 12, 3, 3)).sum().backward()
    assert layer.running_whitening.is_contiguous()
    for i in range(4):
        for j in range(i):
            assert not torch.equal(layer.running_whitening[i], layer.running_whitening[j])


@BOTH
def test_backward_in_evaluation(layer_type: type) -> None:
    """IterNorm-pytorch: it raises IndexError. solo-learn: the gradient of the input is silently None."""
    layer = layer_type(8, group_size=4)
    x = torch.randn(5, 8, 3, 3, requires_grad=True)
    layer(x)
    layer.eval()(x).square().sum().backward()
    for leaf in (x, layer.weight, layer.bias):
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@BOTH
def test_group_size_is_not_shrunk(layer_type: type) -> None:
    """IterNorm-pytorch: the group size is halved silently until it divides the channels."""
    with pytest.raises(ValueError, match=r"1, 2, 3, 4, 6, 12"):
        layer_type(12, group_size=8)
    assert layer_type(12, group_size=6).running_whitening.shape == (2, 6, 6)


@BOTH
def test_2d_input_is_not_reshaped(layer_type: type) -> None:
    """IterNorm-pytorch: a (N, C) batch is silently reshaped for a layer made for images; the 1d layers take it."""
    with pytest.raises(ValueError, match=r"4D.*2D"):
        layer_type(8)(torch.randn(16, 8))
    assert getattr(nk, layer_type.__name__.replace("2d", "1d"))(8)(torch.randn(16, 8)).shape == (16, 8)


@BOTH
def test_empty_batch(layer_type: type) -> None:
    """IterNorm-pytorch: an empty batch raises ZeroDivisionError."""
    assert layer_type(8)(torch.empty(0, 8, 3, 3)).shape == (0, 8, 3, 3)


@BOTH
def test_one_nan_batch_does_not_poison_the_statistics(layer_type: type) -> None:
    """IterNorm-pytorch: running_wm is NaN for ever after."""
    layer = layer_type(8)
    for x in (torch.randn(5, 8, 3, 3), torch.full((5, 8, 3, 3), float("nan")), torch.randn(5, 8, 3, 3)):
        layer(x)
    assert layer.num_batches_tracked == 2
    assert layer.eval()(torch.randn(5, 8, 3, 3)).isfinite().all()


def test_memory_saved_for_backward() -> None:
    """IterNorm-pytorch: it saves twice the input, as the centered copy is kept beside it."""
    x = torch.randn(16, 32, 16, 16, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        nk.IterNorm2d(32)(x)
    assert sum(saved.values()) <= SAVED_FOR_BACKWARD * x.untyped_storage().nbytes()


@pytest.mark.parametrize("num_iterations", [10, 15])
def test_many_iterations_at_a_condition_number_of_1e4(num_iterations: int) -> None:
    """IterNorm-pytorch: the error is 30 % at T=10, and NaN at T=15, as eq. 17 as written diverges in float32."""
    config = Config(num_iterations=num_iterations, eps=1e-9)
    check(config, inputs.gaussian((64, 8, 4, 4), dtype=torch.float32, condition=1e4), stable=True)


@pytest.mark.parametrize("scale", [1.0, 40.0, 1000.0])
def test_float16(scale: float) -> None:
    """IterNorm-pytorch: y is zeros or NaN from a standard deviation of 40 on, as the covariance overflows float16."""
    layer = nk.IterNorm2d(8).half()
    x = inputs.gaussian((32, 8, 4, 4), dtype=torch.float16, scale=scale, mean=scale)
    y = layer(x)
    assert y.dtype == torch.float16
    variance = y.float().var((0, 2, 3))
    assert variance.min() > 0.3 and variance.max() < 1.1  # T=5 at d=8 whitens nearly
    check(Config(), x)


def test_the_default_whitens_at_64_features() -> None:
    """solo-learn: its default at 64 features is one channel per group, which does not decorrelate at all."""
    layer = nk.IterNorm2d(64)
    assert layer.running_whitening.shape == (1, 64, 64)
    x = inputs.gaussian((64, 64, 4, 4), dtype=torch.float32, group_size=64, condition=50.0)

    def correlation(t: Tensor) -> float:
        cov = nk.ops.moments(t, 64)[2][0]
        std = cov.diagonal().sqrt()
        return (cov / std / std[:, None] - torch.eye(64)).square().mean().sqrt().item()

    assert correlation(layer(x).detach()) < 0.9 * correlation(x)
    tighter = nk.IterNorm2d(64, scaling="frobenius", num_iterations=7)
    assert correlation(tighter(x).detach()) < 0.1 * correlation(x)


@BOTH
def test_second_backward(layer_type: type) -> None:
    """solo-learn: the second backward raises."""
    x = torch.randn(5, 8, 3, 3, requires_grad=True)
    y = layer_type(8)(x)
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_double_backward() -> None:
    """solo-learn: double backward raises.

    DBN refuses it by name; test_iter_norm_guarantees.py checks the values.
    """
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    layer = nk.IterNorm1d(4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="eigh"):
        torch.autograd.grad(nk.DBN1d(4, dtype=torch.float64)(x).sin().sum(), x, create_graph=True)


@BOTH
def test_channels_last(layer_type: type) -> None:
    """solo-learn: the memory format is lost."""
    x = torch.randn(5, 8, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer_type(8)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    for t in (y, dx):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@BOTH
def test_autocast(layer_type: type) -> None:
    """solo-learn: it leaves autocast through custom_fwd(float32), so activations come back twice as large."""
    with torch.autocast("cpu", torch.bfloat16):
        h = nn.Conv2d(3, 8, 3)(torch.randn(4, 3, 9, 9))
        assert layer_type(8)(h).dtype == h.dtype == torch.bfloat16


def test_groups_have_matrices_of_their_own() -> None:
    """DBN of IterNorm-pytorch: all groups share one whitening matrix."""
    x = torch.cat((inputs.gaussian((60, 4)), 100 * inputs.gaussian((60, 4), group_size=4, condition=50.0, seed=3)), 1)
    layer = nk.DBN1d(8, group_size=4, eps=0.0, momentum=1.0, dtype=torch.float64)
    y = layer(x)
    assert layer.running_whitening.shape == (2, 4, 4)
    assert_agree(nk.ops.moments(y, 4)[2], torch.eye(4).double().repeat(2, 1, 1))
    assert_agree(layer.eval()(x), y)


def test_buffers_hold_no_graph() -> None:
    """DBN of IterNorm-pytorch: buffers keep the autograd graph, and so the memory, of every batch."""
    layer = nk.DBN2d(8)
    layer(torch.randn(5, 8, 3, 3, requires_grad=True))
    assert all(b.grad_fn is None and not b.requires_grad for b in layer.buffers())


EQUAL: dict[str, Tensor] = {
    "equal-eigenvalues": torch.cat((torch.eye(8), -torch.eye(8))).double(),
    "zero-input": torch.zeros(9, 8, dtype=torch.float64),
    "one-sample": torch.arange(8.0).double()[None],
}


@pytest.mark.parametrize("what", EQUAL)
@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_gradients_are_finite(what: str, method: str) -> None:
    """StochasticityBW's DBN (SVD): gradients are NaN at equal eigenvalues, for zero input and for m = 1."""
    check(Config(method=method, eps=1e-3), EQUAL[what], stable=True)


def test_running_covariance_of_unequal_batches() -> None:
    """Switchable-Whitening: 6 + 2 samples give a covariance that is 18 % wrong, silently: halves are not the whole.

    Without ranks here, the same mistake would show between samples of unequal tiles: the statistics of a batch do not
    depend on how it is cut.
    """
    x = inputs.gaussian((8, 8, 5, 3), dtype=torch.float64)
    x[6:] += 3
    whole = nk.ops.moments(x, 8)
    parts = [nk.ops.moments(part, 8) for part in (x[:6], x[6:])]
    n = sum(count for count, _, _ in parts)
    mean = sum(count * m for count, m, _ in parts) / n
    cov = sum(count * (c + torch.outer(m - mean, m - mean)) for count, m, c in parts) / n
    assert n == whole[0]
    assert_agree(mean, whole[1])
    assert_agree(cov, whole[2])


def test_the_input_is_centered() -> None:
    """Network Deconvolution: it whitens the uncentred second moment, so a constant offset changes the result."""
    x = inputs.gaussian((60, 8), mean=0.0)
    assert_agree(nk.ops.iter_norm(x + 5, 8)[0], nk.ops.iter_norm(x, 8)[0])


@BOTH
def test_evaluation_before_training(layer_type: type) -> None:
    """Network Deconvolution: it crashes."""
    x = torch.randn(5, 8, 3, 3)
    assert torch.equal(layer_type(8).eval()(x), x)


def test_gradient_is_that_of_the_truncated_iteration() -> None:
    """FastDifferentiableMatSqrt: it has the Lyapunov gradient of the exact root, which is wrong for T = 2."""
    x = inputs.gaussian((40, 8), condition=50.0)
    check(Config(num_iterations=2), x)

    def gradient(**options: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = nk.ops.iter_norm(leaf, 8, **options)[0]
        return torch.autograd.grad(y, leaf, incoming_gradient(x))[0]

    exact, truncated = gradient(method="eigh"), gradient(num_iterations=2)
    assert (exact - truncated).norm() > 0.1 * exact.norm()  # so the check above can tell them apart


@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_small_eps_at_a_condition_number_of_1e4(method: str) -> None:
    """FastDifferentiableMatSqrt: y is 52 % wrong at eps 1e-5 and condition number 1e4, silently."""
    check(Config(method=method, num_iterations=20), inputs.gaussian((64, 8, 4, 4), dtype=torch.float32, condition=1e4),
          stable=True)  # fmt: skip
