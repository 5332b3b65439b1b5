"""Condition numbers against spectra that are known, and Hessians against H^T S H of BNP's Propositions 2 and 9."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels import DBN1d, IterNorm1d
from normkernels.analysis import covariance_condition, hessian_condition
from tests.oracles import measures
from tests.tolerances import assert_identity
from tests.tolerances.analysis import condition_error, covariance_condition_error

D = torch.float64


def samples(n: int, values: list[float], mean: float = 0.0) -> Tensor:
    """Draw (n, d) with these singular values once centered, in random directions."""
    d = len(values)
    left = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=D), torch.randn(n, d, dtype=D)], 1)).Q[:, 1:]
    right = torch.linalg.qr(torch.randn(d, d, dtype=D)).Q
    return left * torch.tensor(values, dtype=D) @ right + mean


def test_known_spectra() -> None:
    x = torch.stack([samples(20, [5.0, 2.0, 0.5]), samples(20, [1.0, 1.0, 1.0]), samples(20, [7.0, 3.0, 1.0], 2.0)])
    expected = torch.tensor([100.0, 1.0, 49.0], dtype=D)
    assert_identity(covariance_condition(x), expected)
    assert_identity(covariance_condition(x.view(3, 1, 20, 3)), expected[:, None])
    assert_identity(covariance_condition(x[2] * 1e-200), 49.0)
    assert_identity(covariance_condition(torch.randn(5, 1, dtype=D)), 1.0)


def test_beyond_what_a_covariance_matrix_resolves() -> None:
    """sigma 1 and 1e-10: kappa = 1e20, of which eigenvalues of the covariance would keep no digit.

    The small singular value is good to u sigma_max sqrt(n), which is 1e-5 of it.
    """
    values = [1.0, 1e-10]
    got = covariance_condition(samples(20, values))
    assert abs(got / 1e20 - 1) <= covariance_condition_error(values, 20)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 4, dtype=D),
        torch.randn(1, 1, dtype=D),
        torch.randn(2, 7),
        torch.full((9, 2), 0.1, dtype=D),
        torch.full((9, 2), 0.1),
        *(
            torch.randn(50, 2, dtype=dtype)[:, [0, 0, 1]] + offset
            for dtype in (D, torch.float32)
            for offset in (0, 1e6)
        ),
        torch.randn(50, 1, dtype=D) * torch.tensor([1.0, 3.0]) + 1e6,
        torch.randn(400, 30, dtype=D) @ torch.randn(30, 31, dtype=D),
    ],
    ids=[
        "N = d",
        "one",
        "N < d",
        "constant",
        "constant float32",
        *["a column twice"] * 4,
        "dependent but for rounding",
        "a product of low rank",
    ],
)
def test_rank_deficient(x: Tensor) -> None:
    assert covariance_condition(x) == math.inf
    assert covariance_condition(x.expand(2, *x.shape)).tolist() == [math.inf] * 2


def test_a_large_mean_is_no_rank_deficiency() -> None:
    """float32 samples are exact in float64: a mean of 1e4 costs four of sixteen digits."""
    values = [3.0, 2.0, 1.0]
    x = samples(50, values, 1e4)
    assert abs(covariance_condition(x) / 9 - 1) <= covariance_condition_error(values, 50, 1e4)
    assert covariance_condition(x.float()) < math.inf


def test_of_whitened_samples() -> None:
    """The order is that of IterNorm's Figure 4a: 1 for DBN, more with fewer iterations, and most without a norm."""
    x = samples(400, [20.0, 8.0, 2.0, 1.0]) * 4
    values = [
        covariance_condition(norm(x))
        for norm in (
            DBN1d(4, 4, eps=0, dtype=D),
            *(IterNorm1d(4, num_iterations=t, dtype=D) for t in (7, 3, 1)),
            nn.Identity(),
        )
    ]
    assert_identity(values[0], 1.0)
    assert all(a < b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_samples(dtype: torch.dtype) -> None:
    x = torch.randn(30, 3, dtype=dtype, requires_grad=True)
    got = covariance_condition(x)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert got == covariance_condition(x.double()).float()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "x: expected float16"),
        (torch.ones(3), ValueError, r"x: expected shape \(..., N, d\)"),
        (torch.ones(0, 3), ValueError, r"x: expected shape \(..., N, d\)"),
        (torch.ones(3, 0), ValueError, r"x: expected shape \(..., N, d\)"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), ValueError, "x: expected finite values, got 2 that are not"),
    ],
)
def test_bad_samples(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        covariance_condition(x)


# The Hessian. Every loss comes with its second derivative in the unit's output, for each row of H.


def squared(a: Tensor, target: Tensor) -> Tensor:
    return (a - target).square().mean()


def check(
    got: Any, H: Tensor, second: Tensor, mean: Tensor | None, variance: Tensor | None, bias: bool = True,
    dtype: torch.dtype = D,
) -> None:  # fmt: skip
    """Check against H^T S H and, with Theorem 3, G^T S G; mean and variance are those of the columns of H."""
    plain = measures.hessian(H, second, bias)
    rank = int(
        torch.linalg.matrix_rank(torch.diag(second.sqrt()) @ (torch.cat([torch.ones(len(H), 1), H], 1) if bias else H))
    )
    one = torch.eye(len(plain), dtype=D)
    assert_condition(got.plain, plain, one, measures.condition(plain, rank), rank, len(H), dtype)
    if variance is None:
        assert got.preconditioned is None and got.scaling is None
        return
    mean = torch.zeros_like(variance) if mean is None else mean
    G = measures.preconditioned(H, second, mean, variance, bias)
    sigma = torch.cat([torch.ones(1, dtype=D), variance.sqrt()]) if bias else variance.sqrt()
    P = torch.diag(1 / sigma)
    if bias:
        P[0, 1:] = -mean / sigma[1:]
    assert_condition(got.preconditioned, plain, P, measures.condition(G, rank), rank, len(H), dtype)
    assert_identity(got.scaling, sigma.max() / sigma.min())


def assert_condition(
    got: float, H: Tensor, P: Tensor, expected: float, rank: int, terms: int, dtype: torch.dtype
) -> None:
    error = condition_error(H, P, rank, terms, dtype)
    assert error < 0.1, "no digits left to compare"
    assert abs(got / expected - 1) <= error


def activations(n: int, d: int) -> Tensor:
    """Draw features of different size and mean, as those of hidden layers."""
    return (torch.randn(n, d, dtype=D) + 2) * torch.logspace(0, -2, d, dtype=D)


def columns(H: Tensor) -> tuple[Tensor, Tensor]:
    return H.mean(0), H.var(0, correction=0)


@pytest.mark.parametrize("bias", [True, False])
def test_squared_loss(bias: bool) -> None:
    """The Hessian is that of Proposition 2 with L'' = 2 / N, scaled as in eq. 12."""
    h, target = activations(40, 6), torch.randn(40, dtype=D)
    layer = nn.Linear(6, 3, bias=bias, dtype=D)
    mean, variance = columns(h)
    for unit in range(3):
        got = hessian_condition(lambda: squared(layer(h)[:, unit], target), layer, unit, mean=mean, variance=variance)  # noqa: B023
        check(got, measures.rows_of_linear(h), torch.full((40,), 2 / 40, dtype=D), mean, variance, bias)
        assert got.preconditioned < got.plain / 100  # the gain of the scaling, about kappa(D)^2


def test_logistic_loss() -> None:
    """The Hessian has L'' = p (1 - p) / N."""
    h, label = activations(40, 6), torch.randint(2, (40,), dtype=D)
    layer = nn.Linear(6, 1, dtype=D)
    got = hessian_condition(
        lambda: F.binary_cross_entropy_with_logits(layer(h)[:, 0], label), layer, mean=h.mean(0), variance=h.var(0)
    )
    p = layer(h)[:, 0].sigmoid().detach()
    check(got, h, p * (1 - p) / 40, h.mean(0), h.var(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [60, 7])
def test_output_layer_of_a_network(n: int, dtype: torch.dtype) -> None:
    """Cross-entropy has L'' = p_i (1 - p_i) / N, as in the paper's Figure 8.

    With 7 samples of 12 + 1 weights H has rank 7, and only its nonzero eigenvalues count. float32's H has digits for
    the plain condition number only.
    """
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    x, y = torch.randn(n, 5, dtype=dtype), torch.randint(4, (n,))
    h = net[:2](x).detach()
    mean, variance = (None, None) if dtype == torch.float32 else (h.mean(0), h.var(0, correction=0) + 1e-4)
    for unit in (0, 3):
        got = hessian_condition(lambda: F.cross_entropy(net(x), y), net[2], unit, mean=mean, variance=variance)
        p = net(x).detach().double().softmax(1)[:, unit]
        if dtype == D or n == 7:
            check(got, h.double(), p * (1 - p) / n, mean, variance, dtype=dtype)


CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.Conv1d, (4, 2, 9), {"kernel_size": 3}),
    "padding": (nn.Conv2d, (3, 2, 5, 4), {"kernel_size": (3, 2), "padding": (1, 0)}),
    "stride and dilation": (nn.Conv2d, (4, 1, 8, 9), {"kernel_size": 2, "stride": (2, 1), "dilation": (1, 3)}),
    "3d": (nn.Conv3d, (2, 1, 3, 4, 4), {"kernel_size": (2, 1, 2)}),
    "groups": (nn.Conv2d, (3, 4, 5, 5), {"kernel_size": 2, "groups": 2}),
    "depthwise": (nn.Conv1d, (6, 2, 8), {"kernel_size": 3, "groups": 2}),
    "without a bias": (nn.Conv2d, (3, 4, 4, 4), {"kernel_size": 2, "groups": 2, "bias": False}),
}


@pytest.mark.parametrize(("make", "shape", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolutions(make: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Proposition 9 holds, where every tap of an input channel has that channel's mean and variance (eq. 21 and 22)."""
    conv = make(shape[1], 4, **options, dtype=D)
    scale = torch.logspace(0, -1, shape[1], dtype=D).view(-1, *[1] * (len(shape) - 2))
    h = (torch.randn(shape, dtype=D) + 0.5) * scale
    mean, variance = columns(h.movedim(1, -1).flatten(0, -2))
    for unit in (0, 1, 3):
        inputs = shape[1] // conv.groups
        first = unit // (4 // conv.groups) * inputs
        channels = [first + i for i in range(inputs) for _ in range(conv.weight[0, 0].numel())]
        H = measures.rows_of_conv(
            h[:, first : first + inputs], conv.kernel_size, conv.stride, conv.padding, conv.dilation
        )
        got = hessian_condition(lambda: conv(h)[:, unit].square().mean(), conv, unit, mean=mean, variance=variance)  # noqa: B023
        second = torch.full((len(H),), 2 / len(H), dtype=D)
        check(got, H, second, mean[channels], variance[channels], conv.bias is not None)


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(6, dtype=D), lambda: IterNorm1d(6, dtype=D)])
def test_hidden_layers(norm: Callable[[], nn.Module]) -> None:
    """In hidden layers no S is known and H may be indefinite: the reference is autograd's Hessian of the loss in w^."""
    net = nn.Sequential(nn.Linear(4, 6, dtype=D), norm(), nn.Tanh(), nn.Linear(6, 3, dtype=D))
    x, y = torch.randn(20, 4, dtype=D), torch.randint(3, (20,))

    def of(w: Tensor) -> Tensor:
        weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
        bias[2], weight[2] = w[0], w[1:]
        return F.cross_entropy(net[1:](F.linear(x, weight, bias)), y)

    w = torch.cat([net[0].bias[2:3], net[0].weight[2]]).detach()
    H = torch.autograd.functional.hessian(of, w)
    rank = 5 if isinstance(net[1], nn.Identity) else 4  # no bias before a normalization
    got = hessian_condition(lambda: F.cross_entropy(net(x), y), net[0], 2, mean=x.mean(0), variance=x.var(0))
    assert_identity(got.plain, measures.condition(H, rank))
    P = torch.diag(torch.cat([torch.ones(1, dtype=D), x.var(0).rsqrt()]))
    P[0, 1:] = -x.mean(0) / x.std(0)
    assert_identity(got.preconditioned, measures.condition(P.mT @ H @ P, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_smallest_nonzero_eigenvalue(rank: int, dtype: torch.dtype) -> None:
    """Without a bias H = 2 / N X^T X, X of known singular values; eigenvalues that are only rounding do not count."""
    values = [2.0**-i for i in range(rank)] + [0.0] * (20 - rank)
    x = samples(60, values).to(dtype)
    layer = nn.Linear(20, 1, bias=False, dtype=dtype)
    got = hessian_condition(lambda: layer(x).square().mean(), layer)
    expected = 4.0 ** (rank - 1)
    H = 2 / 60 * x.double().mT @ x.double()
    assert_condition(got.plain, H, torch.eye(20, dtype=D), expected, rank, 60, dtype)


def test_columns_that_are_scaled_are_not_small() -> None:
    """A feature of size 1e-9 has an eigenvalue 1e-18 of the largest: lost in the plain Hessian, not in P^T H P."""
    h = torch.randn(30, 3, dtype=D)
    h = (h - h.mean(0)) * torch.tensor([1.0, 1.0, 1e-9], dtype=D)
    layer = nn.Linear(3, 1, dtype=D)
    got = hessian_condition(lambda: layer(h).square().mean(), layer, mean=h.mean(0), variance=h.var(0))
    G = measures.preconditioned(h, torch.full((30,), 2 / 30, dtype=D), h.mean(0), h.var(0))
    assert got.preconditioned is not None and got.plain < 10
    assert_identity(got.preconditioned, measures.condition(G, 4))


@pytest.mark.parametrize("power", [1, 0])
def test_no_curvature(power: int) -> None:
    """The loss is linear in the weights, with a graph of the gradient or without: kappa of 0 is no number."""
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    loss = (lambda: layer(x).sum()) if power else (lambda: layer(x)[:, 1].square().sum() + layer(x)[:, 0].sum())
    got = hessian_condition(loss, layer, mean=x.mean(0), variance=x.var(0))
    assert math.isnan(got.plain) and got.preconditioned is not None and math.isnan(got.preconditioned)


def test_bias_that_the_loss_does_not_use() -> None:
    layer, x = nn.Linear(3, 1, dtype=D), torch.randn(9, 3, dtype=D)
    without = nn.Linear(3, 1, bias=False, dtype=D)
    got, expected = (
        hessian_condition(lambda: F.linear(x, layer.weight).square().sum(), layer),
        hessian_condition(lambda: without(x).square().sum(), without),
    )
    assert_identity(got.plain, expected.plain)


def test_parametrized_weight() -> None:
    """The Hessian in the weight that the layer uses, g v / |v|, is H^T S H."""
    h = activations(20, 4)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2, dtype=D))
    got = hessian_condition(lambda: layer(h)[:, 1].square().mean(), layer, 1)
    check(got, h, torch.full((20,), 2 / 20, dtype=D), None, None)


def test_nothing_is_touched() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    net(x).sum().backward()
    parameters = [p.detach().clone() for p in net.parameters()]
    gradients = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        return net(x).square().mean()

    with torch.no_grad():
        hessian_condition(loss, net[2])
    assert len(calls) == 1
    for p, value, gradient in zip(net.parameters(), parameters, gradients, strict=True):
        assert torch.equal(p, value) and p.grad is not None and torch.equal(p.grad, gradient)


def test_dbn_has_no_second_derivative() -> None:
    net = nn.Sequential(nn.Linear(3, 4), DBN1d(4))
    with pytest.raises(NotImplementedError, match="second derivative"):
        hessian_condition(lambda: net(torch.randn(9, 3)).square().mean(), net[0])
    after = nn.Linear(4, 2)
    hessian_condition(lambda: after(net(torch.randn(9, 3))).square().mean(), after)  # it does not differentiate DBN


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    layer, x = nn.Linear(3, 1), torch.randn(6, 3)
    hessian_condition(lambda: layer(x).square().mean(), layer, progress=True)
    assert "4/4" in capsys.readouterr().err


X = torch.randn(6, 3)
LAYER = nn.Linear(3, 2)
FROZEN = nn.Linear(3, 2).requires_grad_(False)
GOOD: dict[str, Any] = {
    "loss": lambda: LAYER(X).square().mean(),
    "layer": LAYER,
    "mean": X.mean(0),
    "variance": X.var(0),
}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss: expected a function or a module, got int"),
        ({"layer": nn.BatchNorm1d(3)}, TypeError, "layer: expected nn.Linear or nn.Conv1d, 2d or 3d, got BatchNorm1d"),
        ({"layer": nn.ConvTranspose1d(3, 2, 1)}, TypeError, "layer: expected nn.Linear"),
        (
            {"layer": FROZEN, "loss": lambda: FROZEN(X).sum()},
            ValueError,
            "layer: expected parameters with requires_grad=True",
        ),
        ({"unit": 2}, ValueError, "unit: expected less than the layer's 2 outputs, got 2"),
        ({"unit": -1}, ValueError, "unit: expected at least 0, got -1"),
        ({"unit": 0.0}, TypeError, "unit: expected an int"),
        ({"mean": None}, ValueError, "mean: expected one beside variance"),
        ({"variance": None}, ValueError, "variance: expected one beside mean, got None"),
        ({"mean": X}, ValueError, r"mean: expected shape \(3,\), got \(6, 3\)"),
        ({"variance": X.var(1)}, ValueError, r"variance: expected shape \(3,\), got \(6,\)"),
        ({"variance": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "variance: expected positive values, got 0"),
        ({"variance": torch.tensor([1.0, math.nan, 1.0])}, ValueError, "variance: expected finite values"),
        ({"mean": X.mean(0).long()}, TypeError, "mean: expected torch.float16 or"),
        ({"loss": lambda: LAYER(X).square()}, ValueError, r"loss\(\): expected a scalar, got shape \(6, 2\)"),
        ({"loss": lambda: LAYER(X).mean().item()}, TypeError, r"loss\(\): expected a torch.Tensor, got float"),
        ({"loss": lambda: X.mean()}, ValueError, r"loss\(\): expected a scalar that requires a gradient"),
        ({"loss": lambda: nn.Linear(3, 1)(X).mean()}, ValueError, "loss: expected one that depends on the layer's"),
        (
            {"loss": lambda: (LAYER(X) * math.inf).square().mean()},
            ValueError,
            "second derivative of the loss: expected f",
        ),
    ],
)
def test_bad_input(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hessian_condition(**{**GOOD, **bad})
