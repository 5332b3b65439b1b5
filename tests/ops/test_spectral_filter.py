"""spectral_filter against Algorithm 1's IFFT(FFT(z) v): any plane, any layout, differentiable in z and v."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from normkernels.eager.products import fast
from normkernels.primitives.spectral_filter.eager import by_products
from tests.oracles import convnorm, inputs
from tests.oracles.plain import stat_dtype
from tests.oracles.run import incoming_gradient, leaf
from tests.tolerances import assert_within, largest
from tests.tolerances.spectral import filter_floor, filter_spectrum_floor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)


def planes(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64, generator=inputs.generator(0)) + 1).to(dtype)


def spectrum(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a spectrum of both signs, not symmetric: only the real part of the result makes sense of it."""
    return torch.randn(shape, dtype=torch.float64, generator=inputs.generator(1)).to(stat_dtype(dtype))


def run(path: Any, z: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z_leaf, v_leaf = leaf(z), leaf(v)
    assert z_leaf is not None and v_leaf is not None
    y = path(z_leaf, v_leaf)
    y.backward(dy.to(y.dtype))
    assert z_leaf.grad is not None and v_leaf.grad is not None
    return y.detach(), z_leaf.grad, v_leaf.grad


def plain_filter(z: Tensor, v: Tensor) -> Tensor:
    return convnorm.spectral_filter(z.to(v.dtype), v).to(z.dtype)


def check(z: Tensor, v: Tensor, dy: Tensor | None = None) -> None:
    """Check y and dz channel by channel: a large channel must not cost a small one its digits."""
    dy = incoming_gradient(z) if dy is None else dy
    y, dz, dv = run(nk.ops.spectral_filter, z, v, dy)
    y_ref, dz_ref, dv_ref = run(convnorm.spectral_filter, z.double(), v.double(), dy.double())
    y_plain, dz_plain, dv_plain = run(plain_filter, z, v, dy)
    assert y.dtype == dz.dtype == z.dtype and dv.dtype == v.dtype
    for name, got, ref, plain, floor in (
        ("y", y, y_ref, y_plain, filter_floor(z, v, y_ref)),
        ("dz", dz, dz_ref, dz_plain, filter_floor(dy, v, dz_ref)),
    ):
        assert got.shape == ref.shape
        for c in range(z.shape[1]):
            values = got[:, c], ref[:, c], plain[:, c]
            assert_within(f"{name}, channel {c}", *values, floor[c].item(), largest(ref[:, c]))
    assert_within("dv", dv, dv_ref, dv_plain, filter_spectrum_floor(z, v, dy, dv_ref), largest(dv_ref))


# Sizes: odd, prime, a square, a power of two, twice a prime; one-pixel planes and lines; unequal sides, both ways.
SIZES = [
    (7, 7), (9, 9), (13, 13), (16, 16), (17, 17), (26, 26), (34, 34), (58, 58), (64, 64),
    (1, 1), (2, 2), (1, 9), (13, 1), (2, 7), (7, 16), (34, 13), (64, 9), (17, 58),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda t: str(t).removeprefix("torch."))
def test_every_plane(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(planes((2, 3, *size), dtype), spectrum((3, *size), dtype))


@pytest.mark.parametrize("length", [1, 2, 7, 9, 13, 16, 17, 26, 34, 58, 64, 127, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda t: str(t).removeprefix("torch."))
def test_every_length(length: int, dtype: torch.dtype) -> None:
    check(planes((2, 3, length), dtype), spectrum((3, length), dtype))


def test_large_plane() -> None:
    """It is beyond any feature map of an ImageNet network's first layer, and an FFT wins over a product there."""
    check(planes((1, 2, 226, 230)), spectrum((2, 226, 230)))


@DTYPES
@pytest.mark.parametrize("size", [(9, 13), (16, 16), (17,)], ids=str)
def test_types(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(planes((3, 4, *size), dtype), spectrum((4, *size), dtype))


# Many samples of one channel, many channels of one sample, and an odd number of planes.
@pytest.mark.parametrize("count", [(1, 1), (17, 1), (1, 33), (3, 5)], ids=str)
def test_numbers_of_planes(count: tuple[int, int]) -> None:
    check(planes((*count, 7, 10)), spectrum((count[1], 7, 10)))


LAYOUTS = [k for k, (shape, _) in inputs.LAYOUTS.items() if len(shape) in (3, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    check(lay_out(planes(shape, dtype)), spectrum(shape[1:], dtype))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NCL"])
def test_layout_is_kept(layout: str) -> None:
    """y is laid out as z, and dz, which is the same filter, as dy."""
    shape, lay_out = inputs.LAYOUTS[layout]
    z, v = lay_out(planes(shape)).requires_grad_(), spectrum(shape[1:])
    y = nk.ops.spectral_filter(z, v)
    (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
    assert y.stride() == dz.stride() == z.stride()


def test_expanded_gradient() -> None:
    z = planes((3, 4, 9, 7))
    check(z, spectrum((4, 9, 7)), dy=torch.ones(()).expand(z.shape))
    check(z.contiguous(memory_format=torch.channels_last), spectrum((4, 9, 7)), dy=incoming_gradient(z))


@pytest.mark.parametrize("strided", ["transposed", "expanded"])
def test_layouts_of_the_spectrum(strided: str) -> None:
    v = spectrum((7, 9, 4)).permute(2, 1, 0) if strided == "transposed" else spectrum((1, 9, 7)).expand(4, 9, 7)
    check(planes((3, 4, 9, 7)), v)


def test_a_large_channel_next_to_a_small_one() -> None:
    """Planes packed as real and imaginary part of one transform would lose the small one's digits."""
    z, v = planes((3, 4, 9, 10)), spectrum((4, 9, 10))
    z[:, 1] *= 1e6
    v[2] *= 1e6
    check(z, v)


def test_a_bad_value_stays_in_its_plane() -> None:
    z, v = planes((3, 4, 9, 7)), spectrum((4, 9, 7))
    expected = nk.ops.spectral_filter(z, v)
    z[1, 2, 0, 0] = float("nan")
    y = nk.ops.spectral_filter(z, v)
    assert y[1, 2].isnan().all()
    y[1, 2] = expected[1, 2]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(0, 4, 9, 7), (0, 4, 9)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    y, dz, dv = run(nk.ops.spectral_filter, torch.empty(shape), spectrum(shape[1:]), torch.empty(shape))
    assert y.shape == dz.shape == shape and not dv.any()


# Properties of Algorithm 1.


def test_ones_are_the_identity() -> None:
    z, v = planes((2, 3, 9, 13)), torch.ones(3, 9, 13)
    y = nk.ops.spectral_filter(z, v)
    for c, floor in enumerate(filter_floor(z, v, z).tolist()):
        assert_within(f"channel {c}", y[:, c], z[:, c].double(), None, floor, largest(z))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (9,)], ids=str)
def test_circular_convolution(size: tuple[int, ...]) -> None:
    """y is C_v z of section 3.2, with the dense circulant matrix of the kernel v_k = F^-1 v^."""
    weight = planes((3, 2, *[2] * len(size)), torch.float64)
    v = nk.ops.kernel_spectrum(weight, size, 1e-3)
    z = planes((2, 3, *size), torch.float64)
    y = nk.ops.spectral_filter(z, v)
    floor = filter_floor(z, v, y)
    for c in range(3):
        matrix = convnorm.circulant(torch.fft.ifftn(v[c]).real)
        expected = (z[:, c].flatten(1) @ matrix.T).view(2, *size)
        assert_within(f"channel {c}", y[:, c], expected, None, 2 * floor[c].item(), largest(expected))


def test_self_adjoint() -> None:
    """<q, filter(z)> = <filter(q), z>: the same kernel is its own backward, also for a v that is not symmetric."""
    z, v = planes((2, 3, 9, 10), torch.float64), spectrum((3, 9, 10), torch.float64)
    q = incoming_gradient(z)
    y, back = nk.ops.spectral_filter(z, v), nk.ops.spectral_filter(q, v)
    floor = (filter_floor(z, v, y).max() * q.abs().sum() + filter_floor(q, v, back).max() * z.abs().sum()).item()
    assert abs(((q * y).sum() - (back * z).sum()).item()) <= floor


def test_gradient_of_z_alone_and_of_v_alone() -> None:
    """detach_spectrum asks for one only; the other must neither be missed nor computed."""
    z, v = planes((2, 3, 9, 7), torch.float64), spectrum((3, 9, 7), torch.float64)
    dy = incoming_gradient(z)
    _, dz, dv = run(nk.ops.spectral_filter, z, v, dy)
    z_leaf, v_leaf = leaf(z), leaf(v)
    assert z_leaf is not None and v_leaf is not None
    nk.ops.spectral_filter(z_leaf, v).backward(dy)
    nk.ops.spectral_filter(z, v_leaf).backward(dy)
    assert z_leaf.grad is not None and torch.equal(z_leaf.grad, dz)
    assert v_leaf.grad is not None and torch.equal(v_leaf.grad, dv)
    assert not nk.ops.spectral_filter(z, v).requires_grad


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 2, 5), (1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout: str, shape: tuple[int, ...]) -> None:
    z = planes(shape, torch.float64)
    if layout == "channels_last":
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
    leaves = z.requires_grad_(), spectrum(shape[1:], torch.float64).requires_grad_()
    assert gradcheck(nk.ops.spectral_filter, leaves)
    assert gradgradcheck(nk.ops.spectral_filter, leaves)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_compiles_without_graph_breaks(layout: str, dynamic: bool) -> None:
    torch.compiler.reset()
    z, v = inputs.LAYOUTS[layout][1](planes((3, 4, 9, 7))), spectrum((4, 9, 7))
    compiled = torch.compile(nk.ops.spectral_filter, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    dy = incoming_gradient(z)
    expected, got = (run(f, z, v, dy) for f in (nk.ops.spectral_filter, compiled))
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    of_y, of_dz = (filter_floor(t, v, result).max().item() for t, result in ((z, expected[0]), (dy, expected[1])))
    floors = of_y, of_dz, filter_spectrum_floor(z, v, dy, expected[2])
    for name, a, b, floor in zip(("y", "dz", "dv"), got, expected, floors, strict=True):
        assert_within(name, a, b.double(), None, 2 * floor, largest(b))


def test_autocast_leaves_it_alone() -> None:
    """The products of a real DFT are matrix products, which autocast would run in bfloat16."""
    z, v = planes((3, 4, 9, 7)), spectrum((4, 9, 7))
    with torch.autocast("cpu", torch.bfloat16):
        check(z, v)
        check(z.bfloat16(), v)


# Bad input.

Z, V = torch.ones(2, 3, 5, 7), torch.ones(3, 5, 7)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"z": [1.0]}, TypeError, "torch.Tensor", "list"),
        ({"z": Z.long()}, TypeError, "float32", "int64"),
        ({"z": Z.to(torch.complex64)}, TypeError, "float32", "complex64"),
        ({"z": Z[0, 0]}, ValueError, "(N, C", "(5, 7)"),
        ({"z": Z[None]}, ValueError, "(N, C", "(1, 2, 3, 5, 7)"),
        ({"v": 1.0}, TypeError, "torch.Tensor", "float"),
        ({"v": V.to(torch.complex64)}, TypeError, "float32", "complex64"),
        ({"v": V.long()}, TypeError, "float32", "int64"),
        ({"v": V[:, :4]}, ValueError, "3, 5, 7)", "4, 7)"),
        ({"v": V[:, :, :6]}, ValueError, "3, 5, 7)", "5, 6)"),
        ({"v": V.mT}, ValueError, "3, 5, 7)", "7, 5)"),
        ({"v": V[:2]}, ValueError, "3", "2"),
        ({"v": V[:1]}, ValueError, "3", "1"),
        ({"v": V[0]}, ValueError, "(C, H, W)", "(5, 7)"),
        ({"v": V[None]}, ValueError, "(C, H, W)", "(1, 3, 5, 7)"),
        ({"v": V.to("meta")}, ValueError, "cpu", "meta"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], expected: str, got: str) -> None:
    with pytest.raises(error) as raised:
        nk.ops.spectral_filter(**({"z": Z, "v": V} | change))  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value) and next(iter(change)) in str(raised.value)


# Found by a hostile reading.


@pytest.mark.parametrize(
    ("size", "products"),
    [((7, 9), True), ((16, 18), True), ((20, 20), False), ((34, 34), True), ((32, 34), True), ((64, 66), False),
     ((58, 64), True), ((128, 127), True), ((130, 127), False), ((514, 514), False)],
    ids=str,
)  # fmt: skip
def test_the_rule(size: tuple[int, int], products: bool) -> None:
    """Short planes and those with a prime factor above 13 take products, up to 128; torch.fft does the rest."""
    if not fast(torch.ones(1)):
        pytest.skip("needs oneDNN")
    assert by_products(torch.ones(1), *size) is products
    assert not by_products(torch.ones(1, dtype=torch.float64), *size)


def test_nothing_placed_on_the_plane_gives_zeros() -> None:
    empty = slice(2, 2)
    y = nk.ops.spectral_filter(torch.empty(2, 3, 0, 5), torch.ones(3, 6, 5), source=(empty, slice(None)))
    assert torch.equal(y, torch.zeros(2, 3, 6, 5))


def test_windows_that_are_no_slices() -> None:
    z, v = torch.ones(1, 2, 5, 6), torch.ones(2, 5, 6)
    with pytest.raises(TypeError, match=r"target: expected slices, got 1"):
        nk.ops.spectral_filter(z, v, (1, 2))
    with pytest.raises(TypeError, match=r"target: expected an int, got 0.0"):
        nk.ops.spectral_filter(z, v, (slice(0.0, 3.0), slice(None)))
    with pytest.raises(ValueError, match=r"target: expected 2 slices, got 1"):
        nk.ops.spectral_filter(z, v, (slice(None),))


def test_numpys_integers_are_integers() -> None:
    weight = torch.ones(2, 1, 3)
    assert torch.equal(nk.ops.kernel_spectrum(weight, np.int64(7)), nk.ops.kernel_spectrum(weight, 7))
    layer = nk.ConvNorm1d(np.int64(2), 4, np.int32(3), groups=np.int64(2))
    assert layer(torch.ones(1, 2, np.int64(9))).shape == (1, 4, 7)
    assert nk.IterNorm1d(np.int64(8), group_size=np.int64(4)).running_whitening.shape == (2, 4, 4)
    with pytest.raises(TypeError, match="expected an int, got True"):
        nk.ConvNorm1d(2, 4, True)
