"""BNP in a training loop: with optimizers, clipping, AMP and skipped steps; and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.optim import BNP
from tests.optim.bnp_networks import assert_identical, batch, loss_of, network, sgd, train, values
from tests.oracles import inputs
from tests.tolerances import assert_agree

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
