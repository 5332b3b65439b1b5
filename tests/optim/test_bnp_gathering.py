"""The statistics that BNP gathers: which calls count, how they are merged, and what happens to a layer without them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from normkernels.optim import BNP
from tests.optim.bnp_layers import backward, data, expected, gradients, single, state, two_branches
from tests.oracles import bnp as oracle
from tests.oracles import inputs
from tests.tolerances import assert_agree
from tests.tolerances.bnp import merged_floors

# Statistics that are gathered.


def test_micro_batches_count_as_one_batch() -> None:
    """N is the sum of uneven ones, moments are merged, and the gradients were summed by autograd."""
    x = data(10, 3, 6, 6)
    grads = []
    for parts in ([10], [4, 1, 5]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 2)).double()
        bnp = BNP(model)
        for part in x.split(parts):
            (model(part).sin().flatten(1).sum() / 10).backward()
        bnp.step()
        assert [s["samples"] for s in bnp.state_dict().values()] == [10, 10]
        grads.append([*gradients(model), *(s["mean"] for s in bnp.state_dict().values())])
        grads[-1] += [s["variance"] for s in bnp.state_dict().values()]
    assert_agree(*grads)


def test_large_means_cost_no_digits_when_merged() -> None:
    layer = nn.Linear(3, 2)
    bnp = BNP(layer, rho=0.0)
    x = (torch.randn(64, 3, dtype=torch.float64, generator=inputs.generator(0)) + 1e4).float()
    for part in x.split(16):
        layer(part).sum().backward()
    bnp.step()
    want = oracle.statistics(x.double())
    for got, exact, bound in zip(state(bnp), want, merged_floors(x, want[1], 3), strict=True):
        assert ((got.double() - exact).abs() <= bound).all()


def test_a_module_called_twice_is_merged() -> None:
    """Its inputs have different sizes: N is summed, positions are averaged over the samples."""
    layer, bnp = single(nn.Conv2d(3, 4, 2), rho=0.0)
    x, y = data(2, 3, 6, 6), data(4, 3, 5, 7, seed=1)
    (layer(x).sin().sum() + layer(y).sin().sum()).backward()
    rows = torch.cat([x.movedim(1, 0).flatten(1), y.movedim(1, 0).flatten(1)], 1)
    running = oracle.Running(3, rho=0.0)
    running.update(rows.T)
    positions = (2 * 25 + 4 * 24) / 6
    want = expected(layer, running, 6, positions)
    bnp.step()
    assert bnp.state_dict()[""]["positions"] == positions
    assert_agree(gradients(layer), want)
    assert_agree(state(bnp), [running.mean, running.var])


def test_modules_that_share_weight_and_bias_are_one_layer() -> None:
    """They count as one module that is called twice, with other strides, too."""
    grads = []
    for shared in (True, False):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 3, 3, padding=1).double()
        second = nn.Conv2d(3, 3, 3, padding=1).double() if shared else first
        if shared:
            second.weight, second.bias = first.weight, first.bias
        model = nn.Sequential(first, nn.ReLU(), second)
        bnp = BNP(model)
        backward(model, data(4, 3, 6, 6))
        bnp.step()
        assert list(bnp.state_dict()) == ["0"]
        assert bnp.state_dict()["0"]["samples"] == 8
        grads.append([*gradients(model), *state(bnp, "0")])
    assert_agree(*grads)


def test_keyword_input() -> None:
    layer, bnp = single(nn.Linear(5, 4), rho=0.0)
    x = data(6, 5)
    layer(input=x).sum().backward()
    bnp.step()
    assert_agree(state(bnp)[0], oracle.statistics(x)[0])


def test_the_input_is_what_the_layer_got() -> None:
    """Other pre-hooks may change it, and forward hooks the output, whether they came before or after."""
    x = data(6, 5)
    for later in (True, False):
        layer: Any = nn.Linear(5, 4).double()
        bnp = BNP(layer, rho=0.0) if later else None
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        layer.register_forward_hook(lambda module, args, output: output.sum())
        bnp = bnp or BNP(layer, rho=0.0)
        layer(x).backward()
        bnp.step()
        assert_agree(state(bnp)[0], 2 * oracle.statistics(x)[0])
        assert bnp.state_dict()[""]["positions"] == 1


def test_evaluation_gathers_nothing() -> None:
    layer, bnp = single(nn.Linear(5, 4))
    layer.eval()
    layer(data(6, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="expected a forward pass in training mode"):
        bnp.step()
    layer.train()
    layer(data(6, 5)).sum().backward()
    bnp.step()


def test_a_call_that_fails_leaves_nothing() -> None:
    layer, bnp = single(nn.Linear(5, 4))
    with pytest.raises(RuntimeError):
        layer(data(6, 7))
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once(use_reentrant: bool) -> None:
    x = data(6, 5).requires_grad_()
    results = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        bnp = BNP(model)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
        y.sin().sum().backward()
        bnp.step()
        assert bnp.state_dict()["0"]["samples"] == 6
        results.append([*gradients(model), *state(bnp, "0"), *state(bnp, "2")])
    assert_agree(*results)


def test_empty_batch_gathers_nothing() -> None:
    """It is a forward pass all the same: the last rank of an uneven loader has one."""
    layer, bnp = single(nn.Linear(5, 4))
    layer(torch.zeros(0, 5, dtype=torch.float64)).sum().backward()
    bnp.step()
    assert torch.equal(state(bnp)[0], torch.zeros(5, dtype=torch.float64))
    assert bnp.state_dict()[""]["samples"] == 0


def test_autocast_does_not_matter_to_the_statistics() -> None:
    layer = nn.Linear(5, 4)
    bnp = BNP(layer, rho=0.0)
    x = data(6, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    bnp.step()
    mean, var = oracle.statistics(x.double())
    assert_agree(state(bnp), [mean.float(), var.float()])


def test_layer_not_used_in_a_step() -> None:
    """It is left alone before its first statistics, then preconditioned with the running ones and the last N."""
    model, bnp = two_branches()
    a, b = model["a"], model["b"]
    b.weight.grad, b.bias.grad = torch.ones_like(b.weight), torch.ones_like(b.bias)
    a(data(6, 5)).sum().backward()
    bnp.step()
    assert torch.equal(b.weight.grad, torch.ones_like(b.weight))
    assert torch.equal(state(bnp, "b")[1], torch.ones(5, dtype=torch.float64))

    model.zero_grad()
    (b(data(2, 5)).sum() + a(data(2, 5)).sum()).backward()
    bnp.step()
    running = oracle.Running(5, rho=0.5)
    running.update(data(2, 5))
    model.zero_grad()
    b.weight.grad, b.bias.grad = torch.ones_like(b.weight), torch.ones_like(b.bias)
    want = expected(b, running, 2, 1)
    a(data(6, 5)).sum().backward()
    before = state(bnp, "b")
    bnp.step()
    assert_agree([b.weight.grad, b.bias.grad], want)
    for now, then in zip(state(bnp, "b"), before, strict=True):
        assert torch.equal(now, then)


def test_layer_without_gradient_updates_its_statistics_and_drops_the_batch() -> None:
    model, bnp = two_branches()
    running = oracle.Running(5, rho=0.5)
    for seed in range(2):
        x = data(6, 5, seed=seed)
        with torch.no_grad():
            model["b"](x)
        model["a"](x).sum().backward()
        bnp.step()
        running.update(x)
        assert model["b"].weight.grad is None
        assert_agree(state(bnp, "b"), [running.mean, running.var])
        assert bnp.state_dict()["b"]["samples"] == 6


def test_frozen_weights_gather_nothing_and_are_left_alone() -> None:
    model, bnp = two_branches()
    model["b"].requires_grad_(False)
    model["b"].weight.grad = torch.ones_like(model["b"].weight)  # stale
    x = data(6, 5)
    model["a"](x + model["b"](x).sum()).sum().backward()
    bnp.step()
    assert bnp.state_dict()["b"]["samples"] == 0
    assert torch.equal(model["b"].weight.grad, torch.ones_like(model["b"].weight))

    model["b"].requires_grad_()
    model["b"](x).sum().backward()
    bnp.step()
    assert bnp.state_dict()["b"]["samples"] == 6

    model["b"].requires_grad_(False)
    before = model["b"].weight.grad.clone()
    model["a"](x).sum().backward()
    bnp.step()
    assert torch.equal(model["b"].weight.grad, before)


def test_functional_call_gathers_nothing() -> None:
    """Its weights are not the module's, so their gradients are not, either."""
    layer, bnp = single(nn.Linear(5, 4))
    weights = {"weight": torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)}
    torch.func.functional_call(layer, weights, data(6, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    parameters = {"weight": nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))}
    torch.func.functional_call(layer, parameters, data(6, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    torch.func.functional_call(layer, parameters, data(6, 5))
    layer(data(3, 5)).sum().backward()
    bnp.step()
    assert bnp.state_dict()[""]["samples"] == 3


def test_only_frozen_layers_were_called() -> None:
    model, bnp = two_branches()
    model["b"].requires_grad_(False)
    model["b"](data(6, 5))
    bnp.step()
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()


def fake(layer: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(x.shape, dtype=x.dtype))


# Warnings from what torch.export and torch.func.jvp import.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.export.export(layer, (x,), strict=False),
        lambda layer, x: torch.export.export(layer, (x,), strict=True),
        fake,
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    ],
    ids=["export", "export-strict", "fake", "vmap", "grad", "jvp"],
)
def test_transforms_and_tracers_gather_nothing(transform: Callable[[nn.Module, Tensor], object]) -> None:
    """They do so in training mode, too, and work as without BNP."""
    layer, bnp = single(nn.Linear(5, 4), rho=0.0)
    x = data(6, 5)
    transform(layer, x)
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    layer(x[:3]).sum().backward()
    transform(layer, x)
    bnp.step()
    assert bnp.state_dict()[""]["samples"] == 3
    assert_agree(state(bnp)[0], oracle.statistics(x[:3])[0])


def test_forward_mode() -> None:
    layer, bnp = single(nn.Linear(5, 4), rho=0.0)
    x = data(6, 5)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(y).tangent is not None
        y.sum().backward()
        bnp.step()
    assert_agree(state(bnp)[0], oracle.statistics(x)[0])


def test_inference_mode() -> None:
    """A step in it, and a forward pass, leave no tensors that later steps could not change."""
    layer, bnp = single(nn.Linear(5, 4), rho=0.5)
    running = oracle.Running(5, rho=0.5)
    for first in (True, False):
        x = data(6, 5)
        layer.zero_grad()
        layer(x).sum().backward()
        with torch.inference_mode(first):
            bnp.step()
        running.update(x)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    bnp.step()
    running.update(x)
    assert bnp.state_dict()[""]["samples"] == 12
    assert_agree(state(bnp), [running.mean, running.var])
    bnp.load_state_dict(bnp.state_dict())


class Unusual(nn.Linear):
    """A subclass with another signature: args of the call are what a test wants."""

    def forward(self, *args: Any) -> Any:  # type: ignore[override]
        return args[1]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, 5).to_sparse(), torch.ones(2, 4)), TypeError, "0: .* tensor as input, got torch.sparse_coo"),
        (((1, 2), torch.ones(2, 4)), TypeError, "0: .* tensor as input, got tuple"),
        ((torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 4)), TypeError, "0: .* tensor as input, got torch.int64"),
        ((torch.ones(2, 5), (torch.ones(2, 4),)), TypeError, "0: .* tensor as output, got tuple"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"0: expected an input of 5 channels, got shape \(2, 3\)"),
    ],
)
def test_calls_it_cannot_read(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = Unusual(5, 4)
    bnp = BNP(nn.Sequential(layer, nn.Linear(1, 1)))
    with pytest.raises(error, match=f"{message}.*; put the layer in skip"):
        layer(*args)
    layer.eval()
    layer(*args)
    layer.train().requires_grad_(False)
    layer(*args)
    bnp.step()


def test_weight_and_bnp_can_be_collected() -> None:
    layer, bnp = single(nn.Linear(5, 4))
    bnp.attach(torch.optim.SGD(layer.parameters(), lr=0.1))
    backward(layer, data(6, 5))
    references = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(bnp)]
    del layer, bnp
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
