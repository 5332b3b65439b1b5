"""BNP against the paper: Algorithms 2 and 3 with their matrices, Proposition 7, and what is gathered when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from normkernels.optim import BNP
from tests.oracles import bnp as oracle
from tests.oracles import inputs
from tests.tolerances import assert_agree
from tests.tolerances.bnp import merged_floors, precondition_floors

# A layer, its input without the batch dimension, and r s of its output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(5, 4), (5,), 1),
    "linear-wide": (lambda: nn.Linear(40, 3), (40,), 1),
    "linear-tokens": (lambda: nn.Linear(5, 4), (7, 5), 7),
    "linear-image": (lambda: nn.Linear(5, 4), (3, 4, 5), 12),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), (5,), 1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), (3, 11), oracle.positions([11], [5], [1], [2], [1])),
    "conv1d-stride": (lambda: nn.Conv1d(3, 4, 4, stride=3), (3, 11), oracle.positions([11], [4], [3], [0], [1])),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 9), oracle.positions([8, 9], [3, 3], [1, 1], [0, 0], [1, 1])),
    "conv2d-wide": (lambda: nn.Conv2d(30, 2, 3), (30, 4, 4), oracle.positions([4, 4], [3, 3], [1, 1], [0, 0], [1, 1])),
    "conv2d-strided": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 8, 9),
        oracle.positions([8, 9], [3, 2], [2, 3], [1, 0], [1, 1]),
    ),
    "conv2d-dilated": (
        lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1)), (3, 8, 9), oracle.positions([8, 9], [3, 3], [1, 1], [0, 0], [2, 1])
    ),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, (3, 4), dilation=2, padding="same"), (3, 8, 9), 72),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 9), 72),
    "conv2d-groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5), 9),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5), 9),
    "conv2d-no-bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5), 9),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 4, 5),
        oracle.positions([3, 4, 5], [1, 2, 3], [1, 2, 1], [0, 0, 0], [1, 1, 1]),
    ),
}  # fmt: skip
EVERY_LAYER = pytest.mark.parametrize(("make", "shape", "positions"), LAYERS.values(), ids=LAYERS.keys())


def data(*shape: int, channel: int = 1, seed: int = 0) -> Tensor:
    """Draw channels of different mean and size, as far from normalized as activations are."""
    c = shape[channel]
    view = [c if i == channel % len(shape) else 1 for i in range(len(shape))]
    x = torch.randn(shape, dtype=torch.float64, generator=inputs.generator(seed))
    spread = torch.linspace(0.3, 3, c, dtype=torch.float64).view(view)
    return x * spread + torch.linspace(-2, 4, c, dtype=torch.float64).view(view)


def channels_second(x: Tensor, layer: nn.Module) -> Tensor:
    return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x


def channel_of(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def backward(model: nn.Module, *batches: Tensor) -> None:
    """Run backward from a loss that is not linear, and a mean over the samples."""
    for x in batches:
        model(x).sin().flatten(1).sum(1).mean().div(len(batches)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def single(layer: nn.Module, **options: Any) -> tuple[Any, BNP]:
    layer = layer.double()
    return layer, BNP(layer, **options)


def expected(layer: Any, running: oracle.Running, samples: int, positions: float) -> list[Tensor]:
    """Return the oracle's gradients from the ones that are there."""
    Gb = None if layer.bias is None else layer.bias.grad
    q2 = oracle.scale(layer.weight[0].numel(), samples, positions)
    new = oracle.precondition(layer.weight.grad, Gb, running.mean, running.var, q2, getattr(layer, "groups", 1))
    return [g for g in new if g is not None]


def state(bnp: BNP, name: str = "") -> tuple[Tensor, Tensor]:
    return bnp.state_dict()[name]["mean"], bnp.state_dict()[name]["variance"]


def assert_preconditioned(layer: Any, Gw: Tensor, Gb: Tensor, mean: Tensor, var: Tensor, q2: float) -> None:
    """Check gradients entry by entry against those from Gw and Gb, with these statistics."""
    want = oracle.precondition(Gw.double(), Gb.double(), mean.double(), var.double(), q2)
    bounds = precondition_floors(Gw, Gb, mean, var, q2, *want)
    for got, exact, bound in zip((layer.weight.grad, layer.bias.grad), want, bounds, strict=True):
        assert exact is not None and bound is not None
        assert ((got.double() - exact).abs() <= bound).all()


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


# Layers without gradient, without statistics, with neither.


def two_branches() -> tuple[nn.ModuleDict, BNP]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}).double()
    return model, BNP(model, rho=0.5)


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


def test_weights_tied_after_bnp_was_made() -> None:
    """The one gradient of two layers would be preconditioned twice."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    bnp = BNP(model)
    model[1].weight = model[0].weight
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="1: expected a weight of its own, got that of 0"):
        bnp.step()
