"""The kernels of ConvNorm's filter, Triton's and CUDA's, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from tests import backends
from tests.oracles import convnorm, inputs
from tests.oracles.plain import stat_dtype
from tests.oracles.run import back, incoming_gradient, moved
from tests.tolerances import assert_within, largest
from tests.tolerances.spectral import filter_floor, filter_spectrum_floor

pytestmark = [
    pytest.mark.usefixtures("backend"),
    backends.only(*backends.KERNELS),
]

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)

Slices = tuple[slice, slice] | None
WHOLE = slice(None)


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64, generator=inputs.generator(seed)) + 1).to(dtype)


def placed(z: Tensor, plane: tuple[int, ...], source: Slices) -> Tensor:
    if source is None:
        return z
    result = z.new_zeros((*z.shape[:2], *plane))
    result[(..., *source)] = z
    return result


def filtered(z: Tensor, v: Tensor, target: Slices, source: Slices) -> Tensor:
    """Compute Algorithm 1 between the windows, in z's type but for the transform."""
    y = convnorm.spectral_filter(placed(z, tuple(v.shape[1:]), source).to(v.dtype), v).to(z.dtype)
    return y if target is None else y[(..., *target)]


def ours(z: Tensor, v: Tensor, target: Slices, source: Slices) -> Tensor:
    return nk.ops.spectral_filter(z, v, target, source)


def run(path: Any, z: Tensor, v: Tensor, dy: Tensor, *windows: Slices) -> tuple[Tensor, Tensor, Tensor]:
    z, v = z.detach().requires_grad_(), v.detach().requires_grad_()
    y = path(z, v, *windows)
    dz, dv = torch.autograd.grad(y, (z, v), dy.to(y.dtype))
    return y.detach(), dz, dv


def check(z: Tensor, v: Tensor, target: Slices = None, source: Slices = None, dy: Tensor | None = None) -> None:
    """Check y, dz and dv, each channel of y and dz by itself: a large one must not cost a small one its digits."""
    windows = target, source
    if dy is None:
        dy = incoming_gradient(filtered(z.double(), v.double(), *windows)).to(z.dtype)
    y_ref, dz_ref, dv_ref = run(filtered, z.double(), v.double(), dy.double(), *windows)
    y_plain, dz_plain, dv_plain = run(filtered, z, v, dy, *windows)
    y, dz, dv = map(back, run(ours, moved(z), moved(v), moved(dy), *windows))
    assert y.dtype == dz.dtype == z.dtype and dv.dtype == v.dtype
    # The floors are for whole planes: what a window leaves out is zero, or was not asked for.
    z_plane, dy_plane = placed(z, tuple(v.shape[1:]), source), placed(dy, tuple(v.shape[1:]), target)
    y_plane = filtered(z_plane.double(), v.double(), None, None)
    dz_plane = filtered(dy_plane.double(), v.double(), None, None)
    for name, got, ref, plain, floor in (
        ("y", y, y_ref, y_plain, filter_floor(z_plane, v, y_plane)),
        ("dz", dz, dz_ref, dz_plain, filter_floor(dy_plane, v, dz_plane)),
    ):
        assert got.shape == ref.shape
        for c in range(z.shape[1]):
            assert_within(
                f"{name}, channel {c}", got[:, c], ref[:, c], plain[:, c], floor[c].item(), largest(ref[:, c])
            )
    assert_within("dv", dv, dv_ref, dv_plain, filter_spectrum_floor(z_plane, v, dy_plane, dv_ref), largest(dv_ref))


# One pixel and lines, odd, a power of two that fills its tile, unequal sides with unequal tiles, the sizes of an
# ImageNet network (32 + 2, 56 + 2), and the largest.
SIZES = [(1, 1), (1, 9), (6, 1), (3, 2), (5, 7), (16, 16), (17, 34), (34, 17), (32, 33), (58, 58), (64, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_plane(size: tuple[int, int]) -> None:
    check(values((1, 2, *size)), values((2, *size), seed=1))


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_signals(length: int) -> None:
    check(values((1, 2, length)), values((2, length), seed=1))


@DTYPES
@pytest.mark.parametrize("size", [(9, 13), (34, 34)], ids=str)
def test_types(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(values((1, 2, *size), dtype), values((2, *size), stat_dtype(dtype), seed=1))


LAYOUTS = ["NCHW", "NCHW-unaligned", "NHWC", "NHWC-channel-slice", "CHWN", "NCHW-channel-slice", "NCHW-cropped", "NLC"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    shape = (2, 3, 7) if layout == "NLC" else (2, 3, 4, 3)
    dtype = torch.bfloat16 if layout in ("NCHW-cropped", "NHWC-channel-slice") else torch.float32
    check(inputs.LAYOUTS[layout][1](values(shape, dtype)), values(shape[1:], seed=1))


def test_expanded_gradient() -> None:
    check(values((2, 3, 9, 7)), values((3, 9, 7), seed=1), dy=torch.ones(()).expand(2, 3, 9, 7))


def test_layouts_of_the_spectrum() -> None:
    check(values((1, 4, 9, 7)), values((7, 9, 4), seed=1).permute(2, 1, 0))
    check(values((1, 4, 9, 7)), values((1, 9, 7), seed=1).expand(4, 9, 7))


# A crop, strides that start on either parity, a placed tile, both, and windows that have none of one half of the plane.
WINDOWS: list[tuple[Slices, Slices]] = [
    ((slice(1, 8), slice(1, 9)), None),
    ((slice(1, 8, 2), slice(0, 9, 2)), None),
    ((slice(0, 9, 3), slice(2, 3)), None),
    (None, (slice(2, 7), slice(0, 4))),
    ((slice(1, 9, 2), WHOLE), (slice(0, 9, 2), slice(3, 10, 3))),
    ((slice(6, 9), slice(7, 10)), (slice(0, 3), slice(0, 2))),
]


@pytest.mark.parametrize(("target", "source"), WINDOWS, ids=str)
def test_windows(target: Slices, source: Slices) -> None:
    """z is channels_last where it is the whole plane."""
    z = values((1, 2, 9, 10))
    z = z.contiguous(memory_format=torch.channels_last) if source is None else z[(..., *source)].contiguous()
    check(z, values((2, 9, 10), seed=1), target, source)


# One sample, many of one channel, several of both. 3 is no multiple of the channels of a program, nor are 11 samples of
# the parts of a sum.
@pytest.mark.parametrize("count", [(1, 3), (11, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers_of_planes(count: tuple[int, int], channels_last: bool) -> None:
    z = values((*count, 5, 6))
    check(z.contiguous(memory_format=torch.channels_last) if channels_last else z, values((count[1], 5, 6), seed=1))


def test_a_large_channel_next_to_a_small_one() -> None:
    z, v = values((2, 4, 9, 10)), values((4, 9, 10), seed=1)
    z[:, 1] *= 1e6
    v[2] *= 1e6
    check(z.contiguous(memory_format=torch.channels_last), v)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_bad_value_stays_in_its_plane(channels_last: bool) -> None:
    z, v = moved(values((3, 4, 9, 7))), moved(values((4, 9, 7), seed=1))
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    expected = nk.ops.spectral_filter(z, v)
    z[1, 2, 0, 0] = float("nan")
    y = nk.ops.spectral_filter(z, v)
    assert y[1, 2].isnan().all()
    y[1, 2] = expected[1, 2]
    assert torch.equal(y, expected)


def test_gradient_of_the_gradient() -> None:
    """The filter and cross_spectrum are each other's gradients; the second derivative in (z, v) is bilinear."""
    z, v, dy, of_z, of_v = (
        values(shape, torch.float64, seed=seed)
        for seed, shape in enumerate([(2, 3, 5, 6), (3, 5, 6), (2, 3, 5, 6), (2, 3, 5, 6), (3, 5, 6)])
    )

    def second(path: Any, *args: Tensor) -> list[Tensor]:
        z, v, dy, of_z, of_v = (t.detach().requires_grad_() for t in args)
        first = torch.autograd.grad(path(z, v, None, None), (z, v), dy, create_graph=True)
        return list(torch.autograd.grad(first, (z, v, dy), (of_z, of_v)))

    expected = second(filtered, z, v, dy, of_z, of_v)
    got = second(ours, *(moved(t.float()) for t in (z, v, dy, of_z, of_v)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5 * largest(b))


def test_bit_for_bit_the_same() -> None:
    z, v = moved(values((5, 1, 9, 10))), moved(values((1, 9, 10), seed=1))
    dy = incoming_gradient(z)
    first, second = run(ours, z, v, dy, None, None), run(ours, z, v, dy, None, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 9, 7), (0, 4, 9)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    z, v = moved(torch.empty(shape)), moved(values(shape[1:]))
    y, dz, dv = run(ours, z, v, moved(torch.empty(shape)), None, None)
    assert y.shape == dz.shape == shape and not dv.any()
