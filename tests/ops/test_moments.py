"""moments and cross_moments against eq. 11 to 13 and eq. 21."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.oracles import inputs, iternorm
from tests.oracles.plain import stat_dtype
from tests.oracles.run import back, incoming_gradient, leaf, moved
from tests.tolerances import assert_within, largest
from tests.tolerances.moments import cov_floor, cross_floor, mean_floor, moments_gradient_floor

# The kernels leave float64 and the second derivatives' small products to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def check(x: Tensor, group_size: int = 8) -> None:
    """Check values and gradient of moments, by the rule of tests/tolerances."""
    g = inputs.generator(2)
    d = min(group_size, x.shape[1])
    dmean = torch.randn(x.shape[1], dtype=torch.float64, generator=g).to(stat_dtype(x.dtype))
    dcov = torch.randn(x.shape[1] // d, d, d, dtype=torch.float64, generator=g).to(stat_dtype(x.dtype))

    given = leaf(x)
    count, mean, cov = nk.ops.moments(given, group_size)  # type: ignore[arg-type]
    assert count == x.numel() // x.shape[1] and type(count) is int
    assert mean.dtype == cov.dtype == stat_dtype(x.dtype)
    assert torch.equal(cov, cov.mT)
    (dx,) = torch.autograd.grad((mean, cov), given, (moved(dmean), moved(dcov)))
    mean, cov, dx = map(back, (mean, cov, dx))
    assert dx.dtype == x.dtype

    exact = x.detach().double().requires_grad_()
    reference = iternorm.moments(exact, group_size)
    (dx_reference,) = torch.autograd.grad(reference, exact, (dmean.double(), dcov.double()))
    same_type = x.detach().to(stat_dtype(x.dtype)).requires_grad_()
    plain = iternorm.moments(same_type, group_size)
    (dx_plain,) = torch.autograd.grad(plain, same_type, (dmean, dcov))

    mean_ref, cov_ref = (t.detach() for t in reference)
    assert_within("mean", mean, mean_ref, plain[0], mean_floor(x), largest(mean_ref))
    floor = cov_floor(x, cov_ref)
    worst = ((cov.double() - cov_ref).abs() - 2 * (plain[1].double() - cov_ref).abs().max() - floor).max().item()
    assert worst <= 0, f"cov: {worst:.2e} beyond twice the plain path's error and the floor"
    floor_dx = moments_gradient_floor(x, dmean, dcov)
    assert_within("dx", dx, dx_reference, dx_plain.to(x.dtype), floor_dx, largest(dx_reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_every_layout_and_type(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=dtype)))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("mean", [1.0, 1e5], ids="mean{:g}".format)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_ragged_tiles(layout: str, mean: float) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=torch.float32, mean=mean)))


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 12, 64])
def test_group_sizes(group_size: int) -> None:
    check(inputs.gaussian((7, 12, 3, 3), group_size=min(group_size, 12)), group_size)


# In standard deviations. 1e4 costs a one-pass float32 covariance all digits, 1e5 a two-pass one three.
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4], ids="scale{:g}".format)
@pytest.mark.parametrize("mean", [0.0, -1e2, 1e4, 1e5], ids="mean{:g}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name)
def test_large_means(dtype: torch.dtype, mean: float, scale: float) -> None:
    check(inputs.gaussian((32, 8, 4, 4), dtype=dtype, mean=mean * scale, scale=scale))


@pytest.mark.usefixtures("tiny_tiles")
def test_first_tile_is_an_outlier() -> None:
    """Whatever sums are shifted by must not be trusted to be near the mean: the first sample is 1e4 away."""
    x = inputs.gaussian(inputs.SHAPE_4D)
    x[0] += 1e4
    check(x.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_half_types_with_standard_deviation_1000(dtype: torch.dtype) -> None:
    check(inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, scale=1000.0, mean=3000.0))


@pytest.mark.large
@pytest.mark.on_cpu
def test_many_samples_do_not_drift() -> None:
    """The numbers are 2^18 equal ones: a running float32 sum of 0.1 is off in the third digit there."""
    x = torch.full((2**14, 2, 4, 4), 0.1)
    count, mean, cov = nk.ops.moments(x, 2)
    assert count == 2**18
    assert_within("mean", mean, torch.full((2,), 0.1, dtype=torch.float32).double(), None, mean_floor(x), 0.1)
    assert largest(cov) <= (2 * mean_floor(x)) ** 2


@pytest.mark.on_cpu
def test_one_sample() -> None:
    """m = 1: the mean is the sample, the covariance is zero."""
    x = inputs.gaussian((1, 8))
    count, mean, cov = nk.ops.moments(x, 4)
    assert count == 1
    assert torch.equal(mean, x[0])
    assert torch.equal(cov, torch.zeros(2, 4, 4, dtype=x.dtype))


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3, 3), (4, 8, 0), (4, 8, 0, 3)], ids=str)
@pytest.mark.on_cpu
def test_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    count, mean, cov = nk.ops.moments(x, 4)
    assert count == 0
    assert torch.equal(mean, torch.zeros(8)) and torch.equal(cov, torch.zeros(2, 4, 4))
    (dx,) = torch.autograd.grad(mean.sum() + cov.sum(), x)
    assert dx.shape == x.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.on_cpu
def test_a_bad_value_stays_in_its_group(bad: float) -> None:
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, group_size=4)
    _, mean, cov = nk.ops.moments(x, 4)
    x[2, 1, 0, 0] = bad
    _, bad_mean, bad_cov = nk.ops.moments(x, 4)
    assert not bad_mean[1].isfinite()
    assert bad_cov[0, 1].isfinite().sum() == 0
    assert torch.equal(bad_mean[4:], mean[4:]) and torch.equal(bad_cov[1], cov[1])


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["NC", "NLC", "NHWC", "NCHW-cropped"])
def test_gradcheck(layout: str, group_size: int) -> None:
    shape = {"NC": (5, 4), "NLC": (3, 4, 2)}.get(layout, (2, 4, 2, 2))
    x = inputs.LAYOUTS[layout][1](inputs.gaussian(shape, group_size=4)).requires_grad_()
    assert gradcheck(lambda x: nk.ops.moments(x, group_size)[1:], x)
    assert gradgradcheck(lambda x: nk.ops.moments(x, group_size)[1:], x)


# cross_moments: sums without 1/m, D = sum y (x - mean)^T and f = sum y.


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_cross_moments(layout: str, dtype: torch.dtype) -> None:
    """They are those of eq. 21, with a mean that is not x's, and y in another layout than x."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype, group_size=4))
    y = incoming_gradient(x).contiguous()
    mean = torch.linspace(-1, 1, 8, dtype=torch.float64).to(stat_dtype(dtype))
    sums, total = nk.ops.cross_moments(y, x, mean, 4)

    def reference(y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        rows = iternorm.unroll(y, 4)
        return rows @ (iternorm.unroll(x, 4) - mean.view(2, 4, 1)).mT, rows.sum(2).flatten()

    exact = reference(y.double(), x.double(), mean.double())
    plain = reference(y.to(mean.dtype), x.to(mean.dtype), mean)
    for label, got, ref, other, floor in zip("Df", (sums, total), exact, plain, cross_floor(y, x, mean), strict=True):
        assert got.dtype == mean.dtype
        assert_within(label, got, ref, other, floor, largest(ref))


def test_cross_moments_gradcheck() -> None:
    y, x = (inputs.gaussian((3, 4, 2), seed=seed).requires_grad_() for seed in (0, 1))
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *a: nk.ops.cross_moments(*a, 2), (y, x, mean))
    assert gradgradcheck(lambda *a: nk.ops.cross_moments(*a, 2), (y, x, mean))


@pytest.mark.parametrize(
    ("x", "group_size", "error", "expected", "got"),
    [
        ([[1.0, 2.0]], 1, TypeError, "torch.Tensor", "list"),
        (torch.ones(4, 6, dtype=torch.int64), 2, TypeError, "float32", "torch.int64"),
        (torch.ones(4, 6, dtype=torch.complex64), 2, TypeError, "float32", "torch.complex64"),
        (torch.ones(4, 6, dtype=torch.bool), 2, TypeError, "float32", "torch.bool"),
        (torch.ones(6), 2, ValueError, "(N, C", "(6,)"),
        (torch.ones(4, 0), 2, ValueError, "at least one channel", "(4, 0)"),
        (torch.ones(4, 6), 4, ValueError, "1, 2, 3, 6", "4"),
        (torch.ones(4, 6), 0, ValueError, "at least 1", "0"),
        (torch.ones(4, 6), -2, ValueError, "at least 1", "-2"),
        (torch.ones(4, 6), 2.0, TypeError, "int", "2.0"),
        (torch.ones(4, 6), True, TypeError, "int", "True"),
    ],
    ids=["list", "int64", "complex", "bool", "rank-1", "no-channels", "non-divisor", "zero", "negative", "float-size",
         "bool-size"],
)  # fmt: skip
def test_wrong_arguments(x: object, group_size: object, error: type[Exception], expected: str, got: str) -> None:
    with pytest.raises(error) as raised:
        nk.ops.moments(x, group_size)  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"y": torch.ones(4, 5)}, ValueError, "(4, 6)", "(4, 5)"),
        ({"y": torch.ones(4, 6).double()}, TypeError, "float32", "float64"),
        ({"mean": torch.ones(5)}, ValueError, "(6,)", "(5,)"),
        ({"mean": torch.ones(6).half()}, TypeError, "float32", "float16"),
        ({"mean": torch.ones(6, device="meta")}, ValueError, "cpu", "meta"),
    ],
    ids=["y-shape", "y-type", "mean-shape", "mean-type", "mean-device"],
)
def test_wrong_cross_arguments(change: dict[str, Tensor], error: type[Exception], expected: str, got: str) -> None:
    arguments = {"y": torch.ones(4, 6), "x": torch.ones(4, 6), "mean": torch.ones(6)} | change
    with pytest.raises(error) as raised:
        nk.ops.cross_moments(**arguments, group_size=2)
    assert expected in str(raised.value) and got in str(raised.value)
