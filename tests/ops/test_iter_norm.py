"""iter_norm against the float64 oracle: outputs and gradients, over everything an input can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import normkernels as nk
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances.whitening import assert_iter_norm, relative_error_of_w

# The kernels leave float64 and the second derivatives' small products to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.pairwise,
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FULL = [torch.float64, torch.float32]  # float64 shows wrong formulas, float32 shows wrong numerics

ITER_NORM = Config()
FROBENIUS = Config(scaling="frobenius")
DBN = Config(method="eigh", eps=1e-3)
METHODS = pytest.mark.parametrize(
    "config", [ITER_NORM, FROBENIUS, DBN], ids=["newton-trace", "newton-frobenius", "eigh"]
)


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def affine(channels: int, dtype: torch.dtype, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Draw gamma of both signs and beta, both far from their initial 1 and 0."""
    g = inputs.generator(seed)
    weight, bias = torch.randn(2, channels, dtype=torch.float64, generator=g)
    return weight.to(dtype), bias.to(dtype)


def check(x: Tensor, config: Config, *, stable: bool = False, dy: Tensor | None = None,
          weight_dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Compare the package, the plain path and the oracle on x, by the rule of tests/tolerances."""
    dy = incoming_gradient(x) if dy is None else dy
    weight, bias = affine(x.shape[1], weight_dtype or x.dtype)
    got = run(nk.ops.iter_norm, config, x, dy, weight, bias)
    assert got.y.dtype == got.dx.dtype == x.dtype
    assert got.w.dtype == got.mean.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    reference = oracle(config, x, dy, weight, bias, stable=stable)
    plain = plain_path(config, x, dy, weight, bias)
    assert_iter_norm(got, reference, plain, x, dy, weight, config)


# Newton's method with another scaling reads and writes the same.
@pytest.mark.parametrize("config", [ITER_NORM, DBN], ids=["newton-trace", "eigh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_every_layout_and_type(layout: str, dtype: torch.dtype, config: Config) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=dtype)), config)


# Two groups, so that groups can mix up, and one.
@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("dtype", "group_size"),
    [(torch.float64, 4), (torch.float32, 4), (torch.float32, 8), (torch.bfloat16, 8)],
    ids=["float64-two-groups", "float32-two-groups", "float32-one-group", "bfloat16-one-group"],
)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_ragged_tiles(layout: str, dtype: torch.dtype, group_size: int) -> None:
    """Values and gradients are right where x is cut into tiles of unequal size."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype, group_size=group_size))
    check(x, Config(group_size=group_size))


@pytest.mark.large
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("shape", [(5, 64, 24, 24), (1, 64, 23, 25), (64, 64, 3, 3)], ids=str)
def test_every_product_engine(shape: tuple[int, ...], group_size: int, layout: str) -> None:
    """Group size, number of groups and length of the planes choose the product that the eager backend runs on."""
    x = inputs.LAYOUTS[layout][1](inputs.gaussian(shape, dtype=torch.float32, group_size=group_size, mean=3.0))
    check(x, Config(group_size=group_size))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_tiles_of_different_means(mean: float) -> None:
    """Each sample has a mean of its own, so tiles differ from the total by more than their own deviation."""
    x = inputs.gaussian(inputs.SHAPE_4D, mean=mean)
    x = (x + 30 * torch.arange(6.0).view(-1, 1, 1, 1)).float()
    check(x, ITER_NORM)


@METHODS
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_incoming_gradient_of_another_layout(layout: str, config: Config) -> None:
    """dL/dy comes from the next layer: the other memory format, or y.sum()'s expanded scalar."""
    x = inputs.LAYOUTS[layout][1](inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32))
    other = inputs.LAYOUTS["NHWC" if layout == "NCHW" else "NCHW"][1](incoming_gradient(x))
    check(x, config, dy=other)
    check(x, config, dy=inputs.LAYOUTS["NCHW-cropped"][1](incoming_gradient(x)))
    check(x, config, dy=torch.ones((), dtype=x.dtype).expand(x.shape))
    check(x, config, dy=torch.randn(1, 8, 1, 1).expand(x.shape))


def test_expanded_input() -> None:
    """Stride 0: every position of a plane is one number in memory."""
    check(inputs.gaussian((9, 8, 1, 1)).expand(9, 8, 4, 3), ITER_NORM)


# 1: no whitening, only scaling. 3 is odd. 12: the whole width. 64: wider than the layer, which means the whole width.
@METHODS
@pytest.mark.parametrize("dtype", FULL, ids=name)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 12, 64])
def test_group_sizes(group_size: int, dtype: torch.dtype, config: Config) -> None:
    x = inputs.gaussian((7, 12, 3, 3), dtype=dtype, group_size=min(group_size, 12))
    check(x, replace(config, group_size=group_size))


# One dominant eigenvalue: there eq. 17 as written diverges in float32 from T=9 on and in float64 from T=12 on.
@pytest.mark.parametrize("scaling", ["trace", "frobenius"])
@pytest.mark.parametrize("dtype", FULL, ids=name)
@pytest.mark.parametrize("num_iterations", [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 20])
def test_iterations(num_iterations: int, dtype: torch.dtype, scaling: str) -> None:
    x = inputs.gaussian((8, 8, 4, 4), dtype=torch.float64, condition=100.0)
    x = (x + 10 * torch.randn(8, 1, 4, 4, dtype=torch.float64)).to(dtype)
    check(x, Config(num_iterations=num_iterations, scaling=scaling), stable=True)


# 2: the smallest batch there is. 5 < d and 8 = d: the covariance is singular, with equal eigenvalues (zero) for 5.
@METHODS
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("samples", [2, 5, 8])
def test_fewer_samples_than_channels(samples: int, dtype: torch.dtype, config: Config) -> None:
    check(inputs.gaussian((samples, 8), dtype=dtype), config, stable=True)


# eps 1e-9 leaves the condition number as it is. 1e6 is where float32 has one digit left in the last direction.
@pytest.mark.parametrize("config", [ITER_NORM, replace(ITER_NORM, num_iterations=12), FROBENIUS, DBN],
                         ids=["T5", "T12", "frobenius", "eigh"])  # fmt: skip
@pytest.mark.parametrize("dtype", FULL, ids=name)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6], ids="cond{:g}".format)
def test_condition_numbers(condition: float, dtype: torch.dtype, config: Config) -> None:
    check(inputs.gaussian((40, 8, 3, 3), dtype=dtype, condition=condition), replace(config, eps=1e-9))


# In standard deviations. 1e4: where a one-pass covariance without a shift loses all digits in float32.
# 1e5: float32 itself holds x to 1/256 of a standard deviation.
@METHODS
@pytest.mark.parametrize("dtype", FULL, ids=name)
@pytest.mark.parametrize("mean", [0.0, -1e2, 1e4, 1e5], ids="mean{:g}".format)
def test_large_means(mean: float, dtype: torch.dtype, config: Config) -> None:
    check(inputs.gaussian((16, 8, 4, 4), dtype=dtype, mean=mean), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_offset_in_half_types(dtype: torch.dtype) -> None:
    """A mean of 30 standard deviations: rounding W to the input's type would cost 4e-2 of y."""
    check(inputs.gaussian((16, 8, 4, 4), dtype=dtype, mean=30.0), ITER_NORM)


# 1e-6: variances far below eps. 1e4: variances of 1e8, beyond float16. eps is in x's units squared, so not scaled.
@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e2, 1e4], ids="scale{:g}".format)
def test_scales(scale: float, dtype: torch.dtype, config: Config) -> None:
    check(inputs.gaussian((9, 8, 4, 3), dtype=dtype, scale=scale, mean=scale), config)


@METHODS
def test_float16_with_standard_deviation_1000(config: Config) -> None:
    """The square of one value overflows float16; statistics are float32."""
    x = inputs.gaussian((9, 8, 4, 3), dtype=torch.float16, scale=1000.0, mean=500.0)
    assert not (x * x).isfinite().all()
    check(x, config)
    check(x, config, weight_dtype=torch.float32)  # float32 parameters, as under autocast


def one_constant(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([3]), 2.7)


def one_zero(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([0]), 0.0)


def two_equal(x: Tensor) -> Tensor:
    """Make two channels perfectly correlated: an eigenvalue is zero though no channel is constant."""
    return x.index_copy(1, torch.tensor([1]), x[:, :1])


def all_constant(x: Tensor) -> Tensor:
    return torch.full_like(x, -1.3)


def equal_eigenvalues(x: Tensor) -> Tensor:
    """Return rows of a Hadamard matrix: the covariance is exactly the identity."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h[1:9].T.contiguous().to(x.dtype)  # (16, 8), columns of mean zero


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize(
    "degenerate", [one_constant, one_zero, two_equal, all_constant, torch.zeros_like, equal_eigenvalues],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_degenerate_covariances(degenerate, dtype: torch.dtype, config: Config) -> None:  # type: ignore[no-untyped-def]
    check(degenerate(inputs.gaussian((6, 8, 5, 3), dtype=dtype)), config, stable=True)


@pytest.mark.parametrize("given_affine", ["weight", "bias", "neither"])
def test_affine_is_optional(given_affine: str) -> None:
    x = inputs.gaussian(inputs.SHAPE_4D)
    dy = incoming_gradient(x)
    weight, bias = affine(8, x.dtype)
    weight = weight if given_affine == "weight" else None
    bias = bias if given_affine == "bias" else None
    got = run(nk.ops.iter_norm, ITER_NORM, x, dy, weight, bias)
    reference = oracle(ITER_NORM, x, dy, weight, bias)
    assert_iter_norm(got, reference, plain_path(ITER_NORM, x, dy, weight, bias), x, dy, weight, ITER_NORM)


@pytest.mark.on_cpu
def test_strided_affine() -> None:
    """weight and bias may be columns of one tensor."""
    x = inputs.gaussian(inputs.SHAPE_4D)
    weight, bias = affine(8, x.dtype)
    both = torch.stack((weight, bias), 1)
    got = nk.ops.iter_norm(x, 8, weight=both[:, 0], bias=both[:, 1])[0]
    assert torch.equal(got, nk.ops.iter_norm(x, 8, weight=weight, bias=bias)[0])


@METHODS
def test_only_the_gradients_asked_for(config: Config) -> None:
    """A frozen layer before this one: x needs no gradient, weight does; and the other way round."""
    x = inputs.gaussian(inputs.SHAPE_4D)
    weight, bias = affine(8, x.dtype)
    dy = incoming_gradient(x)
    everything = run(nk.ops.iter_norm, config, x, dy, weight, bias)
    for wanted in ({"x"}, {"weight"}, {"bias"}, {"x", "bias"}):
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in (("x", x), ("weight", weight), ("bias", bias))}
        y, mean, w = nk.ops.iter_norm(leaves["x"], config.group_size, config.num_iterations, config.eps,
                                      leaves["weight"], leaves["bias"], config.scaling, config.method)  # fmt: skip
        assert y.requires_grad and not mean.requires_grad and not w.requires_grad
        y.backward(dy)
        for key, leaf in leaves.items():
            if key in wanted:
                assert torch.equal(leaf.grad, getattr(everything, f"d{key}"))  # type: ignore[arg-type]
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.on_cpu
def test_without_autograd(mode: type) -> None:
    x = inputs.gaussian(inputs.SHAPE_4D)
    expected = nk.ops.iter_norm(x, 8)
    with mode():
        got = nk.ops.iter_norm(x.clone(), 8)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.on_cpu
def test_output_is_white() -> None:
    """This is eq. 2's purpose, without any reference: DBN's y has covariance I, and IterNorm's tends to it with T."""
    x = inputs.gaussian((50, 8, 4, 4), condition=10.0)
    eye = torch.eye(8, dtype=x.dtype)

    def distance(**options: object) -> tuple[float, float]:
        y, _, w = nk.ops.iter_norm(x, 8, eps=0.0, **options)  # type: ignore[arg-type]
        floor = 2 * relative_error_of_w(x, w, Config(method="eigh", eps=0.0))
        return (nk.ops.moments(y, 8)[2][0] - eye).abs().max().item(), floor

    for converged in ({"method": "eigh"}, {"num_iterations": 20}, {"num_iterations": 20, "scaling": "frobenius"}):
        far, floor = distance(**converged)
        assert far <= floor
    by_iterations = [distance(num_iterations=t)[0] for t in (0, 1, 3, 5, 7, 20)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert distance(num_iterations=5, scaling="frobenius") < distance(num_iterations=5)
