"""The Triton kernels of ConvNorm against the float64 oracle, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.ops._triton import Unsupported
from tests.oracles import convnorm, inputs
from tests.oracles.plain import stat_dtype
from tests.oracles.run import incoming_gradient
from tests.tolerances import (
    assert_within,
    filter_floor,
    filter_spectrum_floor,
    largest,
    spectrum_floor,
    spectrum_gradient_floor,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with nk.use_backend("triton"):
        yield


def test_triton_serves_these_ops() -> None:
    """Or everything below would compare eager with the oracle."""
    for op in ("spectral_filter", "cross_spectrum", "kernel_spectrum", "kernel_spectrum_backward"):
        assert nk.backend_of(op, torch.ones(2, 3, 5, 7, device=DEVICE)) == "triton"


# --- the filter -----------------------------------------------------------------------------------------------------

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
    """Algorithm 1 between the windows, in z's type but for the transform."""
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
    """y, dz and dv, each channel of y and dz by itself: a large one must not cost a small one its digits."""
    windows = target, source
    if dy is None:
        dy = incoming_gradient(filtered(z.double(), v.double(), *windows)).to(z.dtype)
    y_ref, dz_ref, dv_ref = run(filtered, z.double(), v.double(), dy.double(), *windows)
    y_plain, dz_plain, dv_plain = run(filtered, z, v, dy, *windows)
    y, dz, dv = (t.cpu() for t in run(ours, z.to(DEVICE), v.to(DEVICE), dy.to(DEVICE), *windows))
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
    """channels_last where z is the whole plane."""
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
    z, v = values((3, 4, 9, 7)).to(DEVICE), values((4, 9, 7), seed=1).to(DEVICE)
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
    got = second(ours, *(t.float().to(DEVICE) for t in (z, v, dy, of_z, of_v)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5 * largest(b))


def test_bit_for_bit_the_same() -> None:
    z, v = values((5, 1, 9, 10)).to(DEVICE), values((1, 9, 10), seed=1).to(DEVICE)
    dy = incoming_gradient(z)
    first, second = run(ours, z, v, dy, None, None), run(ours, z, v, dy, None, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernels_do_not_serve() -> None:
    from normkernels.ops.spectral import triton as launchers
    from normkernels.ops.spectral import triton_weights

    for shape, dtype in (((1, 1, 65, 3), torch.float32), ((1, 1, 3, 65), torch.float32), ((1, 1, 3, 3), torch.float64)):
        z, v = torch.ones(shape, dtype=dtype, device=DEVICE), torch.ones(shape[1:], dtype=dtype, device=DEVICE)
        window = [0, 1, 0, 1]
        with pytest.raises(Unsupported):
            launchers.spectral_filter(z, v, window, [0, 1, shape[2], 0, 1, shape[3]])
        with pytest.raises(Unsupported):
            launchers.cross_spectrum(z, z, shape[2:], window, window)
    with pytest.raises(Unsupported, match="float64"):
        triton_weights.kernel_spectrum(torch.ones(1, 1, 3, 3, dtype=torch.float64, device=DEVICE), [5, 5], 1e-8, [1, 1])
    with pytest.warns(UserWarning, match="65"):
        assert (
            nk.ops.spectral_filter(torch.ones(1, 1, 65, device=DEVICE), torch.ones(1, 65, device=DEVICE)).shape[2] == 65
        )


@pytest.mark.parametrize("shape", [(0, 4, 9, 7), (0, 4, 9)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    z, v = torch.empty(shape, device=DEVICE), values(shape[1:]).to(DEVICE)
    y, dz, dv = run(ours, z, v, torch.empty(shape, device=DEVICE), None, None)
    assert y.shape == dz.shape == shape and not dv.any()


# --- the spectrum of a kernel ---------------------------------------------------------------------------------------

SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


def check_spectrum(
    weight: Tensor, size: tuple[int, ...], eps: float = 1e-8, dilation: int | tuple[int, ...] = 1
) -> Tensor:
    """v entry by entry, and the gradient; see test_kernel_spectrum.py."""
    dv = torch.randn(weight.shape[0], *size, dtype=torch.float64, generator=inputs.generator(3))
    scale = weight.double().abs().flatten(1).amax(1).view(-1, *[1] * len(size))
    dv = (dv * torch.where(scale == 0, 1, scale)).float()
    on_device = weight.to(DEVICE).requires_grad_()
    v = nk.ops.kernel_spectrum(on_device, size, eps, dilation)
    (dweight,) = torch.autograd.grad(v, on_device, dv.to(DEVICE))
    v, dweight = v.detach().cpu(), dweight.cpu()
    exact = weight.double().requires_grad_()
    v_ref = convnorm.kernel_spectrum(exact, size, eps, dilation)
    (dweight_ref,) = torch.autograd.grad(v_ref, exact, dv.double())
    v_ref = v_ref.detach()
    assert v.dtype == torch.float32 and dweight.dtype == weight.dtype and v.isfinite().all()
    excess = ((v.double() - v_ref).abs() / spectrum_floor(weight, v_ref)).max().item()
    assert excess <= 1, f"v: {excess:.2g} times the error allowed by spectrum_floor"
    power = convnorm.power(weight.double(), size, dilation)
    floor = spectrum_gradient_floor(weight, v_ref, dv, dweight_ref, power, eps)
    assert_within("dweight", dweight, dweight_ref, None, floor, largest(dweight_ref))
    return v


# One tap, even and odd, rectangular, a kernel as large as the plane; planes of several tiles of frequencies.
@pytest.mark.parametrize(
    ("kernel", "size"),
    [((1, 1), (5, 7)), ((2, 2), (9, 9)), ((3, 3), (34, 34)), ((3, 5), (3, 5)), ((5, 2), (13, 66)), ((1, 3), (1, 9))],
    ids=str,
)
def test_kernels_and_planes(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    check_spectrum(values((3, 2, *kernel)), size)


@pytest.mark.parametrize("dilation", [2, (1, 2), (3, 1)], ids=str)
def test_dilation(dilation: int | tuple[int, int]) -> None:
    check_spectrum(values((3, 2, 3, 2)), (9, 10), dilation=dilation)


def test_one_dimension() -> None:
    check_spectrum(values((3, 2, 3)), (17,))
    check_spectrum(values((3, 2, 3)), (9,), dilation=2)


@DTYPES
def test_types_of_the_weight(dtype: torch.dtype) -> None:
    check_spectrum(values((3, 2, 3, 3), dtype), (9, 13))


def test_many_input_channels() -> None:
    """More taps than a tile of the kernel holds, and no multiple of it."""
    check_spectrum(values((1, 61, 3, 3)), (5, 5))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layouts_of_the_weight(layout: str) -> None:
    weight = values((3, 4, 3, 3))
    given = {
        "channels_last": weight.contiguous(memory_format=torch.channels_last),
        "sliced": weight[1:, ::2, :, 1:],
        "expanded": weight[:1, :1, :, :1].expand(3, 4, 3, 3),
    }[layout]
    check_spectrum(given, (5, 7))


# No eps, where the floor of rounding decides, the default, and one that flattens the spectrum.
@pytest.mark.parametrize("eps", [1e-8, 1e-3, 10.0])
def test_spectral_zeros(eps: float) -> None:
    v = check_spectrum(SOBEL[None, None].repeat(2, 1, 1, 1), (9, 16), eps)
    expected = (12 * eps) ** -0.5
    assert torch.allclose(v[:, :, 0], torch.tensor(expected), rtol=1e-6)


def test_the_floor_without_eps() -> None:
    """At a spectral zero v is 1 / sqrt(2.2e-16 E), and its gradient is that of E."""
    weight = SOBEL[None, None].to(DEVICE).requires_grad_()
    v = nk.ops.kernel_spectrum(weight, (8, 9), eps=0.0)
    energy = SOBEL.double().square().sum()
    expected = (torch.finfo(torch.float64).eps * energy).rsqrt().float()
    torch.testing.assert_close(v[0, 0, 0].detach().cpu(), expected, rtol=1e-6, atol=0)
    (dweight,) = torch.autograd.grad(v[0, 0, 0], weight)
    torch.testing.assert_close(dweight[0, 0].cpu(), -expected * SOBEL / energy.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-23, 1e-35, 1e12])
def test_scales(scale: float) -> None:
    check_spectrum(values((2, 2, 3, 3)) * scale, (7, 8))


def test_channels_do_not_mix() -> None:
    """One of zeros, which gets 1 and no gradient, and one 1e15 times another."""
    weight = values((4, 2, 3, 3))
    weight[1] = 0
    weight[2] *= 1e15
    v = check_spectrum(weight, (9, 13))
    assert torch.equal(v[1], torch.ones_like(v[1]))
    alone = nk.ops.kernel_spectrum(weight[:1].to(DEVICE), (9, 13)).cpu()
    assert torch.equal(v[:1], alone)
    check_spectrum(torch.zeros(2, 1, 3, 3), (5, 5))


def test_denormal_kernels_have_a_finite_spectrum() -> None:
    v = nk.ops.kernel_spectrum(torch.full((2, 1, 3, 3), 1e-40, device=DEVICE), (5, 5))
    assert v.isfinite().all() and (v > 1e37).all()


def test_not_a_number_stays_in_its_channel() -> None:
    weight = values((3, 2, 3, 3)).to(DEVICE)
    expected = nk.ops.kernel_spectrum(weight, (7, 8))
    weight[1, 1, 0, 2] = float("nan")
    v = nk.ops.kernel_spectrum(weight, (7, 8))
    assert v[1].isnan().all() and torch.equal(v[::2], expected[::2])


def test_spectra_are_bit_for_bit_the_same() -> None:
    weight, dv = values((2, 3, 3, 3)).to(DEVICE).requires_grad_(), values((2, 9, 70)).to(DEVICE)
    results = []
    for _ in range(2):
        v = nk.ops.kernel_spectrum(weight, (9, 70))
        results.append((v.detach(), *torch.autograd.grad(v, weight, dv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
