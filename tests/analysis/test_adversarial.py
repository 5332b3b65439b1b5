"""Attacks on models whose best perturbation is known, and against an independent implementation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.analysis import accuracy, adversarial, bim, gaussian_noise, simba
from tests.tolerances import IDENTITY, assert_identity
from tests.tolerances.analysis import assert_bim, sampling

D = torch.float64
X, Y = torch.rand(4, 2, 3, 3), torch.zeros(4, dtype=torch.int64)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
BIM: dict[str, Any] = {"eps": 0.1, "step_size": 0.04, "num_steps": 5}
SIMBA: dict[str, Any] = {"eps": 0.2, "max_queries": 60}


class Linear(nn.Module):
    """Logits (0, w . x + b): the way to class 1 is along w, to class 0 against it."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], 1)


def network(dtype: torch.dtype = D) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 20, 3)
    )
    net(torch.rand(32, 2, 4, 5))  # statistics
    return net.to(dtype)


def images(n: int = 6, dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, 4, 5, dtype=dtype), torch.randint(3, (n,))


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


# SimBA


@pytest.mark.parametrize("targeted", [False, True])
def test_simba_of_a_linear_model_that_does_not_give_way(targeted: bool) -> None:
    """For every entry +eps or -eps helps, so all entries are changed by eps; +eps is asked first."""
    w, x = torch.randn(10, dtype=D), torch.rand(6, 10, dtype=D) * 0.4 + 0.3
    y = torch.zeros(6, dtype=torch.int64)
    b = 10.0 if targeted else -10.0
    got = simba(Linear(w, b), x, y, eps=0.1, max_queries=100, targeted=targeted)
    way = (-w if targeted else w).sign()
    assert_identity(got.x, x + 0.1 * way)
    assert not got.succeeded.any()
    assert got.queries.tolist() == [int(1 + 10 + (way < 0).sum())] * 6


def test_simba_against_algorithm_1() -> None:
    """The model sees, query by query, what Algorithm 1 asks with the directions that were tried."""
    net, (x, y) = network().eval(), images(1)
    y = net(x).argmax(1)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return net(x)

    got = simba(model, x, y, eps=0.3, max_queries=50)
    assert len(seen) == got.queries.item()
    current, p, tried, i = x, net(x).softmax(1)[0, y], set(), 1
    while i < len(seen):
        assert (net(current).argmax(1) == y).all()
        for alpha in (0.3, -0.3):
            (index,) = (seen[i] != current).flatten().nonzero().flatten().tolist() or [None]
            q = torch.zeros(40, dtype=D)
            q[index] = 1
            assert_identity(seen[i], (current + alpha * q.view_as(x)).clamp(0, 1))
            candidate, i = seen[i], i + 1
            value = net(candidate).softmax(1)[0, y]
            if value < p:
                current, p = candidate, value
                break
            if i == len(seen):
                break
        assert index not in tried
        tried.add(index)
    assert torch.equal(current, got.x) and got.succeeded.item() == (net(current).argmax(1) != y).item()


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_simba_within_its_budget(basis: str) -> None:
    net, (x, _) = network(), images(40)
    y = net.eval()(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    got = simba(net, x, y, **SIMBA, basis=basis)
    prediction = net(got.x).argmax(1)
    assert torch.equal(got.succeeded, prediction != y) and got.succeeded.sum() > 10
    assert got.queries[0] == 1 and torch.equal(got.x[0], x[0]) and got.succeeded[0]
    assert got.queries.dtype == torch.int64 and got.queries.max() <= 60
    assert got.x.min() >= 0 and got.x.max() <= 1 and not got.x.requires_grad
    steps = (got.queries - 1).clamp(max=40).double()
    if basis == "pixel":  # with other directions, clipping leaves them not orthogonal
        assert ((got.x - x).flatten(1).norm(dim=1) <= 0.2 * steps.sqrt() * (1 + IDENTITY)).all()
    assert simba(net, x, y, **{**SIMBA, "max_queries": 1}).queries.eq(1).all()
    assert simba(net, x, y, **{**SIMBA, "max_queries": 2}).queries.max() == 2


def test_simba_gives_the_same_from_the_same_seed() -> None:
    net, (x, y) = network(), images(8)

    def run(seed: int, **options: Any) -> Any:
        return simba(net, x, y, **SIMBA, generator=torch.Generator().manual_seed(seed), **options)

    first = run(0)
    for again in (run(0), run(0, batch_size=3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x, run(1).x)
    orders = [set(map(tuple, (s - o).nonzero().tolist())) for s, o in zip(first.x, x, strict=True) if (s != o).any()]
    assert len(orders) > 2 and any(a != b for a, b in itertools.pairwise(orders))


@pytest.mark.parametrize("frequencies", [None, 3])
def test_cosine_basis(frequencies: int | None) -> None:
    """The directions agree with scipy's orthonormal DCT-II: (c, u, v) has one coefficient, and it is 1."""
    x = torch.zeros(1, 2, 4, 5, dtype=D)
    directions = adversarial._Directions(x, "dct", frequencies)
    q = directions(torch.arange(directions.count))
    sizes = (2, frequencies or 4, frequencies or 5)
    assert q.shape == (math.prod(sizes), 2, 4, 5)
    coefficients = torch.from_numpy(scipy.fft.dctn(q.numpy(), axes=(2, 3), norm="ortho"))
    kept = coefficients[:, :, : sizes[1], : sizes[2]].flatten(1)
    assert_identity(kept, torch.eye(len(q), dtype=D))
    assert_identity(q.flatten(1) @ q.flatten(1).mT, torch.eye(len(q), dtype=D))


def test_low_frequencies_only() -> None:
    net, (x, y) = network(), images()
    x = x * 0.2 + 0.4  # no clipping, which makes high frequencies
    got = simba(net, x, y, eps=0.05, max_queries=30, basis="dct", frequencies=2)
    coefficients = torch.from_numpy(scipy.fft.dctn((got.x - x).numpy(), axes=(2, 3), norm="ortho"))
    assert coefficients[:, :, :2, :2].abs().max() > 0.04
    coefficients[:, :, :2, :2] = 0
    assert_identity(1 + coefficients, torch.ones_like(coefficients))


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


BOTH = [
    ({"x": X.tolist()}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x: expected float16"),
    ({"x": X[0, 0, 0]}, ValueError, r"x: expected a non-empty shape \(N, \*\), got \(3,\)"),
    ({"x": X[:0], "y": Y[:0]}, ValueError, "x: expected a non-empty shape"),
    ({"x": X + 1}, ValueError, r"x: expected values within the bounds \(0.0, 1.0\), got 1"),
    ({"x": X * math.nan}, ValueError, "x: expected values within the bounds"),
    ({"y": 0}, TypeError, "y: expected a torch.Tensor, got int"),
    ({"y": Y[1:]}, ValueError, r"y: expected as many as the 4 samples, got shape \(3,\)"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds: expected two finite numbers, the lower one first"),
    ({"bounds": None}, TypeError, "bounds: expected two numbers, got None"),
    ({"bounds": (0.0, 0.5, 1.0)}, TypeError, "bounds: expected two numbers"),
    ({"bounds": (-math.inf, 1.0)}, ValueError, "bounds: expected two finite numbers"),
    ({"bounds": (0.0, math.inf)}, ValueError, "bounds: expected a finite number"),
    ({"eps": -0.1}, ValueError, r"eps: expected a finite number within \[0, 1\], got -0.1"),
    ({"eps": 1.5}, ValueError, r"eps: expected a finite number within \[0, 1\], got 1.5"),
    ({"eps": math.nan}, ValueError, "eps: expected a finite number"),
    ({"eps": "0.1"}, TypeError, "eps: expected a number"),
    ({"targeted": "no"}, TypeError, "targeted: expected True or False"),
    ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        *BOTH,
        ({"step_size": 0}, ValueError, "step_size: expected more than 0, got 0"),
        ({"step_size": -0.1}, ValueError, "step_size: expected a finite number at least 0"),
        ({"num_steps": 0}, ValueError, "num_steps: expected at least 1, got 0"),
        ({"num_steps": 1.0}, TypeError, "num_steps: expected an int"),
        ({"loss": lambda logits, y: None}, TypeError, "loss: expected a torch.Tensor, got NoneType"),
        ({"loss": "l2"}, TypeError, "loss: expected a function or a module, got str"),
        ({"y": torch.ones(4, 2)}, ValueError, r"y: expected probabilities of shape \(4, 3\), got \(4, 2\)"),
    ],
)
def test_bad_input_of_bim(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bim(**{"model": MODEL, "x": X, "y": Y, **BIM, **bad})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        *BOTH,
        ({"eps": 0}, ValueError, "eps: expected more than 0, got 0"),
        ({"max_queries": 0}, ValueError, "max_queries: expected at least 1, got 0"),
        ({"basis": "fourier"}, ValueError, "basis: expected one of pixel, dct, got 'fourier'"),
        ({"frequencies": 2}, ValueError, "frequencies: expected None with basis='pixel', got 2"),
        ({"basis": "dct", "frequencies": 4}, ValueError, "frequencies: expected at most the 3 of the shortest axis"),
        (
            {"basis": "dct", "x": X[:, 0, 0]},
            ValueError,
            r"x: expected shape \(N, C, \*\) with basis='dct', got \(4, 3\)",
        ),
    ],
)
def test_bad_input_of_simba(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simba(**{"model": MODEL, "x": X, "y": Y, **SIMBA, **bad})


def test_bad_input_of_noise_and_accuracy() -> None:
    for arguments, error, message in (
        ((X.long(), 0.1), TypeError, "x: expected float16"),
        ((X, -0.1), ValueError, "std: expected a finite number at least 0, got -0.1"),
        ((X, 0.1, (1.0, 1.0)), ValueError, "bounds: expected two finite numbers"),
    ):
        with pytest.raises(error, match=message):
            gaussian_noise(*arguments)
    with pytest.raises(ValueError, match="x: expected a non-empty shape"):
        accuracy(MODEL, X[:0], Y[:0])
