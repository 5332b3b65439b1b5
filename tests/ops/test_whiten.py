"""whiten against eq. 12 and 16 with the affine transform: one map per group, differentiable in all five inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from normkernels.primitives.whiten.eager import SMALL_MEAN
from tests.oracles import inputs, iternorm, plain
from tests.oracles.plain import stat_dtype
from tests.oracles.run import back, incoming_gradient, leaf, moved
from tests.tolerances import assert_within, largest
from tests.tolerances.whitening import whiten_floors

# The kernels leave float64 and the second derivatives' small products to plain PyTorch, and say so once.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*plain PyTorch instead of the Triton kernels"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "mean", "W", "weight", "bias")


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def arguments(x: Tensor, d: int, *, mean: float = 1.0, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return x, a mean that is not x's, a W that is not symmetric, gamma of both signs, and beta."""
    c, dtype, g = x.shape[1], stat_dtype(x.dtype), inputs.generator(7)
    w, mu, affine = (torch.randn(s, dtype=torch.float64, generator=g) for s in ((c // d, d, d), (c,), (2, c)))
    affine = affine.to(weight_dtype or x.dtype)
    return [x, (mean + mu / 10).to(dtype), w.to(dtype), affine[0], affine[1]]


def run(path, arguments: list[Tensor | None], dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:  # type: ignore[no-untyped-def]
    leaves = [leaf(t) for t in arguments]
    y = path(*leaves)
    y.backward(moved(dy).to(y.dtype))
    return back(y), [None if t is None else back(t.grad) for t in leaves]


def check(arguments: list[Tensor | None], dy: Tensor | None = None) -> None:
    x = arguments[0]
    assert x is not None
    dy = incoming_gradient(x) if dy is None else dy
    y, grads = run(nk.ops.whiten, arguments, dy)
    exact = [None if t is None else t.detach().double() for t in arguments]
    y_ref, grads_ref = run(iternorm.whiten, exact, dy)
    y_plain, grads_plain = run(plain.whiten, arguments, dy)
    assert y.dtype == x.dtype
    floors = whiten_floors(arguments, dy, y_ref, grads_ref)
    assert_within("y", y, y_ref, y_plain, floors["y"], largest(y_ref))
    for key, value, got, ref, other in zip(NAMES, arguments, grads, grads_ref, grads_plain, strict=True):
        if value is None:
            assert got is None
            continue
        assert got is not None and ref is not None and got.dtype == value.dtype
        assert_within(f"d{key}", got, ref, other, floors[key], largest(ref))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_every_layout_and_type(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(arguments(lay_out(inputs.gaussian(shape, dtype=dtype)), 4))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_ragged_tiles(layout: str) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(arguments(lay_out(inputs.gaussian(shape, dtype=torch.float32)), 4))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6, 12])
def test_group_sizes(d: int) -> None:
    check(arguments(inputs.gaussian((7, 12, 3, 3), group_size=d), d))


def check_stacked(grad: Tensor, x: Tensor, d: int) -> None:
    """Check that the op beneath the backward passes is the sum of two maps.

    It is [A | B] [grad - its mean; x - mean] + c.
    """
    (_, grad_mean, A, _, _), (_, mean, B, _, c) = arguments(grad, d, mean=2.0), arguments(x, d)
    c = c.to(mean.dtype)
    y = torch.ops.normkernels.stacked_mix(*(moved(t) for t in (grad, x, grad_mean, mean, torch.cat((A, B), 2), c)))

    def path(of: Any, kind: Any) -> Tensor:
        left, right = of(kind(grad), kind(grad_mean), kind(A)), of(kind(x), kind(mean), kind(B), None, kind(c))
        return left + right

    ref, same = path(iternorm.whiten, Tensor.double), path(plain.whiten, lambda t: t)
    halves: list[list[Tensor | None]] = [[grad, grad_mean, A, None, None], [x, mean, B, None, c]]
    floor = sum(whiten_floors(half, torch.zeros_like(x), ref, [None] * 5)["y"] for half in halves)
    assert y.dtype == x.dtype and y.stride() == nk.ops.whiten(x, mean, B).stride()
    assert_within("y", back(y), ref, same, floor, largest(ref))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_stacked_mix_in_every_layout_and_type(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype))
    check_stacked(incoming_gradient(x), x, 4)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6, 12])
def test_stacked_mix_of_group_sizes(d: int) -> None:
    x = inputs.gaussian((7, 12, 3, 3), group_size=d)
    check_stacked(incoming_gradient(x).contiguous(memory_format=torch.channels_last), x, d)


@pytest.mark.parametrize("missing", [{"weight"}, {"bias"}, {"weight", "bias"}], ids=lambda s: "-".join(sorted(s)))
def test_affine_is_optional(missing: set[str]) -> None:
    given = arguments(inputs.gaussian(inputs.SHAPE_4D), 4)
    check([None if key in missing else t for key, t in zip(NAMES, given, strict=True)])


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e5], ids="mean{:g}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name)
def test_large_means(dtype: torch.dtype, mean: float) -> None:
    """Means are in standard deviations: A x + (beta - A mean) must not lose more than x - mean does."""
    check(arguments(inputs.gaussian((16, 8, 4, 4), dtype=dtype, mean=mean), 4, mean=mean))


@pytest.mark.parametrize("shape", [(2, 16, 24, 24), (4, 16, 1, 1), (40, 16)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_means_about_where_centring_begins(factor: float, layout: str, shape: tuple[int, ...]) -> None:
    """Small means are folded into c = beta - A mean, larger ones subtracted first: one tolerance for both."""
    x = inputs.gaussian(shape, dtype=torch.float32, mean=1.0)
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    given = arguments(x, 16)
    reach = (given[2].abs() @ given[1].abs().view(1, 16, 1)).max()
    given[1] *= factor * SMALL_MEAN / reach
    check(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_half_types_keep_w_in_float32(dtype: torch.dtype) -> None:
    """At a mean of 30 standard deviations a W rounded to bfloat16 costs 4e-2 of y, with float32 weights, too."""
    x = inputs.gaussian((16, 8, 4, 4), dtype=dtype, mean=30.0)
    check(arguments(x, 4, mean=30.0))
    check(arguments(x, 4, mean=30.0, weight_dtype=torch.float32))


def test_expanded_gradient() -> None:
    x = inputs.gaussian(inputs.SHAPE_4D)
    check(arguments(x, 4), dy=torch.ones((), dtype=x.dtype).expand(x.shape))
    check(arguments(x.contiguous(memory_format=torch.channels_last), 4), dy=incoming_gradient(x))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC", "NDHWC"])
@pytest.mark.on_cpu
def test_layout_is_kept(layout: str) -> None:
    """y, and the gradient of x, have x's strides, whatever those of dy are."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape)).requires_grad_()
    y = nk.ops.whiten(x, *arguments(x.detach(), 4)[1:])
    for dy in (torch.ones_like(y), torch.ones(shape, dtype=y.dtype), torch.ones((), dtype=y.dtype).expand(shape)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3, 3), (4, 8, 0)], ids=str)
@pytest.mark.on_cpu
def test_empty_batch(shape: tuple[int, ...]) -> None:
    given = arguments(torch.empty(shape), 4)
    y, grads = run(nk.ops.whiten, given, torch.empty(shape))  # type: ignore[arg-type]
    assert y.shape == shape
    for value, grad in zip(given, grads, strict=True):
        assert grad is not None and grad.shape == value.shape and not grad.any()


@pytest.mark.on_cpu
def test_a_bad_value_stays_in_its_sample_and_group() -> None:
    given = arguments(inputs.gaussian(inputs.SHAPE_4D), 4)
    expected = nk.ops.whiten(*given)
    given[0] = given[0].clone()
    given[0][2, 1, 0, 0] = float("nan")
    y = nk.ops.whiten(*given)
    assert y[2, :4, 0, 0].isnan().all()
    y[2, :4, 0, 0] = expected[2, :4, 0, 0]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", ["NC", "NLC", "NHWC", "NCHW-cropped"])
def test_gradcheck(layout: str) -> None:
    shape = {"NC": (5, 4), "NLC": (3, 4, 2)}.get(layout, (2, 4, 2, 2))
    given = arguments(inputs.LAYOUTS[layout][1](inputs.gaussian(shape, group_size=4)), 2)
    leaves = [t.detach().requires_grad_() for t in given]
    assert gradcheck(nk.ops.whiten, leaves)
    assert gradgradcheck(nk.ops.whiten, leaves)


X, MEAN, W, VECTOR = torch.ones(4, 6), torch.zeros(6), torch.eye(3).repeat(2, 1, 1), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"x": [1.0]}, TypeError, "torch.Tensor", "list"),
        ({"x": X.long()}, TypeError, "float32", "int64"),
        ({"x": X.cfloat()}, TypeError, "float32", "complex64"),
        ({"x": X[0]}, ValueError, "(N, C", "(6,)"),
        ({"W": W[:1]}, ValueError, "6 channels", "(1, 3, 3)"),
        ({"W": W[0]}, ValueError, "(G, d, d)", "(3, 3)"),
        ({"W": W[:, :2]}, ValueError, "(G, d, d)", "(2, 2, 3)"),
        ({"W": W.double()}, TypeError, "float32", "float64"),
        ({"W": W.to("meta")}, ValueError, "cpu", "meta"),
        ({"mean": MEAN[:5]}, ValueError, "(6,)", "(5,)"),
        ({"mean": MEAN.half()}, TypeError, "float32", "float16"),
        ({"mean": MEAN.to("meta")}, ValueError, "cpu", "meta"),
        ({"weight": VECTOR[:5]}, ValueError, "(6,)", "(5,)"),
        ({"weight": VECTOR.view(1, 6, 1, 1)}, ValueError, "(6,)", "(1, 6, 1, 1)"),
        ({"weight": VECTOR.double()}, TypeError, "float32", "float64"),
        ({"weight": VECTOR.to("meta")}, ValueError, "cpu", "meta"),
        ({"bias": VECTOR[:5]}, ValueError, "(6,)", "(5,)"),
        ({"bias": VECTOR.long()}, TypeError, "float32", "int64"),
        ({"bias": 1.0}, TypeError, "torch.Tensor", "float"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], expected: str, got: str) -> None:
    arguments = {"x": X, "mean": MEAN, "W": W, "weight": VECTOR, "bias": VECTOR} | change
    with pytest.raises(error) as raised:
        nk.ops.whiten(**arguments)  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value) and next(iter(change)) in str(raised.value)
