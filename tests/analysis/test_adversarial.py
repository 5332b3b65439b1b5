"""Attacks: BIM on models whose best perturbation is known and against an independent implementation, and noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.analysis import accuracy, bim, gaussian_noise, simba
from tests.analysis.attacked import BIM, MODEL, SIMBA, D, Linear, X, Y, images, network
from tests.tolerances import IDENTITY, assert_identity
from tests.tolerances.analysis import assert_bim, sampling

# BIM


@pytest.mark.parametrize("targeted", [False, True])
def test_bim_of_a_linear_model(targeted: bool) -> None:
    """Every step is alpha sign(w), away from y or to it, until eps or the bounds are reached."""
    w, x, y = torch.randn(8, dtype=D), torch.rand(5, 8, dtype=D), torch.tensor([0, 1, 0, 1, 1])
    way = torch.where((y == 0) ^ targeted, 1.0, -1.0)[:, None] * w.sign()
    for num_steps in (1, 2, 3, 9):
        got = bim(Linear(w), x, y, eps=0.1, step_size=0.04, num_steps=num_steps, targeted=targeted)
        assert_identity(got, (x + min(0.04 * num_steps, 0.1) * way).clamp(0, 1))


def test_bim_takes_the_gradient_where_it_is() -> None:
    """The logit of class 1 is largest at 0.5: on the other side of it, steps go back."""
    peak = lambda x: torch.stack([torch.zeros(len(x), dtype=D), -(x[:, 0] - 0.5).square()], 1)  # noqa: E731
    x, y = torch.tensor([[0.53], [0.43]], dtype=D), torch.tensor([1, 1])
    for num_steps, expected in ((1, [0.49, 0.47]), (2, [0.53, 0.51]), (3, [0.49, 0.47])):
        got = bim(peak, x, y, eps=0.5, step_size=0.04, num_steps=num_steps, targeted=True)
        assert_identity(got[:, 0], torch.tensor(expected, dtype=D))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 2.0)])
def test_agrees_with_adversarial_robustness_toolbox(targeted: bool, bounds: tuple[float, float]) -> None:
    """The result is that of the toolbox's BIM in float32.

    A gradient whose sign its rounding decides would differ; here none is that small.
    """
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    net = network(torch.float32).eval()
    x, y = images(12, torch.float32)
    x = bounds[0] + (bounds[1] - bounds[0]) * x
    x[0, 0] = bounds[0]
    got = bim(net, x, y, **BIM, bounds=bounds, targeted=targeted)
    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), (2, 4, 5), 3, clip_values=bounds, device_type="cpu")
    attack = evasion.BasicIterativeMethod(
        classifier, eps=0.1, eps_step=0.04, max_iter=5, targeted=targeted, batch_size=12, verbose=False
    )
    expected = attack.generate(x.numpy(), np.eye(3, dtype=np.float32)[y])
    assert_bim(got, torch.from_numpy(expected), steps=5)
    assert (got - x).abs().amax() > 0.09


def test_bim_raises_the_loss_within_its_budget() -> None:
    net, (x, y) = network().eval(), images()
    got = bim(net, x, y, **BIM)
    assert F.cross_entropy(net(got), y) > F.cross_entropy(net(x), y)
    assert got.min() >= 0 and got.max() <= 1 and not got.requires_grad
    assert (got - x).abs().max() <= 0.1 * (1 + IDENTITY)
    towards = bim(net, x, y, **BIM, targeted=True)
    assert F.cross_entropy(net(towards), y) < F.cross_entropy(net(x), y)
    assert torch.equal(bim(net, x, y, **{**BIM, "eps": 0}), x)


def test_bim_of_batches_and_of_other_losses() -> None:
    net, (x, y) = network(), images(7)
    whole = bim(net, x, y, **BIM)
    assert torch.equal(whole, bim(net, x, y, **BIM, batch_size=3))
    summed = bim(net, x, y, **BIM, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(whole, summed)
    assert torch.equal(bim(net, x, y, **BIM, loss=lambda logits, y: -F.cross_entropy(logits, y)),
                       bim(net, x, y, **BIM, targeted=True))  # fmt: skip
    one_hot = F.one_hot(y, 3).double()
    assert torch.equal(whole, bim(net, x, one_hot, **BIM))  # classes as probabilities, which cross_entropy takes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_of_samples(dtype: torch.dtype) -> None:
    net, (x, y) = network(torch.float32), images(dtype=dtype)
    model = lambda x: net.eval()(x.float())  # noqa: E731
    for got in (bim(model, x, y, **BIM), simba(model, x, y, **SIMBA).x, gaussian_noise(x, 0.1)):
        assert got.dtype == dtype and not torch.equal(got, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, D])
@pytest.mark.parametrize(("bounds", "eps"), [((0.0, 1.0), 8 / 255), ((-0.7, 0.9), 0.1), ((-1e5, 1e5), 3e4)])
@pytest.mark.parametrize("way", [1.0, -1.0])
def test_bim_of_any_type_stays_within_eps_and_bounds(
    dtype: torch.dtype, bounds: tuple[float, float], eps: float, way: float
) -> None:
    """The result is exactly within eps and bounds, in float64, and the type's next number is not.

    The latter is not tested for float64, where it may round to eps.
    """
    x = bounds[0] + torch.linspace(0.01, 0.99, 4000, dtype=D)[:, None] * (bounds[1] - bounds[0])
    x = torch.cat([x.clamp(-65000, 65000) * scale for scale in (1.0, 0.01, 1e-4)]).to(dtype)

    def inside(samples: Tensor) -> Tensor:
        change = (samples.double() - x.double()).abs()
        return (change <= eps) & (samples.double() >= bounds[0]) & (samples.double() <= bounds[1])

    model = Linear(torch.tensor([way], dtype=dtype))
    y = torch.zeros(len(x), dtype=torch.int64)
    got = bim(
        model, x, y, eps=eps, step_size=eps, num_steps=2, bounds=bounds, loss=lambda logits, y: logits[:, 1].double()
    )
    assert got.dtype == dtype and ((got.double() - x.double()).sign() == way).all()
    assert inside(got).all()
    if dtype != D:
        further = torch.nextafter(got, torch.full_like(got, way * math.inf))
        assert not (inside(further) & further.isfinite()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_half_types_add_up(dtype: torch.dtype) -> None:
    """Ten steps of an eighth of the spacing at 1 add up to one spacing; in the type itself none would move x."""
    step, x = torch.finfo(dtype).eps / 8, torch.ones(3, 2, dtype=dtype)
    got = bim(Linear(torch.ones(2, dtype=dtype)), x, torch.zeros(3, dtype=torch.int64),
              eps=0.5, step_size=step, num_steps=10, bounds=(0.0, 2.0))  # fmt: skip
    assert torch.equal(got, torch.full_like(x, 1 + 8 * step))


def attacks(net: Any, x: Tensor, y: Tensor) -> None:
    bim(net, x, y, **BIM)
    simba(net, x, y, **SIMBA)
    accuracy(net, x, y)


def test_modes_statistics_and_gradients_stay() -> None:
    net, (x, y) = network(), images()
    net[3].eval()
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    clean = x.clone()
    with torch.no_grad():  # as evaluation code is; BIM differentiates all the same
        attacks(net, x, y)
    assert [module.training for module in net] == [True, True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert torch.equal(x, clean) and not x.requires_grad


@pytest.mark.parametrize("attack", [bim, simba, accuracy])
def test_modes_come_back_after_an_error(attack: Any) -> None:
    net, (x, y) = network(), images()
    options: dict[Any, Any] = {bim: BIM, simba: SIMBA, accuracy: {}}
    with pytest.raises(RuntimeError):
        attack(net, x[:, :1], y, **options[attack])
    assert all(module.training for module in net.modules())


def test_models_that_are_not_differentiable() -> None:
    x, y = images()
    net = network()
    for model in (
        lambda x: torch.rand(len(x), 3),
        torch.no_grad()(net),
        lambda x: net(x.round().detach()),
        lambda x: F.one_hot(net(x).argmax(1), 3).double(),
        lambda x: F.one_hot(net(x).argmax(1), 3),
        lambda x: net(x).argmax(1),
    ):
        with pytest.raises(ValueError, match="model: expected a model that is differentiable in its input, got"):
            bim(model, x, y, **BIM)
    with pytest.raises(ValueError, match="gradient of the loss: expected finite values"):
        bim(lambda x: net(x) * math.inf, x, y, **BIM)
    assert simba(lambda x: F.one_hot(net(x).argmax(1), 3).double(), x, y, **SIMBA).queries.sum() > 0  # no gradient here


def test_bim_where_the_gradient_is_zero() -> None:
    """Samples whose gradient is zero come back as they were, without an error."""
    net, (x, y) = network().eval(), images()
    assert torch.equal(bim(lambda x: net(x.round()), x, y, **BIM), x)


def test_bim_in_inference_mode() -> None:
    x, y = images()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"bim: expected a call outside torch\.inference_mode"),
    ):
        bim(network(), x, y, **BIM)


def test_logits_that_say_nothing() -> None:
    """Logits that are not finite are an error: the largest of NaN is at NaN's own place, 0, which may be y."""
    x, y = images()
    for attack, options in ((simba, SIMBA), (accuracy, {})):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="logits: expected finite values, got 18 that are not"):
                attack(lambda x, value=value: torch.full((len(x), 3), value), x, y * 0, **options)


@pytest.mark.parametrize("attack", [bim, simba, accuracy])
@pytest.mark.parametrize(
    ("model", "y", "error", "message"),
    [
        (lambda x: MODEL(x).sum(1), Y, ValueError, r"logits: expected shape \(N, K\) for the 4 samples, got \(4,\)"),
        (lambda x: MODEL(x)[:2], Y, ValueError, r"logits: expected shape .* 4 samples, got \(2, 3\)"),
        (lambda x: None, Y, TypeError, "logits: expected a torch.Tensor, got NoneType"),
        (3, Y, TypeError, "model: expected a function or a module, got int"),
        (None, Y + 3, ValueError, "y: expected classes from 0 to 2, got 3 to 3"),
        (None, Y - 100, ValueError, "y: expected classes from 0 to 2, got -100 to -100"),  # ignore_index
        (None, Y.float(), TypeError, "y: expected classes of type torch.int64, got torch.float32"),
        (None, Y.int(), TypeError, "y: expected classes of type torch.int64, got torch.int32"),
        (None, Y[:, None], ValueError, r"y: expected shape \(4,\), got \(4, 1\)"),
        (None, Y.to("meta"), ValueError, "y: expected a tensor on cpu like x, got one on meta"),
    ],
)
def test_bad_models_and_classes(attack: Any, model: Any, y: Tensor, error: type[Exception], message: str) -> None:
    options: dict[Any, Any] = {bim: BIM, simba: SIMBA, accuracy: {}}
    with pytest.raises(error, match=message):
        attack(MODEL if model is None else model, X, y, **options[attack])


def test_bim_of_other_losses_takes_what_they_take() -> None:
    """The loss may take one logit a sample, and signs for classes."""
    x, sign = torch.rand(4, 3, dtype=D), torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=D)
    got = bim(lambda x: x.sum(1), x, sign, **BIM, loss=lambda score, sign: F.softplus(-sign * score))
    assert_identity(got, (x - 0.1 * sign[:, None]).clamp(0, 1))


# Noise and accuracy


def test_gaussian_noise() -> None:
    """The noise has mean 0 and the standard deviation asked for, which itself has the deviation std / sqrt(2 n)."""
    x = torch.full((100_000,), 0.5)
    noise = gaussian_noise(x, 0.1, None) - x
    assert abs(noise.mean()) < sampling(0.1, 100_000)
    assert abs(noise.std() - 0.1) < sampling(0.1, 200_000)
    clipped = gaussian_noise(x, 0.5, (0.25, 0.75))
    assert clipped.min() == 0.25 and clipped.max() == 0.75
    one, two, other = (gaussian_noise(x, 0.1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(gaussian_noise(x, 0), x)


def test_accuracy() -> None:
    w = torch.tensor([1.0, -1.0])
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    y = torch.tensor([1, 0, 0, 0, 1])
    assert accuracy(Linear(w), x, y) == accuracy(Linear(w), x, y, 2) == 0.8
    assert accuracy(lambda x: nn.functional.one_hot(torch.ones(len(x), dtype=torch.long), 2), x, y) == 0.4


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    net, (x, y) = network(), images()
    bim(net, x, y, **BIM, batch_size=2, progress=True)
    simba(net, x, y, **SIMBA, batch_size=3, progress=True)
    accuracy(net, x, y, 1, progress=True)
    shown = capsys.readouterr().err
    assert "BIM" in shown and "3/3" in shown and "2/2" in shown and "6/6" in shown
