"""kernel_spectrum against equation 6: by an FFT of every padded kernel, and with dense circulant matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import normkernels as nk
from tests.oracles import convnorm, inputs
from tests.oracles.plain import stat_dtype
from tests.oracles.run import leaf
from tests.tolerances import assert_within, largest, unit
from tests.tolerances.spectral import peak_power, spectrum_floor, spectrum_gradient_floor, spectrum_terms

# torch's own tracing code touches deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)
SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


def kernels(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Draw kernels with a mean of one standard deviation, so that frequency 0 differs from the others."""
    return (torch.randn(shape, dtype=torch.float64, generator=inputs.generator(seed)) + 1).to(dtype)


def run(path: Any, weight: Tensor, dv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    w = leaf(weight)
    v = path(w, *args)
    v.backward(dv.to(v.dtype))
    assert w is not None and w.grad is not None
    return v.detach(), w.grad


def check(weight: Tensor, size: tuple[int, ...], eps: float = 1e-8, dilation: int | tuple[int, ...] = 1) -> Tensor:
    """Check v entry by entry, and the gradient, against the oracle on the same values.

    There is no plain path, because sums are in float64.

    dv is as large as the channel's weight, as in a layer, where it is z^ dy^: dweight = v^2 dv stays in range.
    """
    options = size, eps, dilation
    dv = torch.randn(weight.shape[0], *size, dtype=torch.float64, generator=inputs.generator(3))
    scale = weight.double().abs().flatten(1).amax(1).view(-1, *[1] * len(size))
    dv = (dv * torch.where(scale == 0, 1, scale)).to(stat_dtype(weight.dtype))
    v, dweight = run(nk.ops.kernel_spectrum, weight, dv, *options)
    v_ref, dweight_ref = run(convnorm.kernel_spectrum, weight.double(), dv.double(), *options)
    assert v.dtype == stat_dtype(weight.dtype) and dweight.dtype == weight.dtype and v.is_contiguous()
    assert v.shape == v_ref.shape and v.isfinite().all()
    excess = ((v.double() - v_ref).abs() / spectrum_floor(weight, v_ref)).max().item()
    assert excess <= 1, f"v: {excess:.2g} times the error allowed by spectrum_floor"
    power = convnorm.power(weight.double(), size, dilation)
    floor = spectrum_gradient_floor(weight, v_ref, dv, dweight_ref, power, eps)
    assert_within("dweight", dweight, dweight_ref, None, floor, largest(dweight_ref))
    return v


# Odd, prime, a square, a power of two, twice a prime, and the same with unequal sides: planes of 32 and 56 with a 3 x 3
# kernel are circles of 34 and 58.
SIZES = [
    (7, 7), (9, 9), (13, 13), (16, 16), (17, 17), (26, 26), (34, 34), (58, 58), (64, 64), (7, 16), (34, 13), (9, 58),
]  # fmt: skip
# One tap, even, the usual one, rectangular both ways, and one that fills small planes.
KERNELS = [(1, 1), (2, 2), (3, 3), (3, 5), (5, 2), (5, 5), (1, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kernel_on_every_plane(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    check(kernels((3, 2, *kernel)), size)


# 2 and 3 apart, and another step along each axis.
@pytest.mark.parametrize("dilation", [2, (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (3, 2), (1, 5)], ids=str)
@pytest.mark.parametrize("size", [(9, 9), (13, 16), (34, 34)], ids=str)
def test_dilation(size: tuple[int, int], kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    check(kernels((3, 2, *kernel)), size, dilation=dilation)


@pytest.mark.parametrize("length", [7, 9, 13, 16, 17, 26, 34, 58, 64])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_one_dimension(kernel: int, length: int) -> None:
    """size is an integer or a tuple; dilation is tried where the kernel's extent allows it."""
    weight = kernels((3, 2, kernel))
    v = check(weight, (length,))
    assert torch.equal(nk.ops.kernel_spectrum(weight, length), v)
    if kernel < 5:
        check(weight, (length,), dilation=2)


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 5), 1), ((2, 3), (4, 2)), ((1, 1), 1)], ids=str)
def test_kernel_that_fills_the_plane(kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    """On the smallest plane that is allowed lags wrap around the circle, so the autocorrelation overlaps itself."""
    step = convnorm.per_axis(dilation, 2)
    size = (step[0] * (kernel[0] - 1) + 1, step[1] * (kernel[1] - 1) + 1)
    check(kernels((3, 2, *kernel)), size, dilation=dilation)


@DTYPES
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 5), (1, 6, 2, 2), (5, 4, 3)], ids=str)
def test_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kernels(shape, dtype), (13, 16)[: len(shape) - 2])


# No eps, the default, and one that flattens the spectrum.
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3, 10.0])
def test_eps_is_relative_to_the_mean_power(eps: float) -> None:
    """The mean over frequencies of p + eps E is (1 + eps) E, E the sum of the squared taps (Parseval)."""
    weight = kernels((3, 2, 3, 3))
    v = check(weight, (9, 13), eps)
    mean, expected = (v**-2).flatten(1).mean(1), (1 + eps) * weight.square().flatten(1).sum(1)
    relative = unit(torch.float64) * (4 + spectrum_terms(weight, (9, 13))) * peak_power(weight).flatten()
    assert ((mean - expected).abs() <= relative * v.amax((1, 2)) ** 2 * expected).all()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layouts_of_the_weight(layout: str) -> None:
    weight = kernels((4, 6, 3, 3))
    given = {
        "channels_last": weight.contiguous(memory_format=torch.channels_last),
        "sliced": weight[1:, ::2, :, 1:],
        "expanded": weight[:1, :1, :, :1].expand(4, 6, 3, 3),
    }[layout]
    check(given, (9, 13))


# The equation itself.


@pytest.mark.parametrize(
    ("shape", "size", "dilation"), [((2, 3, 3, 2), (5, 4), 1), ((2, 2, 2, 2), (4, 5), (2, 1)), ((3, 2, 3), (9,), 2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_equation_6_with_dense_matrices(
    shape: tuple[int, ...], size: tuple[int, ...], dilation: int | tuple[int, int], eps: float
) -> None:
    """P_k = (A_k A_k^T + eps E_k I)^(-1/2) is the circulant matrix with v_k on its diagonal in the Fourier basis."""
    weight = kernels(shape)
    v = nk.ops.kernel_spectrum(weight, size, eps, dilation)
    planes, e = convnorm.embed(weight, size, dilation), convnorm.mean_power(weight).flatten().tolist()
    for k in range(shape[0]):
        expected = convnorm.preconditioner(convnorm.channel_matrix(planes[k]), eps, e[k])
        got = convnorm.circulant(torch.fft.ifftn(v[k]).real)
        # eigh commits u sqrt(n) |A A^T| <= u sqrt(n) peak, as a sum of n terms does; v^2 is 1 over the eigenvalue.
        n = got.shape[0]
        relative = unit(torch.float64) * (4 + n**0.5 + spectrum_terms(weight, size))
        floor = n**0.5 * relative * peak_power(weight)[k].item() * v[k].max().item() ** 3
        assert_within(f"P_{k}", got, expected, None, floor, largest(expected))


def test_real_and_symmetric() -> None:
    """v(f) = v(-f): the kernel v_k of section 3.2 is real, even if the weight is not symmetric, on an odd plane."""
    weight = kernels((3, 2, 2, 3))
    v = nk.ops.kernel_spectrum(weight, (9, 16))
    mirrored = v.flip(1, 2).roll((1, 1), (1, 2))
    assert ((v - mirrored).abs() <= 2 * spectrum_floor(weight, v)).all()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_need_nothing_else(groups: int) -> None:
    """A channel's spectrum is that of the kernels it has: the zeros of the full weight add nothing."""
    weight = kernels((6, 6 // groups, 3, 3))
    v = nk.ops.kernel_spectrum(weight, (9, 9))
    full = nk.ops.kernel_spectrum(convnorm.channels(weight, groups), (9, 9))
    assert ((v - full).abs() <= 2 * spectrum_floor(weight, v)).all()


def test_channels_do_not_mix() -> None:
    """One channel is 1e15 times another, whose spectrum must not lose a digit."""
    weight = kernels((2, 3, 3, 3), torch.float32)
    weight[1] *= 1e15
    v = check(weight, (13, 13))
    assert torch.equal(v[0], nk.ops.kernel_spectrum(weight[:1], (13, 13))[0])


# Where peers fail.


@pytest.mark.parametrize("scale", [1e-23, 1e-12, 1e12])
def test_scaled_weights(scale: float) -> None:
    """The squares of 1e-23 vanish in float32, and an absolute eps is larger than all of them."""
    weight = kernels((3, 2, 3, 3), torch.float32)
    v, scaled = check(weight, (13, 16)), check(weight * scale, (13, 16))
    # Scaling rounds the weight: u of each tap, sqrt(peak) in |a^|.
    allowed = 2 * spectrum_floor(weight, v.double()) / v.double()
    allowed += 2 * unit(torch.float32) * (1 + peak_power(weight).sqrt() * v.double())
    assert ((scaled.double() * scale / v.double() - 1).abs() <= allowed).all()


@DTYPES
@pytest.mark.parametrize("size", [(9, 9), (16, 34)], ids=str)
def test_spectral_zeros(size: tuple[int, int], dtype: torch.dtype) -> None:
    """A Sobel kernel has no power at frequency 0 (and along an axis): v is 1 / sqrt(eps E) there, E = 12."""
    weight = SOBEL.to(dtype)[None, None].repeat(2, 1, 1, 1)
    v = check(weight, size)
    floor = spectrum_floor(weight, v.double())[:, :, 0]
    assert ((v[:, :, 0] - (12 * 1e-8) ** -0.5).abs() <= floor).all()


@DTYPES
def test_zero_filter(dtype: torch.dtype) -> None:
    """A channel of zeros has v = 1, and the others are as they were; no gradient is NaN or infinite."""
    weight = kernels((3, 2, 3, 3), dtype)
    weight[1] = 0
    v = check(weight, (9, 13))
    assert torch.equal(v[1], torch.ones_like(v[1]))
    check(torch.zeros(2, 1, 3, 3, dtype=dtype), (5, 5))


def test_almost_zero_filter() -> None:
    """A filter that is not zero is normalized as any other: in float64 the squares of 1e-35 are ordinary numbers."""
    weight = kernels((2, 2, 3, 3), torch.float32)
    weight[1] *= 1e-35
    check(weight, (7, 7))


# Gradients.


@pytest.mark.parametrize(
    ("shape", "size", "dilation"), [((2, 2, 3, 2), (4, 5), 1), ((1, 2, 2, 2), (5, 3), (3, 1)), ((2, 2, 3), (7,), 2)],
    ids=str,
)  # fmt: skip
def test_gradcheck(shape: tuple[int, ...], size: tuple[int, ...], dilation: int | tuple[int, int]) -> None:
    weight = kernels(shape).requires_grad_()
    assert gradcheck(lambda w: nk.ops.kernel_spectrum(w, size, 1e-3, dilation), weight)


def test_gradient_is_orthogonal_to_the_weight() -> None:
    """v(s w) = v(w) / s, so <w, dL/dw> = -<v, dL/dv> for each channel (Euler), for any eps, as eps is relative."""
    weight = kernels((3, 2, 3, 3)).requires_grad_()
    for eps in (1e-8, 0.1):
        v = nk.ops.kernel_spectrum(weight, (7, 9), eps)
        dv = torch.randn(v.shape, dtype=v.dtype, generator=inputs.generator(3))
        (grad,) = torch.autograd.grad(v, weight, dv)
        power = convnorm.power(weight.detach(), (7, 9))
        floor = spectrum_gradient_floor(weight.detach(), v.detach(), dv, grad, power, eps)
        got, expected = (weight * grad).flatten(1).sum(1), -(v * dv).flatten(1).sum(1)
        assert_within("<w, dw>", got.detach(), expected.detach(), None, floor * largest(weight) * 18, largest(expected))


def test_no_gradient_is_asked_for() -> None:
    assert not nk.ops.kernel_spectrum(kernels((2, 2, 3, 3)), (7, 7)).requires_grad


def test_weight_is_not_written_to() -> None:
    weight = kernels((2, 2, 3, 3)).requires_grad_()
    before, version = weight.detach().clone(), weight._version
    nk.ops.kernel_spectrum(weight, (7, 7)).sum().backward()
    assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    torch.compiler.reset()
    weight, dv = kernels((3, 2, 3, 3), torch.float32), kernels((3, 9, 13), torch.float32)
    compiled = torch.compile(nk.ops.kernel_spectrum, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected, got = (run(f, weight, dv, (9, 13)) for f in (nk.ops.kernel_spectrum, compiled))
    v = expected[0].double()
    power = convnorm.power(weight.double(), (9, 13))
    assert ((got[0] - expected[0]).abs() <= 2 * spectrum_floor(weight, v)).all()
    floor = 2 * spectrum_gradient_floor(weight, v, dv, expected[1], power, 1e-8)
    assert_within("dweight", got[1], expected[1].double(), None, floor, largest(expected[1]))


# Bad input.

WEIGHT = torch.ones(4, 3, 5, 3)


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"weight": [1.0]}, TypeError, "torch.Tensor", "list"),
        ({"weight": WEIGHT.long()}, TypeError, "float32", "int64"),
        ({"weight": WEIGHT.to(torch.complex64)}, TypeError, "float32", "complex64"),
        ({"weight": WEIGHT[0, 0]}, ValueError, "C_O", "(5, 3)"),
        ({"weight": WEIGHT[None]}, ValueError, "C_O", "(1, 4, 3, 5, 3)"),
        ({"size": (4, 9)}, ValueError, "5", "4"),
        ({"size": (9, 2)}, ValueError, "3", "2"),
        ({"size": (9, 9), "dilation": 3}, ValueError, "13", "9"),
        ({"size": (9, 9), "dilation": (2, 5)}, ValueError, "11", "9"),
        ({"size": (9,)}, ValueError, "2", "(9,)"),
        ({"size": (9, 9, 9)}, ValueError, "2", "(9, 9, 9)"),
        ({"size": (9, 9), "weight": WEIGHT[..., 0]}, ValueError, "1", "(9, 9)"),
        ({"size": 4, "weight": WEIGHT[..., 0]}, ValueError, "5", "4"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], expected: str, got: str) -> None:
    with pytest.raises(error) as raised:
        nk.ops.kernel_spectrum(**({"weight": WEIGHT, "size": (9, 9)} | change))  # type: ignore[arg-type]
    assert expected in str(raised.value) and got in str(raised.value) and next(iter(change)) in str(raised.value)


# Found by a hostile reading.

KERNEL_WITH_ZEROS = SOBEL.double()[None, None]


@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1e30, 1e160])
def test_float64_kernels_of_any_scale(scale: float) -> None:
    """Their squares over- and underflow; v is homogeneous of degree -1 all the same, and its gradient of degree -2."""
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = weight.clone().requires_grad_(), (weight * scale).requires_grad_()
    v, scaled = (nk.ops.kernel_spectrum(w, (7, 8)) for w in (one, other))
    torch.testing.assert_close(scaled * scale, v, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(v.sum(), one)
    (got,) = torch.autograd.grad((scaled * scale).sum(), other)
    torch.testing.assert_close(got * scale, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_the_floor_without_eps() -> None:
    """At a spectral zero v is 1 / sqrt(2.2e-16 E): rounding of the power, of either sign, is not believed."""
    v = nk.ops.kernel_spectrum(KERNEL_WITH_ZEROS, (8, 9), eps=0.0)
    energy = KERNEL_WITH_ZEROS.square().sum()
    torch.testing.assert_close(v[0, 0, 0], (torch.finfo(torch.float64).eps * energy).rsqrt(), rtol=1e-9, atol=0.0)
    assert v.isfinite().all()


def test_denormal_kernels_have_a_finite_spectrum() -> None:
    v = nk.ops.kernel_spectrum(torch.full((2, 1, 3, 3), 1e-40), (5, 5))
    assert v.isfinite().all() and (v > 1e37).all()


@pytest.mark.parametrize("eps", [0.0, 1e-18, 1e-8, 1e-2])
def test_both_backward_paths_agree(eps: float) -> None:
    """They agree with and without create_graph, at a spectral zero and for zeros, which have no gradient."""
    weight = torch.cat(
        (KERNEL_WITH_ZEROS, torch.zeros_like(KERNEL_WITH_ZEROS), KERNEL_WITH_ZEROS.mT + 1)
    ).requires_grad_()
    v = nk.ops.kernel_spectrum(weight, (9, 8), eps=eps)
    dv = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(2))
    (plain,) = torch.autograd.grad(v, weight, dv, retain_graph=True)
    (graph,) = torch.autograd.grad(v, weight, dv, create_graph=True)
    torch.testing.assert_close(plain, graph.detach(), rtol=1e-6, atol=1e-9 * plain.abs().max().item())
    assert not plain[1].any() and not graph[1].any()


# Devices without float64 add up in digits. Weights of float64 are computed in float64 there, too.


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "1")


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize(
    ("kernel", "size"), [(kernel, (7, 16)) for kernel in KERNELS] + [((3, 3), (58, 9)), ((2, 2), (34, 34))], ids=str
)
def test_digits_for_every_kernel(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    """Kernels with the mean 0, whose power vanishes at frequency 0, are right, too."""
    weight = kernels((3, 2, *kernel), torch.float32)
    check(weight, size)
    if kernel != (1, 1):
        check(weight - weight.mean((2, 3), keepdim=True), size)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("shape", [(2, 2048, 1, 1), (2, 512, 3, 3), (3, 1, 7, 7)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3])
def test_digits_for_sums_of_any_length(shape: tuple[int, ...], eps: float) -> None:
    check(kernels(shape, torch.float32), (16, 17), eps, 2)


@pytest.mark.usefixtures("without_float64")
def test_digits_have_the_same_floor_without_eps() -> None:
    v = nk.ops.kernel_spectrum(SOBEL[None, None], (8, 9), eps=0.0)
    expected = (torch.finfo(torch.float64).eps * SOBEL.double().square().sum()).rsqrt()
    assert abs(v[0, 0, 0].item() / expected.item() - 1) <= 4.5 * unit(torch.float32)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_digits_of_weights_that_are_not_finite(value: float) -> None:
    """They are seen in the channel that has them, as in float64, and in no other."""
    weight = kernels((2, 2, 3, 3), torch.float32)
    weight[0, 0, 0, 0] = value
    v = nk.ops.kernel_spectrum(weight, (7, 8))
    assert v[0].isnan().all() and v[1].isfinite().all()
