"""Spectra at the edge of float32: channels of unlike scale, singular covariances, many iterations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.primitives.inverse_sqrt import eager
from normkernels.primitives.moments import eager as moments
from tests import backends
from tests.oracles import inputs, iternorm
from tests.oracles.run import back, incoming_gradient, leaf, moved
from tests.tolerances.moments import assert_within_remainder
from tests.tolerances.whitening import LARGER_THAN_FLOAT64, SCALED_GRADIENT, SCALED_W, SCALED_Y

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]


# The interpreter takes minutes for what these run; the two tests of Triton's kernels below are shorter.
QUICK = backends.only("eager", *backends.CUDA)


def step(x: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, W and dx of one training step in x's type."""
    given = leaf(x)
    y, _, W = nk.ops.iter_norm(given, x.shape[1], **options)  # type: ignore[arg-type]
    (dx,) = torch.autograd.grad(y, given, moved(incoming_gradient(back(y))))  # type: ignore[arg-type]
    return back(y), back(W), back(dx)  # type: ignore[return-value]


# --- eigendecomposition ---------------------------------------------------------------------------------------------


def correlated(d: int, m: int, condition: float = 1e3) -> Tensor:
    """Draw x (m, d) in float64 of unit variances, whose correlation matrix has about this condition."""
    C = inputs.covariance(inputs.spectrum(d, condition))
    deviations = C.diagonal().sqrt()
    C = C / deviations[:, None] / deviations
    return torch.randn(m, d, dtype=torch.float64, generator=inputs.generator(d + m)) @ torch.linalg.cholesky(C).T


SCALES = {
    "ascending": lambda d: torch.logspace(0, 4, d),
    "descending": lambda d: torch.logspace(4, 0, d),
    "shuffled": lambda d: torch.logspace(0, 4, d)[torch.randperm(d, generator=inputs.generator(1))],
    "large": lambda d: torch.full((d,), 1e4),
    "one-large": lambda d: torch.where(torch.arange(d) == d - 1, 1e4, 1.0),
}


SIZES = [
    (2, "rows"),
    (3, "images"),
    (16, "images"),
    (16, "channels_last"),
    pytest.param(64, "rows", marks=pytest.mark.large),
    pytest.param(128, "images", marks=pytest.mark.large),
]


@QUICK
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("d", "layout"), SIZES)
def test_channels_of_unlike_scale(d: int, layout: str, scales: str) -> None:
    """Standard deviations that differ by 1e4, in any order, or are all 1e4, are as exact as where all are 1."""
    m = 36 * max(16, d // 2)
    x = (correlated(d, m) * SCALES[scales](d).double()).float()
    if layout != "rows":
        x = x.view(-1, 12, 3, d).permute(0, 3, 1, 2)
        x = x if layout == "channels_last" else x.contiguous()
    got, exact = step(x, method="eigh", eps=1e-3), step(x.double(), method="eigh", eps=1e-3)
    assert (got[0] - exact[0]).abs().max() <= SCALED_Y
    root = exact[1].diagonal(dim1=1, dim2=2).sqrt()
    assert ((got[1] - exact[1]).abs() <= SCALED_W * root[:, :, None] * root[:, None, :]).all()
    channels = exact[2].movedim(1, 0).flatten(1), (got[2] - exact[2]).movedim(1, 0).flatten(1)
    assert (channels[1].abs().amax(1) <= SCALED_GRADIENT * channels[0].abs().amax(1)).all()


@backends.only(*backends.TRITON)
def test_triton_leaves_the_exact_covariance_to_plain_pytorch() -> None:
    test_channels_of_unlike_scale(16, "images", "shuffled")


@pytest.mark.on_cpu
@pytest.mark.parametrize("small", [0, moments.SMALL], ids=["chains", "float64-products"])
@pytest.mark.parametrize("m", [17, 300, 5000, 70000])
def test_an_exact_covariance(m: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added up from chains of columns of every length, with rests, to less than a rounding of float32."""
    monkeypatch.setattr(moments, "SMALL", small)
    for shape in ((m, 3), (m // 17, 3, 17), (1, 3, m), (m // 2, 3, 2)):
        x = inputs.gaussian(shape, dtype=torch.float32, group_size=3, mean=3.0)
        _, _, cov = torch.ops.normkernels.moments(x, 3, True)
        exact = iternorm.moments(x.double(), 3)[1]
        assert cov.dtype == torch.float64
        assert (cov - exact).abs().max() <= torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.on_cpu
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_covariances_without_eps(scale: float) -> None:
    """An eigendecomposition does not divide by eigenvalues of which it knows nothing."""
    x = scale * torch.randn(64, 4, generator=inputs.generator(0)) @ torch.randn(4, 9, generator=inputs.generator(1))
    y, W, dx = step(x, method="eigh", eps=0.0)
    assert all(value.isfinite().all() for value in (y, W, dx))
    assert y.abs().max() <= 10


# --- Newton's iteration ---------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=inputs.generator(sum(shape)))


def twice(x: Tensor, factor: float = 1.0) -> Tensor:
    return torch.cat((x, factor * x), 1)


SINGULAR = {
    "fewer-samples-than-channels": lambda: normal(7, 12),
    "equal-channels": lambda: twice(normal(40, 6)),
    "opposite-channels": lambda: twice(normal(40, 6), -1.0),
    "equal-channels-of-unlike-scale": lambda: twice(normal(40, 6), 1e-3),
    "sums-of-others": lambda: torch.cat((normal(50, 8), normal(50, 8)[:, :4] + normal(50, 8)[:, 4:]), 1),
    "one-dimension": lambda: normal(50, 1) @ normal(1, 12),
    "constant-channels": lambda: torch.cat((normal(40, 10), torch.full((40, 2), 3.7)), 1),
    "nearly-equal-channels": lambda: torch.cat((normal(60, 6), normal(60, 6) + 1e-3 * normal(60, 6).flip(0)), 1),
    "nearly-constant": lambda: 1000.1 + 1e-4 * normal(40, 12),
    "regular": lambda: normal(60, 12),
}


@QUICK
@pytest.mark.parametrize(("scaling", "eps"), [("trace", 0.0), ("frobenius", 0.0), ("frobenius", 1e-3)])
@pytest.mark.parametrize("case", SINGULAR)
def test_many_iterations_converge(case: str, eps: float, scaling: str, backend: str) -> None:
    """No iteration makes of a direction without variance more than float64 does; after some iteration W stays."""
    scales = (1e-6, 1e4) if backend == "eager" else (1e4,)
    counts = (9, 20, 40) if backend == "eager" else (20,)  # iterations, beside 100
    for scale in scales:
        x = scale * SINGULAR[case]()
        for num_iterations in (*counts, 100):
            options = {"num_iterations": num_iterations, "eps": eps, "scaling": scaling}
            got, exact = step(x, **options), step(x.double(), **options)
            for value, reference in zip(got, exact, strict=True):
                assert value.isfinite().all()
                assert value.abs().max() <= LARGER_THAN_FLOAT64 * reference.abs().max().clamp(min=1e-3)
            if num_iterations == 40:
                stays = got
        if backend == "eager":
            assert (
                all(torch.equal(a, b) for a, b in zip(stays[:2], got[:2], strict=True)) or case == "constant-channels"
            )


@backends.only(*backends.TRITON)
@pytest.mark.parametrize("case", ["fewer-samples-than-channels", "equal-channels-of-unlike-scale"])
def test_triton_leaves_many_iterations_to_plain_pytorch(case: str) -> None:
    """Both directions are right at a number of iterations that overflows or loses all digits without a stop."""
    x = 1e4 * SINGULAR[case]()
    options = {"num_iterations": 30, "eps": 0.0, "scaling": "frobenius"}
    for value, reference in zip(step(x, **options), step(x.double(), **options), strict=True):
        assert value.isfinite().all()
        assert value.abs().max() <= LARGER_THAN_FLOAT64 * reference.abs().max().clamp(min=1e-3)


def test_a_small_channel_stops_nothing() -> None:
    """Newton's iteration ends where others make up a channel's variance, not where that is small."""
    variances = torch.tensor([1.0, 1e-7])
    W = back(nk.ops.inverse_sqrt(moved(torch.diag(variances)[None]), num_iterations=30, eps=0.0))
    torch.testing.assert_close(W[0].diagonal(), variances.rsqrt(), rtol=1e-4, atol=0)


@backends.only("eager")
@pytest.mark.parametrize("scaling", ["trace", "frobenius"])
def test_nothing_stops_before_its_time(scaling: str) -> None:
    """A regular covariance has all its iterations, and converges to the root."""
    S = inputs.covariance(inputs.spectrum(16, 1e3))[None].float()
    W = nk.ops.inverse_sqrt(S, 100, 0.0, scaling)
    assert torch.linalg.matrix_norm(W @ S @ W - torch.eye(16)).item() < 1e-3
    P = eager.newton(S / S.diagonal(dim1=1, dim2=2).sum(), 5)
    assert eager.stopped(P, S, 5) is None
    limit = 1 / (eager.ROUNDINGS * torch.finfo(torch.float32).eps)
    assert eager.stopped(P, S, math.ceil(math.log(limit, 2.25))) is not None


# --- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("mean", [0.1, 1e4])
def test_the_mean_and_its_remainder(mean: float, group_size: int) -> None:
    """Two numbers of x's statistics' type carry what float64 would, on every device."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, group_size=4, mean=mean)
    got, remainder, _ = torch.ops.normkernels.moments(moved(x), group_size, False)
    assert got.dtype == remainder.dtype == torch.float32
    assert_within_remainder(back(got), back(remainder), iternorm.moments(x.double(), group_size)[0], x)  # type: ignore[arg-type]
