"""pop_norm against eq. 11 and 12 (18 and 19): outputs and gradients, over everything an input can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.oracles import inputs, popnorm
from tests.oracles.run import back, incoming_gradient, leaf, moved
from tests.tolerances import assert_within, largest
from tests.tolerances.moments import mean_floor
from tests.tolerances.pop_norm import dbeta_error, pop_norm_floors

# The kernels leave float64 and second derivatives to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.pairwise,
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FULL = [torch.float64, torch.float32]
MODES = pytest.mark.parametrize(
    ("center", "scale"), [(True, True), (True, False), (False, True)], ids=["both", "center", "scale"]
)
NAMES = ("y", "dx", "dweight", "dbias")


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(path: Any, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> list[Any]:
    """Return y, the gradients of x, weight and bias, mean and variance."""
    leaves = [leaf(t) for t in (x, weight, bias)]
    y, mean, var = path(*leaves, *options)
    y.backward(moved(dy).to(y.dtype))
    return [back(t) for t in (y, *(None if each is None else each.grad for each in leaves), mean, var)]


def check(
    x: Tensor, *, kappa: float = 4.0, eps: float = 1e-5, center: bool = True, scale: bool = True,
    dy: Tensor | None = None, affine: bool = True, affine_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    dy = incoming_gradient(x) if dy is None else dy
    vectors = torch.randn(2, x.shape[1], dtype=torch.float64, generator=inputs.generator(5))
    weight, bias = vectors.to(affine_dtype or x.dtype)
    weight, bias = weight if scale and affine else None, bias if center and affine else None
    options = (kappa, eps, center, scale)
    got = run(nk.ops.pop_norm, x, dy, weight, bias, *options)
    up = [None if t is None else t.detach().double() for t in (x, dy, weight, bias)]
    exact = run(popnorm.pop_norm, *up, *options)
    plain = run(popnorm.plain, x, dy, weight, bias, *options)
    assert got[0].dtype == got[1].dtype == x.dtype
    floors = pop_norm_floors(x, dy, weight, bias, *options, exact[:4])
    for key, value, reference, other, floor in zip(NAMES, got, exact, plain, floors, strict=False):
        assert (value is None) == (reference is None), key
        if value is not None:
            assert_within(key, value, reference, other, floor, largest(reference))
    mean, var = got[4:]
    assert mean.dtype == var.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert_within("mean", mean, exact[4], plain[4], mean_floor(x), largest(exact[4]))
    u = torch.finfo(mean.dtype).eps / 2
    m = x.numel() // x.shape[1]
    floor_of_var = u * (4 + m**0.5) * largest(exact[5]) + (2 * u * largest(x.double())) ** 2
    assert_within("var", var, exact[5], plain[5], floor_of_var, largest(exact[5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_every_layout_and_type(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=dtype)))


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", ["NC", "NHWC", "NCHW-cropped"])
def test_modes(layout: str, dtype: torch.dtype, center: bool, scale: bool) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=dtype)), center=center, scale=scale)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_ragged_tiles(layout: str) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(inputs.gaussian(shape, dtype=torch.float32)))


@pytest.mark.parametrize("shape", [(5, 1, 4, 3), (3, 70, 9, 7), (2, 257), (1, 3, 40, 33), (130, 33)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channel_counts(shape: tuple[int, ...], layout: str) -> None:
    x = inputs.gaussian(shape, dtype=torch.float32, group_size=1)
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    check(x)


@MODES
@pytest.mark.parametrize("dtype", FULL, ids=name)
@pytest.mark.parametrize("mean", [-1e2, 1e5], ids="mean{:g}".format)
def test_large_means(mean: float, dtype: torch.dtype, center: bool, scale: bool) -> None:
    check(inputs.gaussian((16, 8, 4, 4), dtype=dtype, mean=mean), center=center, scale=scale)


@MODES
def test_large_means_cost_nothing(center: bool, scale: bool) -> None:
    """The rounding of the mean, 1/256 of a deviation, is taken out of y and of the gradients again."""
    x = inputs.gaussian((9, 8, 3, 2), dtype=torch.float32, mean=-1e5)
    dy = incoming_gradient(x) + 3  # a mean of its own, which the rounding of x's mean would be multiplied with
    vectors = torch.linspace(-1, 2, 8), torch.linspace(1, -1, 8)
    weight, bias = vectors[0] if scale else None, vectors[1] if center else None
    options = (4.0, 1e-5, center, scale)
    got = run(nk.ops.pop_norm, x, dy, weight, bias, *options)
    up = [None if t is None else t.double() for t in (x, dy, weight, bias)]
    exact = run(popnorm.pop_norm, *up, *options)
    centered = (x.double() - exact[4].view(-1, 1, 1)).float() if center else x
    floors = pop_norm_floors(centered, dy, weight, bias, *options, exact[:4])
    for key, value, reference, floor in zip(NAMES, got, exact, floors, strict=False):
        if value is not None:
            assert_within(key, value, reference, None, floor, largest(reference))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_tiles_of_different_means(mean: float) -> None:
    """Each sample has a mean of its own, so tiles differ from the total by more than their own deviation."""
    x = inputs.gaussian(inputs.SHAPE_4D, mean=mean)
    check((x + 30 * torch.arange(6.0).view(-1, 1, 1, 1)).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e2, 1e4], ids="scale{:g}".format)
def test_scales(factor: float, dtype: torch.dtype) -> None:
    check(inputs.gaussian((9, 8, 4, 3), dtype=dtype, scale=factor, mean=factor))


def test_float16_with_standard_deviation_1000() -> None:
    """The square of one value overflows float16; statistics are float32, as parameters may be under autocast."""
    x = inputs.gaussian((9, 8, 4, 3), dtype=torch.float16, scale=1000.0, mean=500.0)
    check(x)
    check(x, affine_dtype=torch.float32)


@pytest.mark.parametrize("kappa", [1.0, 16.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_options(kappa: float, eps: float) -> None:
    check(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32), kappa=kappa, eps=eps)


@MODES
def test_without_parameters(center: bool, scale: bool) -> None:
    check(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32), center=center, scale=scale, affine=False)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_incoming_gradient_of_another_layout(layout: str) -> None:
    x = inputs.LAYOUTS[layout][1](inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32))
    check(x, dy=inputs.LAYOUTS["NHWC" if layout == "NCHW" else "NCHW"][1](incoming_gradient(x)))
    check(x, dy=torch.ones((), dtype=x.dtype).expand(x.shape))


@pytest.mark.parametrize("value", [0.0, 2.7])
def test_constant_channels(value: float) -> None:
    """Without variance x~ = beta, and y = gamma beta / (kappa |beta|) but for eps."""
    check(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32).index_fill(1, torch.tensor([0, 3]), value))


def test_gradient_of_a_beta_far_above_the_deviation() -> None:
    """dbeta = a ((sigma^2 + eps) f - beta D) / r^2 is small there, and its digits are not lost to larger terms."""
    x = inputs.gaussian((6, 8, 4, 4), dtype=torch.float32, scale=1e-3, mean=0.0)
    ones = torch.ones(8)
    options = (1.0, 0.0, True, True)
    *_, got, _, _ = run(nk.ops.pop_norm, x, torch.ones_like(x), ones, ones, *options)
    *_, exact, _, _ = run(popnorm.pop_norm, *(t.double() for t in (x, torch.ones_like(x), ones, ones)), *options)
    assert ((got.double() - exact).abs() <= dbeta_error(x, 1.0) * exact.abs()).all()


@pytest.mark.on_cpu
def test_it_is_batch_norm_without_beta() -> None:
    """With beta = 0 and kappa = 1 eq. 12 is BatchNorm's."""
    x = inputs.gaussian(inputs.SHAPE_4D)
    weight = torch.linspace(-1, 2, 8, dtype=x.dtype)
    y, _, _ = nk.ops.pop_norm(x, weight, None, 1.0, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, weight, None, training=True))


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3, 3), (4, 8, 0)], ids=str)
@pytest.mark.on_cpu
def test_empty_batch(shape: tuple[int, ...]) -> None:
    vector = torch.ones(8)
    y, *grads, mean, var = run(nk.ops.pop_norm, torch.empty(shape), torch.empty(shape), vector, vector)
    assert y.shape == shape and not mean.any() and not var.any()
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
@pytest.mark.on_cpu
def test_layout_is_kept(layout: str) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32)).requires_grad_()
    y, _, _ = nk.ops.pop_norm(x)
    for dy in (torch.ones_like(y), torch.ones(shape), torch.ones(()).expand(shape)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert y.stride() == dx.stride() == x.stride()


@pytest.mark.on_cpu
def test_a_bad_value_stays_in_its_channel() -> None:
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    expected = nk.ops.pop_norm(x)
    x[2, 1, 0, 0] = float("nan")
    others = [0, *range(2, 8)]
    for got, want in zip(nk.ops.pop_norm(x), expected, strict=True):
        dim = min(got.dim() - 1, 1)
        assert got.select(dim, 1).isnan().all()
        assert torch.equal(got.index_select(dim, torch.tensor(others)), want.index_select(dim, torch.tensor(others)))


@MODES
@pytest.mark.on_cpu
def test_gradients_of_any_order(center: bool, scale: bool) -> None:
    x = inputs.gaussian((3, 2, 2, 2), group_size=1).requires_grad_()
    vector = torch.tensor([0.7, -1.2], dtype=torch.float64)
    names = ["x", *(["weight"] if scale else []), *(["bias"] if center else [])]

    def path(*leaves: Tensor) -> Tensor:
        return nk.ops.pop_norm(
            **dict(zip(names, leaves, strict=True)), kappa=2.0, eps=1e-3, center=center, scale=scale
        )[0]

    leaves = [x, *(vector.clone().requires_grad_() for _ in names[1:])]
    assert gradcheck(path, leaves)
    assert gradgradcheck(path, leaves)


X, VECTOR = torch.ones(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"x": [1.0]}, TypeError, "torch.Tensor", "list"),
        ({"x": X.long()}, TypeError, "float32", "int64"),
        ({"x": X[0]}, ValueError, "(N, C", "(6,)"),
        ({"weight": VECTOR[:5]}, ValueError, "(6,)", "(5,)"),
        ({"weight": VECTOR.double()}, TypeError, "float32", "float64"),
        ({"bias": VECTOR.to("meta")}, ValueError, "cpu", "meta"),
        ({"kappa": 0.5}, ValueError, "at least 1", "0.5"),
        ({"kappa": float("nan")}, ValueError, "at least 1", "nan"),
        ({"kappa": "4"}, TypeError, "a number", "'4'"),
        ({"eps": -1.0}, ValueError, "at least 0", "-1"),
        ({"center": "no"}, TypeError, "True or False", "'no'"),
        ({"scale": False}, ValueError, "None with scale=False", "(6,)"),
        ({"center": False}, ValueError, "None with center=False", "(6,)"),
        ({"center": False, "scale": False, "weight": None, "bias": None}, ValueError, "at least one", "False"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
@pytest.mark.on_cpu
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], expected: str, got: str) -> None:
    given = {"x": X, "weight": VECTOR, "bias": VECTOR} | change
    with pytest.raises(error) as raised:
        nk.ops.pop_norm(**given)
    assert expected in str(raised.value) and got in str(raised.value)
