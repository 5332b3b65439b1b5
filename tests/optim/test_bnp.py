"""BNP against the paper: Algorithms 2 and 3 with their matrices, Proposition 7, and degenerate input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.optim import BNP
from tests.optim.bnp_layers import (
    EVERY_LAYER,
    LAYERS,
    assert_preconditioned,
    backward,
    channel_of,
    channels_second,
    data,
    expected,
    gradients,
    single,
    state,
    two_branches,
)
from tests.oracles import bnp as oracle
from tests.tolerances import assert_agree

# Algorithms 2 and 3.


@EVERY_LAYER
@pytest.mark.parametrize("samples", [1, 3, 16])
def test_algorithm(make: Callable[[], nn.Module], shape: tuple[int, ...], positions: int, samples: int) -> None:
    """Three steps are right, of a batch of N = 1 too, on batches that differ."""
    layer, bnp = single(make(), rho=0.7)
    running = oracle.Running(channels_second(torch.empty(1, *shape), layer).shape[1], rho=0.7)
    for seed in range(3):
        x = data(samples, *shape, channel=channel_of(layer), seed=seed)
        layer.zero_grad()
        backward(layer, x)
        running.update(channels_second(x, layer))
        want = expected(layer, running, samples, positions)
        bnp.step()
        assert_agree(state(bnp), [running.mean, running.var])
        assert_agree(gradients(layer), want)
    assert bnp.state_dict()[""]["samples"] == samples
    assert bnp.state_dict()[""]["positions"] == positions


@pytest.mark.parametrize("name", ["linear", "conv2d-groups"])
def test_defaults_of_the_paper(name: str) -> None:
    """They are rho = 0.99, eps1 = 1e-2, eps2 = 1e-4."""
    make, shape, positions = LAYERS[name]
    layer, bnp = single(make())
    x = data(3, *shape)
    running = oracle.Running(x.shape[1], rho=0.99)
    backward(layer, x)
    running.update(x)
    want = expected(layer, running, 3, positions)
    bnp.step()
    assert_agree(gradients(layer), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_have_float32_statistics(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(3, 4, 3).to(dtype)
    bnp = BNP(layer, rho=0.0)
    x = data(4, 3, 6, 6).to(dtype)
    backward(layer, x)
    Gw, Gb = gradients(layer)
    bnp.step()
    assert all(g.dtype == dtype for g in gradients(layer))
    mean, var = (value.float() for value in oracle.statistics(x.double()))
    assert_agree(state(bnp), [mean, var])
    assert_preconditioned(layer, Gw, Gb, *state(bnp), oracle.scale(27, 4, 16))


def test_unbatched_input_is_one_sample() -> None:
    for name, shape in (("linear", (5,)), ("conv2d", (3, 8, 9))):
        grads = []
        for batch in ((), (1,)):
            torch.manual_seed(0)
            layer, bnp = single(LAYERS[name][0](), rho=0.5)
            layer(data(1, *shape).view(*batch, *shape)).sin().sum().backward()
            bnp.step()
            grads.append([*gradients(layer), *state(bnp)])
            assert bnp.state_dict()[""]["samples"] == 1
        assert_agree(*grads)


def test_frozen_bias_is_as_none() -> None:
    grads = []
    for bias in (True, False):
        torch.manual_seed(0)
        layer, bnp = single(nn.Conv2d(3, 4, 3, bias=bias))
        with torch.no_grad():
            if bias:
                layer.bias.zero_().requires_grad_(False)
        backward(layer, data(4, 3, 6, 6))
        if bias:
            layer.bias.grad = torch.ones_like(layer.bias)  # stale, from before it was frozen
        bnp.step()
        grads.append(layer.weight.grad)
        assert not bias or torch.equal(layer.bias.grad, torch.ones_like(layer.bias))
    assert torch.equal(*grads)


# Proposition 7.


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_proposition_7(kind: str) -> None:
    """SGD on W B(h) + b without a gradient through B's statistics is BNP on W^ h + b^, W^ = W D, b^ = b - W D mu.

    q = 1: Algorithm 2's q^2 is 1 from N = fan-in on; for the convolution it is taken out of the learning rate. eps = 0,
    and unpadded, as W^ of a padded one has another b^ at the border.
    """
    torch.manual_seed(1)
    layer: Any = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(6, 4, 3)
    h = data(12, 6, *([] if kind == "linear" else [7, 7]))
    call = F.linear if kind == "linear" else F.conv2d
    taps = (1,) * (layer.weight.dim() - 2)
    rate, sqrt_rs = 0.1, 1.0 if kind == "linear" else 5.0
    layer = layer.double()
    W, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    mu, var = oracle.statistics(h)

    def combined(W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        W_hat = W / var.sqrt().view(1, -1, *taps)
        return W_hat, b - (W_hat * mu.view(1, -1, *taps)).flatten(1).sum(1)

    normalized = (h - mu.view(1, -1, *taps)) / var.sqrt().view(1, -1, *taps)
    loss = call(normalized, W, b).sin().flatten(1).sum(1).mean()
    loss.backward()
    assert W.grad is not None and b.grad is not None
    want = combined(W.detach() - rate * W.grad, b.detach() - rate * b.grad)

    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), combined(W, b), strict=True):
            parameter.copy_(value)
    bnp = BNP(layer, rho=0.0, eps1=0.0, eps2=0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * max(sqrt_rs, 6 * layer.weight[0, 0].numel() / 12))
    backward(layer, h)
    bnp.step()
    optimizer.step()
    assert_agree([layer.weight.detach(), layer.bias.detach()], want)


# Degenerate input.


def test_constant_activations() -> None:
    """The variance is 0 in some channels, or in all: eps1 and eps2 stand in."""
    for dead in ([0, 2], [0, 1, 2, 3, 4]):
        layer, bnp = single(nn.Linear(5, 4), rho=0.0)
        x = data(6, 5)
        x[:, dead] = 3.0
        backward(layer, x)
        Gw, Gb = gradients(layer)
        bnp.step()
        assert torch.equal(state(bnp)[1] == 0, x.amin(0) == x.amax(0))
        assert_preconditioned(layer, Gw, Gb, *state(bnp), 1.0)


def test_no_variance_and_no_eps() -> None:
    layer, bnp = single(nn.Linear(5, 4), rho=0.0, eps1=0.0, eps2=0.0)
    x = data(6, 5)
    x[:, 1] = 3.0
    backward(layer, x)
    before = gradients(layer)
    with pytest.warns(UserWarning, match="left gradients that are not finite"):
        bnp.step()
    for now, then in zip(gradients(layer), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_batch_that_is_not_finite_leaves_the_statistics(value: float) -> None:
    """The statistics of that layer alone stay; 1e200 has a variance that overflows."""
    model, bnp = two_branches()
    model["a"](data(6, 5)).sum().backward()
    bnp.step()
    before = state(bnp, "a")
    x = data(6, 5)
    x[2, 3] = value
    with torch.no_grad():
        model["a"](x)
    model["b"](data(6, 5)).sum().backward()
    model["a"].zero_grad()
    bnp.step()
    for now, then in zip(state(bnp, "a"), before, strict=True):
        assert torch.equal(now, then)
    running = oracle.Running(5, rho=0.5)
    running.update(data(6, 5))
    assert_agree(state(bnp, "b"), [running.mean, running.var])


def test_gradient_that_is_not_finite_is_left_alone_with_one_warning() -> None:
    model, bnp = two_branches()
    x = data(6, 5)
    for step in range(2):
        model.zero_grad()
        (model["a"](x).sin().sum() + model["b"](x).sin().sum()).backward()
        before = gradients(model)
        model["b"].weight.grad[2, 1] = float("inf")
        if step == 0:
            with pytest.warns(UserWarning, match=r"not finite as they are in b;"):
                bnp.step()
        else:
            bnp.step()  # a second warning would be an error
        weight, bias = model["b"].weight.grad, model["b"].bias.grad
        before[2][2, 1] = float("inf")
        assert torch.equal(weight[2], before[2][2])
        assert torch.equal(bias[2], before[3][2])
        for o in (0, 1, 3):
            assert not torch.isclose(weight[o], before[2][o]).any()
        assert all(value.isfinite().all() for value in state(bnp, "b"))


def test_deterministic() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
        bnp = BNP(model)
        for seed in range(3):
            backward(model, data(4, 3, 6, 6, seed=seed).float())
            bnp.step()
        results.append([*gradients(model), *state(bnp, "0"), *state(bnp, "3")])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
