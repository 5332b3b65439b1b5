"""ConvNorm's providers: layers, weight normalizations, the filter and the spectrum, each with its float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations

from bench.measure.workload import CONV_PASSES, Provider, Reference, Tensors, Workload, match_layout
from bench.providers.catalogue import package, parameter_dtype

EPS = 1e-8
FILTER_PASSES = {"forward": 2, "backward": 2, "full": 4, "inference": 2}


def padded_spectrum(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (sum_i |FFT(a_ki)|^2 + eps E_k)^(-1/2) as Algorithm 1 is written: every kernel is padded to the plane."""
    power = torch.fft.rfft2(weight, s=size).abs().square().sum(1)
    energy = weight.square().sum((1, 2, 3))
    return (power + EPS * energy[:, None, None]).rsqrt()


def fft_filter(z: Tensor, half: Tensor) -> Tensor:
    """Filter planes by torch.fft; half: the spectrum at the frequencies that rfft2 keeps."""
    h, w = z.shape[2:]
    return torch.fft.irfft2(torch.fft.rfft2(z) * half, s=(h, w))


def plain_conv_norm(x: Tensor, weight: Tensor, affine: Tensor | None, bias: Tensor, stride: int) -> Tensor:
    """Return ConvNorm of odd kernels with 'same' padding, appendix B step by step."""
    reach = weight.shape[2] - 1
    z = F.conv2d(x, weight, padding=reach)
    half = padded_spectrum(weight.detach(), (z.shape[2], z.shape[3]))
    crop = slice(reach // 2, -(reach // 2), stride)
    y = fft_filter(z, half)[:, :, crop, crop]
    if affine is None:
        return y + bias.view(-1, 1, 1)
    return F.conv2d(y, affine, bias, padding=reach // 2, groups=len(affine))


class PlainConvNorm(nn.Conv2d):
    """ConvNorm as a researcher writes it: torch.fft, autograd for the rest."""

    def __init__(self, channels: int, stride: int, **factory: Any) -> None:
        super().__init__(channels, channels, 3, stride=stride, padding=1, **factory)
        identity = torch.zeros(channels, 1, 3, 3, **factory)
        identity[:, :, 1, 1] = 1
        self.affine_weight = nn.Parameter(identity)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return plain_conv_norm(x, self.weight, self.affine_weight, self.bias, int(self.stride[0]))


def conv_norm_reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    assert isinstance(layer.stride, tuple)
    return plain_conv_norm(x, tensors["weight"], tensors.get("affine_weight"), tensors["bias"], layer.stride[0])


def same_layer(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    """Compute the layer's own function in float64, to check its precision.

    Whether the function is right is for torch to test or, for the weight normalizations, for tests/parametrizations.
    """
    result: Tensor = functional_call(copy.deepcopy(layer).double(), dict(tensors), (x,))
    return result


def layer_provider(
    name: str, make: Callable[[Workload], nn.Module], reference: Reference, ours: bool = False
) -> Provider:
    def build(work: Workload) -> nn.Module:
        return match_layout(make(work).to(work.device, parameter_dtype(work)), work)

    return Provider(name, build, reference, CONV_PASSES, ours=ours, check_samples=2, tf32=True)


def conv(work: Workload) -> nn.Conv2d:
    return nn.Conv2d(work.channels, work.channels, 3, stride=work.stride, padding=1)


def conv_norm_layers() -> tuple[Provider, ...]:
    """Return the layers: Conv2d, ours, ConvNorm as it is usually written, and weight normalizations."""

    def ours(affine: bool) -> Callable[[Workload], nn.Module]:
        def make(work: Workload) -> nn.Module:
            layer: nn.Module = package().ConvNorm2d(
                work.channels, work.channels, 3, stride=work.stride, padding=1, affine=affine, eps=EPS
            )
            return layer

        return make

    def normalized(register: Callable[[nn.Module], nn.Module]) -> Callable[[Workload], nn.Module]:
        return lambda work: register(conv(work))

    return (
        layer_provider("Conv2d", conv, same_layer),
        layer_provider("ConvNorm2d", ours(True), conv_norm_reference, ours=True),
        layer_provider("ConvNorm2d affine=False", ours(False), conv_norm_reference, ours=True),
        layer_provider("plain autograd ConvNorm", lambda w: PlainConvNorm(w.channels, w.stride), conv_norm_reference),
        layer_provider("spectral_norm", normalized(torch_parametrizations.spectral_norm), same_layer),
        layer_provider("weight_norm", normalized(torch_parametrizations.weight_norm), same_layer),
        layer_provider("orthogonal", normalized(torch_parametrizations.orthogonal), same_layer),
        layer_provider("ONI", normalized(lambda m: package().parametrizations.oni(m)), same_layer, ours=True),
        layer_provider(
            "weight standardization",
            normalized(lambda m: package().parametrizations.weight_standardization(m)),
            same_layer,
            ours=True,
        ),
    )


def random_weight(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)


class Filter(nn.Module):
    """A filter of planes by the fixed spectrum of a random weight, whole or as the half that rfft2 keeps."""

    def __init__(self, channels: int, size: tuple[int, int], function: Callable[[Tensor, Tensor], Tensor], half: bool):
        super().__init__()
        weight = random_weight(channels)
        power = torch.fft.fft2(weight, s=size).abs().square().sum(1)
        v = (power + EPS * power.mean((1, 2), keepdim=True)).rsqrt()
        self.v: Tensor
        self.register_buffer("v", v[..., : size[1] // 2 + 1].contiguous() if half else v)
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, self.v)


def filters() -> tuple[Provider, ...]:
    """Return the filters: spectral_filter, torch.fft with its spectrum, and the floor, a copy of the planes."""

    def build(function: Callable[[Tensor, Tensor], Tensor], half: bool = False) -> Callable[[Workload], nn.Module]:
        def make(work: Workload) -> nn.Module:
            return Filter(work.channels, (work.shape[2], work.shape[3]), function, half).to(parameter_dtype(work))

        return make

    def reference(layer: nn.Module, tensors: Tensors, z: Tensor) -> Tensor:
        return fft_filter(z, tensors["v"][..., : z.shape[3] // 2 + 1])

    def filtered(z: Tensor, v: Tensor) -> Tensor:
        y: Tensor = package().ops.spectral_filter(z, v)
        return y

    return (
        Provider("spectral_filter", build(filtered), reference, FILTER_PASSES, ours=True),
        Provider("torch.fft", build(fft_filter, half=True), reference, FILTER_PASSES),
        Provider("copy", build(lambda z, _: z.clone()), lambda layer, tensors, z: z.clone(), FILTER_PASSES),
    )


class SpectrumAndFilter(nn.Module):
    """A filter of planes whose spectrum is computed on the way, as ConvNorm does in every step."""

    def __init__(self, channels: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernels: Tensor
        self.register_buffer("kernels", random_weight(channels))
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, self.kernels)


def filters_with_spectrum() -> tuple[Provider, ...]:
    """Return spectral_filter by kernel_spectrum, and torch.fft by the padded FFT.

    The gradient of the spectrum is not part of it.
    """

    def build(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Workload], nn.Module]:
        return lambda work: SpectrumAndFilter(work.channels, function).to(parameter_dtype(work))

    def ours(z: Tensor, weight: Tensor) -> Tensor:
        ops = package().ops
        y: Tensor = ops.spectral_filter(z, ops.kernel_spectrum(weight, tuple(z.shape[2:]), EPS))
        return y

    def plain(z: Tensor, weight: Tensor) -> Tensor:
        return fft_filter(z, padded_spectrum(weight, (z.shape[2], z.shape[3])))

    def reference(layer: nn.Module, tensors: Tensors, z: Tensor) -> Tensor:
        return plain(z, tensors["kernels"])

    return (
        Provider("spectral_filter with spectrum", build(ours), reference, FILTER_PASSES, ours=True),
        Provider("torch.fft with spectrum", build(plain), reference, FILTER_PASSES),
    )


class Spectrum(nn.Module):
    """The spectrum v of a weight, which is the layer's input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        return self.function(weight)


def spectra(size: tuple[int, int]) -> tuple[Provider, ...]:
    """Return kernel_spectrum and the padded FFT, which has half of the frequencies to compute."""

    def ours(weight: Tensor) -> Tensor:
        v: Tensor = package().ops.kernel_spectrum(weight, size, EPS)
        return v[..., : size[1] // 2 + 1]

    def reference(layer: nn.Module, tensors: Tensors, weight: Tensor) -> Tensor:
        # in chunks: in float64 the padded kernels of a wide layer do not fit into memory
        return torch.cat([padded_spectrum(part, size) for part in weight.split(16)])

    return (
        Provider("kernel_spectrum", lambda work: Spectrum(ours), reference, {}, ours=True),
        Provider("padded FFT", lambda work: Spectrum(lambda w: padded_spectrum(w, size)), reference, {}),
    )
