"""BNP in a training loop: with optimizers, AMP, clipping, copies, checkpoints, torch.compile; and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, prune

from normkernels.optim import BNP
from tests.oracles import inputs
from tests.tolerances import assert_agree


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).double()


def batch(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    g = inputs.generator(seed)
    x = torch.randn(samples, 3, 6, 6, dtype=torch.float64, generator=g) * 2 + 1
    return x, torch.randint(4, (samples,), generator=g)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x, target = batch(seed)
    return F.cross_entropy(model(x), target)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], object] | None, steps: range
) -> None:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        if before is not None:
            before()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def values(model: nn.Module, bnp: BNP | None = None) -> list[Tensor]:
    statistics = [] if bnp is None else [v for s in bnp.state_dict().values() for v in (s["mean"], s["variance"])]
    return [*(p.detach().clone() for p in model.parameters()), *statistics]


def assert_identical(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# With an optimizer.


def test_attached_is_as_by_hand() -> None:
    """It runs once for each optimizer.step(), and no more once the handle is removed."""
    results = []
    for attach in (True, False):
        model = network()
        bnp, optimizer = BNP(model), sgd(model)
        handle = bnp.attach(optimizer) if attach else None
        assert bnp.attached == attach
        train(model, optimizer, None if attach else bnp.step, range(3))
        if handle is not None:
            handle.remove()
            assert not bnp.attached
        before = bnp.state_dict()["0"]["mean"]
        train(model, optimizer, None, range(3, 4))
        assert torch.equal(before, bnp.state_dict()["0"]["mean"])
        results.append(values(model, bnp))
    assert_identical(*results)


def test_attached_again_after_the_handle_is_removed() -> None:
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    bnp.attach(optimizer).remove()
    bnp.attach(optimizer)
    with pytest.raises(RuntimeError, match="expected a BNP that is not attached"):
        bnp.attach(sgd(model))
    with pytest.raises(RuntimeError, match="expected a BNP that is not attached"):
        bnp.step()


def test_attach_refuses() -> None:
    model = network()
    bnp = BNP(model)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        bnp.attach(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"without those of 3; put the layers in skip"):
        bnp.attach(torch.optim.SGD([*model[0].parameters(), model[3].weight]))
    assert not bnp.attached
    model[3].bias.requires_grad_(False)
    bnp.attach(torch.optim.SGD([*model[0].parameters(), model[3].weight]))


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures_are_refused_when_attached(optimizer_type: Any) -> None:
    model = network()
    bnp, optimizer = BNP(model), optimizer_type(model.parameters(), lr=0.1)
    bnp.attach(optimizer)
    before = values(model, bnp)
    for call in (lambda c: optimizer.step(c), lambda c: optimizer.step(closure=c)):
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="closure: expected none"):
            call(lambda: loss_of(model))
    assert_identical(values(model, bnp), before)


def test_step_at_the_end_of_a_closure() -> None:
    results = []
    for closed in (True, False):
        model = network()
        bnp, optimizer = BNP(model), sgd(model)

        def closure(model: nn.Module = model, bnp: BNP = bnp, optimizer: torch.optim.SGD = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            bnp.step()
            return loss

        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        results.append(values(model, bnp))
    assert_identical(*results)


def test_step_without_a_forward_pass() -> None:
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    with pytest.raises(RuntimeError, match="step: expected a forward pass in training mode"):
        bnp.step()
    train(model, optimizer, bnp.step, range(1))
    with pytest.raises(RuntimeError, match="step: expected a forward pass in training mode"):
        bnp.step()


def test_remove() -> None:
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    bnp.attach(optimizer)
    train(model, optimizer, None, range(2))
    loss_of(model).backward()
    bnp.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    before = bnp.state_dict()["0"]["mean"]
    train(model, optimizer, None, range(1))
    assert torch.equal(bnp.state_dict()["0"]["mean"], before)
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    with pytest.raises(RuntimeError, match=r"attach: expected a BNP with hooks, got one after remove\(\)"):
        bnp.attach(optimizer)
    BNP(model)


# Orders: accumulation, clipping, AMP.


def test_clipping_before_and_after() -> None:
    """Clipping before it acts on the loss's gradients, clipping after it on what the optimizer gets."""
    model = network()
    bnp = BNP(model)
    loss_of(model).backward()
    bnp.step()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(total.item(), 1e-3, rtol=1e-3, atol=0)  # clip_grad_norm_ adds 1e-6 to the norm

    reference = [p.grad * norm / 1e-3 for p in model.parameters()]  # type: ignore[operator]
    other = network()
    bnp = BNP(other)
    loss_of(other).backward()
    nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
    clipped = [p.grad.clone() for p in other.parameters()]  # type: ignore[union-attr]
    bnp.step()
    for p, g, full in zip(other.parameters(), clipped, reference, strict=True):
        assert p.grad is not None
        assert not torch.allclose(p.grad, g)
        cosine = F.cosine_similarity(p.grad.flatten(), full.flatten(), dim=0).item()  # linear: the direction is kept
        assert cosine > 1 - 1e-12


def test_unscaling_before_or_after() -> None:
    """P P^T / q^2 is linear, so a scaled gradient gives the scaled result; powers of 2 change no bit."""
    results = []
    for scale in (1.0, 2.0**16):
        model = network()
        bnp = BNP(model)
        (loss_of(model) * scale).backward()
        bnp.step()
        results.append([p.grad / scale for p in model.parameters()])  # type: ignore[operator]
    assert_identical(*results)


class Scaled:
    """GradScaler's loop on a CPU, with a step whose gradients overflow."""

    def __init__(self, fused: bool = False) -> None:
        self.model = network().float()
        self.bnp = BNP(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, fused=fused)
        self.bnp.attach(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(self, seed: int, overflow: bool = False, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        x, target = batch(seed)
        loss = F.cross_entropy(self.model(x.float()), target)
        self.scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_grad_scaler() -> None:
    """The result is as without it, where nothing overflows."""
    scaled = Scaled()
    for seed in range(3):
        scaled.step(seed)
    model = network().float()
    bnp, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        x, target = batch(seed)
        F.cross_entropy(model(x.float()), target).backward()
        bnp.step()
        optimizer.step()
    assert_agree(values(scaled.model, scaled.bnp), values(model, bnp))


def test_skipped_step_takes_its_statistics_with_it() -> None:
    with_overflow, without = Scaled(), Scaled()
    for run in (with_overflow, without):
        run.step(0)
    with_overflow.step(1, overflow=True)
    without.scaler.update(with_overflow.scaler.get_scale())
    for run in (with_overflow, without):
        run.step(2)
    assert_identical(values(with_overflow.model, with_overflow.bnp), values(without.model, without.bnp))
    assert with_overflow.bnp.state_dict()["0"]["samples"] == 6


def test_skipped_step_counts_where_gradients_are_zeroed_in_place() -> None:
    """Zeros cannot be told from a gradient that is zero, as documented."""
    run = Scaled()
    run.step(0, set_to_none=False)
    run.step(1, overflow=True, set_to_none=False)
    run.step(2, set_to_none=False)
    assert run.bnp.state_dict()["0"]["samples"] == 12


def test_fused_optimizer_skips_by_itself_without_a_warning() -> None:
    run = Scaled(fused=True)
    run.step(0)
    before, statistics = values(run.model), run.bnp.state_dict()["0"]["mean"]
    run.step(1, overflow=True)
    assert_identical(values(run.model), before)
    assert not torch.equal(run.bnp.state_dict()["0"]["mean"], statistics)  # as documented
    run.step(2)
    assert all(value.isfinite().all() for value in values(run.model, run.bnp))


def test_gradients_of_a_generator_are_dropped_with_their_statistics() -> None:
    """The generator's loss goes through the discriminator, whose gradients are zeroed before its own loss."""
    model = network()
    bnp = BNP(model)
    loss_of(model, 5).backward()
    model.zero_grad()
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()  # accumulates
    bnp.step()
    assert bnp.state_dict()["0"]["samples"] == 12


# Copies, checkpoints, other types and devices.


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copied_model_gathers_nothing(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    bnp = BNP(model)
    loss_of(model).backward()
    other = duplicate(model)
    loss_of(other, 1).backward()
    bnp.step()
    assert bnp.state_dict()["0"]["samples"] == 6
    with pytest.raises(RuntimeError, match="forward pass"):
        loss_of(other, 1)
        bnp.step()
    BNP(other)  # and may have one of its own


def test_bnp_itself_is_not_copied() -> None:
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one for the copy of the model"):
            duplicate(BNP(network()))


def test_training_continues_bit_by_bit() -> None:
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    train(model, optimizer, bnp.step, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), bnp.state_dict()], file)
    assert file.tell() < 20_000  # not the buffers of all layers with each
    snapshot = bnp.state_dict()["3"]
    train(model, optimizer, bnp.step, range(3, 6))
    for key in ("mean", "variance"):
        assert not torch.equal(snapshot[key], bnp.state_dict()["3"][key])

    other = nn.Sequential(*[copy.deepcopy(module) for module in network()])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again, restored = sgd(other), BNP(other)
    train(other, again, restored.step, range(7, 8))
    file.seek(0)
    for target, state in zip((other, again, restored), torch.load(file), strict=True):
        target.load_state_dict(state)
    train(other, again, restored.step, range(3, 6))
    assert_identical(values(other, restored), values(model, bnp))


def test_load_before_the_first_step_and_over_what_was_gathered() -> None:
    model = network()
    bnp = BNP(model)
    state = bnp.state_dict()
    state["0"] = {"mean": torch.arange(3), "variance": torch.full((3,), 2.0), "samples": 5, "positions": 9}
    loss_of(model)
    bnp.load_state_dict(state)
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    assert_identical([bnp.state_dict()["0"]["mean"]], [torch.arange(3).double()])
    assert bnp.state_dict()["0"]["positions"] == 9.0


def test_load_refuses() -> None:
    bnp = BNP(network())
    good = bnp.state_dict()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"0": good["0"]}, ValueError, "expected the layers 0, 3, got one that lacks 3 and has none besides"),
        (good | {"x": good["0"]}, ValueError, "lacks none and has x besides"),
        (good | {"3": good["0"]}, ValueError, r"3.mean: expected shape \(32,\), got \(3,\)"),
        (good | {"3": good["3"] | {"variance": 1.0}}, TypeError, "3.variance: expected a torch.Tensor, got float"),
        (good | {"3": good["3"] | {"samples": -1}}, ValueError, "3.samples: expected at least 0, got -1"),
        (good | {"3": good["3"] | {"samples": 1.5}}, TypeError, "3.samples: expected an int"),
        (good | {"3": good["3"] | {"positions": float("nan")}}, ValueError, "3.positions: expected a finite number"),
        (good | {"3": {"mean": good["3"]["mean"]}}, ValueError, "3: expected variance in its state, got mean"),
        (good | {"3": None}, TypeError, "3: expected a mapping as its state, got NoneType"),
        (good | {1: None, None: 1}, ValueError, "lacks none and has 1, None besides"),  # type: ignore[dict-item]
        (good | {"3": good["3"] | {"mean": torch.full((32,), float("inf"))}}, ValueError, "3.mean: expected finite"),
        (good | {"3": good["3"] | {"variance": torch.full((32,), float("nan"))}}, ValueError, "3.variance: .* finite"),
        (good | {"3": good["3"] | {"variance": -torch.ones(32)}}, ValueError, "3.variance: .* numbers at least 0"),
        (good | {"3": good["3"] | {"mean": torch.ones(32) * 1j}}, TypeError, "3.mean: expected real numbers"),
    ]
    changed = copy.deepcopy(good["0"])
    changed["mean"] += 1
    for state, error, message in bad:
        if "0" in state:
            state = state | {"0": changed}
        with pytest.raises(error, match=message):
            bnp.load_state_dict(state)
        assert torch.equal(bnp.state_dict()["0"]["mean"], good["0"]["mean"])  # nothing was taken over
    with pytest.raises(TypeError, match="state_dict: expected a mapping, got NoneType"):
        bnp.load_state_dict(None)  # type: ignore[arg-type]


def test_a_model_without_a_name_is_called_model() -> None:
    layer = nn.Linear(5, 4)
    bnp = BNP(layer)
    with pytest.raises(ValueError, match="got one on model; remove"):
        BNP(layer)
    with pytest.raises(ValueError, match="without those of model; put"):
        bnp.attach(torch.optim.SGD([layer.bias]))
    with pytest.raises(ValueError, match="expected the layers model, got one that lacks model and has x besides"):
        bnp.load_state_dict({"x": {}})
    with pytest.raises(ValueError, match="model: expected mean in its state, got nothing"):
        bnp.load_state_dict({"": {}})
    with pytest.raises(ValueError, match="got 'x'; its layers are model"):
        BNP(layer, skip=["x"])
    layer(torch.ones(3, 5)).sum().backward()
    layer.weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="as they are in model;"):
        bnp.step()


def test_model_may_change_its_type() -> None:
    model = network().float()
    bnp, optimizer = BNP(model, rho=0.5), sgd(model)
    x, target = batch()
    F.cross_entropy(model(x.float()), target).backward()
    bnp.step()
    before = bnp.state_dict()["0"]["mean"]
    model.double()
    train(model, optimizer, bnp.step, range(1))
    after = bnp.state_dict()["0"]["mean"]
    assert before.dtype == torch.float32 and after.dtype == torch.float64
    torch.testing.assert_close(after, before.double() * 1.5, rtol=1e-6, atol=0)  # the same batch weighs 1/2, then 3/4


def test_a_weight_may_be_replaced() -> None:
    """It is replaced as when a new head is put into a network."""
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    train(model, optimizer, bnp.step, range(2))
    old = model[3].weight
    model[3].weight = nn.Parameter(torch.ones_like(old))
    train(model, sgd(model), bnp.step, range(2))
    assert not old._post_accumulate_grad_hooks
    loss_of(model, 2).backward()
    model.zero_grad()
    loss_of(model, 3).backward()
    bnp.step()
    assert bnp.state_dict()["3"]["samples"] == 6  # gradients of the new one are dropped as well


def test_a_weight_of_another_shape_is_refused() -> None:
    model = network()
    bnp = BNP(model)
    message = "3: expected a weight for 32 input channels, as when BNP was made, got one for 7"
    loss_of(model).backward()
    model[3].weight = nn.Parameter(torch.ones(4, 7).double())
    with pytest.raises(ValueError, match=message):
        bnp.step()
    with pytest.raises(ValueError, match=message):
        model[3](torch.ones(2, 7).double())


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: parametrize.register_parametrization(module, "bias", nn.Identity()),
    ],
)
def test_a_weight_that_is_computed_afterwards_is_refused(change: Callable[[nn.Module], object]) -> None:
    model = network()
    bnp = BNP(model)
    loss_of(model).backward()
    change(model[3])
    message = r"3: expected (weight|bias) to be a parameter of the layer, got one that is computed from others"
    with pytest.raises(ValueError, match=message):
        bnp.step()
    with pytest.raises(ValueError, match=message):
        loss_of(model)
    model.eval()
    loss_of(model)


@pytest.mark.gpu
def test_on_a_gpu_with_a_model_that_moved() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = network()
        bnp = BNP(model)
        model.to(device)
        optimizer = sgd(model)
        for seed in range(3):
            optimizer.zero_grad()
            x, target = (value.to(device) for value in batch(seed))
            F.cross_entropy(model(x), target).backward()
            bnp.step()
            optimizer.step()
        assert bnp.state_dict()["0"]["mean"].device.type == device
        results.append([value.cpu() for value in values(model, bnp)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_warning_on_a_gpu_comes_later() -> None:
    model = network().cuda()
    bnp = BNP(model)
    x, target = (value.cuda() for value in batch())
    F.cross_entropy(model(x), target).backward()
    model[3].weight.grad[1, 2] = float("nan")
    model(x)
    bnp.step()
    torch.cuda.synchronize()
    model(x)
    with pytest.warns(UserWarning, match="not finite as they are in 3"):
        bnp.step()


# torch.compile's own, the last about activations between two graphs.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:The .grad attribute of a Tensor"
)
@pytest.mark.parametrize("attach", [False, True])
def test_compiled_model(attach: bool) -> None:
    results = []
    for compiled in (True, False):
        torch.compiler.reset()
        model = network()
        bnp, optimizer = BNP(model), sgd(model)
        if attach:
            bnp.attach(optimizer)
        counter = CompileCounterWithBackend("aot_eager")
        called = torch.compile(model, backend=counter) if compiled else model
        train(called, optimizer, None if attach else bnp.step, range(2))
        graphs = counter.frame_count
        loss_of(called).backward()  # a micro-batch more
        train(called, optimizer, None if attach else bnp.step, range(2, 4))
        assert counter.frame_count == graphs  # nothing is compiled again
        assert bnp.state_dict()["0"]["samples"] == 6
        results.append(values(model, bnp))
    assert_agree(*results)


def test_the_package_does_not_import_dynamo() -> None:
    """Importing it takes more than a second."""
    code = "import sys, normkernels; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The purpose of BNP.


def test_badly_scaled_inputs_cost_nothing() -> None:
    """Theorem 3: the Hessian of least squares becomes that of normalized inputs, here within 1/2 of the identity.

    So 30 steps with rate 1 shrink the error by 2^30, its square by 1e18. Gradient descent needs a rate of at most
    2 / |H|, for columns whose squared norms differ by 1e5.
    """
    g = inputs.generator(0)
    x = torch.randn(256, 6, dtype=torch.float64, generator=g) * torch.logspace(-1.5, 1, 6, dtype=torch.float64) + 3
    target = x @ torch.randn(6, 2, dtype=torch.float64, generator=g) + 1
    errors = {}
    largest = torch.linalg.matrix_norm(torch.cat([torch.ones_like(x[:, :1]), x], 1), 2).square().item() / len(x)
    for preconditioned in (True, False):
        model = nn.Linear(6, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0 if preconditioned else 1 / largest)
        bnp = BNP(model, rho=0.0, eps1=0.0, eps2=0.0)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(x) - target).square().sum(1).mean() / 2
            loss.backward()
            losses.append(loss.item())
            if preconditioned:
                bnp.step()
            optimizer.step()
        errors[preconditioned] = losses[-1] / losses[0]
    assert errors[True] < 1e-15
    assert errors[False] > 1e-5


def test_recipe_for_residual_networks() -> None:
    """BNP with GroupNorm, momentum and weight decay fits four noisy patterns."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.branch(x))

    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU()]
    model = nn.Sequential(*stem, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-4)
    BNP(model).attach(optimizer)
    x, target = batch(samples=32)
    x += 2 * torch.randn(4, 3, 6, 6, dtype=x.dtype)[target]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.float()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# Refusals, and layers that are left out.


def test_skip() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3))
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "body": block, "up": nn.ConvTranspose2d(4, 3, 2)})
    model["head"] = nn.Linear(4, 2)
    names: list[tuple[tuple[Any, ...], list[str]]] = [
        ((), ["stem", "body.0", "body.1", "head"]),
        (("stem",), ["body.0", "body.1", "head"]),
        (("body", model["head"]), ["stem"]),
        ((block[1],), ["stem", "body.0", "head"]),
        (("up",), ["stem", "body.0", "body.1", "head"]),
    ]
    for skip, left in names:
        bnp = BNP(model, skip=skip)
        assert list(bnp.state_dict()) == left
        bnp.remove()


def test_skipped_layers_are_left_alone() -> None:
    model = network()
    bnp = BNP(model, skip=["3"])
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    bnp.step()
    same = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]  # type: ignore[arg-type]
    assert same == [False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"skip": ["body"]},
            ValueError,
            "skip: expected names or modules of the model, got 'body'; its layers are 0, 3",
        ),
        ({"skip": [nn.Linear(1, 1)]}, ValueError, "skip: expected names or modules of the model, got Linear"),
        ({"skip": "0"}, TypeError, "skip: expected a list of names or modules, got '0'"),
        ({"skip": nn.Sequential()}, TypeError, "skip: expected a list of names or modules"),
        ({"skip": [0]}, TypeError, "skip: expected names or modules, got 0"),
        ({"skip": [None]}, TypeError, "skip: expected names or modules, got None"),
        ({"skip": ["0", "3"]}, ValueError, "model: expected at least one Linear"),
        ({"rho": 1.5}, ValueError, r"rho: expected a finite number within \[0, 1\], got 1.5"),
        ({"rho": "a"}, TypeError, "rho: expected a number"),
        ({"eps1": -1e-2}, ValueError, "eps1: expected"),
        ({"eps2": float("nan")}, ValueError, "eps2: expected"),
        ({"process_group": True}, TypeError, "process_group: expected a ProcessGroup, None or False, got True"),
    ],
)
def test_arguments_it_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        BNP(model, **arguments)
    assert not any(module._forward_hooks for module in model.modules())


def test_model_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        BNP([nn.Linear(1, 1)])  # type: ignore[arg-type]


def tied(kind: str) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    a: Any = model["a"]
    b: Any = model["b"]
    if kind == "biases":
        b.weight = a.weight
    elif kind == "under another name":
        a.register_parameter("extra", a.weight)
    elif kind == "only bias":
        b.bias = a.bias
    elif kind == "embedding":
        model["b"] = nn.Embedding(4, 4)
        model["b"].weight = a.weight
    elif kind == "parameter":
        model.register_parameter("free", a.weight)
    elif kind == "groups":
        model["a"] = nn.Conv1d(4, 4, 1, bias=False)
        model["b"] = nn.Conv1d(8, 4, 1, groups=2, bias=False)
        model["b"].weight = model["a"].weight
    elif kind == "parametrized":
        parametrizations.orthogonal(b)
    elif kind == "bias parametrized":
        parametrize.register_parametrization(b, "bias", nn.Identity())
    elif kind == "weight norm":
        parametrizations.weight_norm(b)
    elif kind == "spectral norm":
        nn.utils.spectral_norm(b)
    elif kind == "pruned":
        prune.identity(b, "weight")
    elif kind == "lazy":
        model["b"] = nn.LazyLinear(3)
    elif kind == "complex":
        model["b"] = nn.Linear(4, 4, dtype=torch.complex64)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    ("kind", "message", "skip"),
    [
        ("biases", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("only bias", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("embedding", "a, b: expected a weight and bias that belong to one layer", ["a"]),
        ("under another name", "a: expected a weight and bias that belong to one layer", ["a"]),
        ("parameter", "a: expected a weight and bias that belong to one layer", ["a"]),
        ("groups", "a, b: expected a weight and bias that belong to one layer", ["a", "b"]),
        ("parametrized", "b: expected weight to be a parameter of the layer, got one that is computed", ["b"]),
        ("bias parametrized", "b: expected bias to be a parameter of the layer", ["b"]),
        ("weight norm", "b: expected weight to be a parameter of the layer", ["b"]),
        ("spectral norm", "b: expected weight to be a parameter of the layer", ["b"]),
        ("pruned", "b: expected weight to be a parameter of the layer", ["b"]),
        ("lazy", "b: expected an initialized layer, got LazyLinear, whose weight has no shape", ["b"]),
        ("complex", "b: expected weight in float16, .* got torch.complex64; put the layer in skip", ["b"]),
    ],
)
def test_layers_it_refuses(kind: str, message: str, skip: list[str]) -> None:
    model = tied(kind)
    with pytest.raises(ValueError, match=message):
        BNP(model)
    assert "c" in BNP(model, skip=skip).state_dict()


def test_a_layer_is_skipped_with_those_that_share_its_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    with pytest.raises(ValueError, match="0, 1: expected a weight and bias that belong to one layer"):
        BNP(model, skip=["1"])
    assert list(BNP(model, skip=["0", "1"]).state_dict()) == ["2"]


def test_a_second_bnp() -> None:
    model = network()
    BNP(model, skip=["0"])
    with pytest.raises(
        ValueError, match=re.escape("model: expected layers without BNP, got one on 3; remove() it first")
    ):
        BNP(model)
    BNP(model, skip=["3"])


def test_conv_norm_and_transposed_convolutions_are_no_layers() -> None:
    import normkernels as nk

    model = nn.Sequential(nk.ConvNorm2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 2, 1))
    assert list(BNP(model).state_dict()) == ["2"]


def test_multihead_attention_keeps_the_gradients_of_its_projection() -> None:
    """Its out_proj is a Linear that is never called."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    bnp = BNP(model)
    x = torch.randn(5, 3, 8, generator=inputs.generator(0))
    model["head"](model["attention"](x, x, x)[0]).sin().sum().backward()
    projection: Any = model["attention"].out_proj
    before = projection.weight.grad.clone()
    bnp.step()
    assert torch.equal(projection.weight.grad, before)
