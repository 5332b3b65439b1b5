"""The Triton kernels of a weight's spectrum against the float64 oracle; those of its filter: test_spectral_kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.triton.support import Unsupported
from tests.ops.test_spectral_kernels import DTYPES, values
from tests.oracles import convnorm, inputs
from tests.tolerances import assert_within, largest
from tests.tolerances.spectral import spectrum_floor, spectrum_gradient_floor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with nk.use_backend("triton"):
        yield


def test_triton_serves_these_ops() -> None:
    """If it did not, everything below would compare eager with the oracle."""
    for op in ("spectral_filter", "cross_spectrum", "kernel_spectrum", "kernel_spectrum_backward"):
        assert nk.backend_of(op, torch.ones(2, 3, 5, 7, device=DEVICE)) == "triton"


def test_what_the_kernels_do_not_serve() -> None:
    from normkernels.primitives.kernel_spectrum import triton as triton_weights
    from normkernels.primitives.spectral_filter import triton as launchers

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


def test_without_float64_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the spectrum adds up in float64, and keeps it in memory."""
    monkeypatch.setattr("normkernels._warnings.warned", set())
    monkeypatch.setenv("NORMKERNELS_NO_FLOAT64", "1")
    weight = torch.ones(1, 2, 3, 3, device=DEVICE, requires_grad=True)
    with pytest.warns(UserWarning, match="expected a device with float64") as warned:
        nk.ops.kernel_spectrum(weight, (5, 6)).sum().backward()
    assert len(warned) == 2  # one for each op


SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


def check_spectrum(
    weight: Tensor, size: tuple[int, ...], eps: float = 1e-8, dilation: int | tuple[int, ...] = 1
) -> Tensor:
    """Check v entry by entry, and the gradient; see test_kernel_spectrum.py."""
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
    """There are more taps than a tile of the kernel holds, and no multiple of it."""
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
    """A channel of zeros gets 1 and no gradient; another is 1e15 times the others."""
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
