"""kernel_spectrum: the spectrum of a convolution's kernels. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_data, check_integer, check_number, statistics_dtype
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.eager.devices import in_float64
from normkernels.primitives.kernel_spectrum import eager, onnx, reference


def kernel_spectrum(
    weight: Tensor, size: int | Sequence[int], eps: float = 1e-8, dilation: int | Sequence[int] = 1
) -> Tensor:
    r"""Return the inverse square root of the power spectrum of each output channel of a convolution.

    .. math:: v_k(f) = \Big( \sum_i |\hat a_{ki}(f)|^2 + \epsilon E_k \Big)^{-1/2}

    (ConvNorm, eq. 6 and Algorithm 1), with the DFT of the kernels on planes of the given size and E_k the mean of the
    sum over the frequencies, the channel's energy. eps is relative, so v scales as 1 / weight.

    Args:
        weight: (C_O, C_I / groups, kh, kw) or (C_O, C_I / groups, k), float16, bfloat16, float32 or float64.
        size: (H, W) or L of the planes, at least the (dilated) kernel's extent.
        eps: relative floor of the spectrum; without it a spectral zero is 1 / (1.5e-8 sqrt(E_k)). Below about 1e-12 the
            gradient at a spectral zero is rounding.
        dilation: of the convolution, for each dimension or one for all.

    Returns:
        v: (C_O, H, W) or (C_O, L) in float32 (float64 for float64 weight), accumulated in float64 and finite; on a
        device without float64 as exactly, in products of float32, without a wait for the host. A channel whose kernels
        are all zero gets 1.

    It is differentiable in weight, once or more; on a device without float64 the CPU computes the second derivative.

    Raises:
        TypeError: weight is not floating-point.
        ValueError: a plane smaller than the kernel, or weight of another rank.
    """
    check_data("weight", weight)
    if weight.dim() not in (3, 4):
        raise ValueError(f"weight: expected shape (C_O, C_I, k) or (C_O, C_I, kh, kw), got {tuple(weight.shape)}")
    dims = weight.dim() - 2
    lengths, steps = _per_dimension("size", size, dims), _per_dimension("dilation", dilation, dims)
    check_number("eps", eps)
    for length, k, step in zip(lengths, weight.shape[2:], steps, strict=True):
        if k < 1 or length < step * (k - 1) + 1:
            raise ValueError(
                f"size: expected at least {step * (k - 1) + 1} for a kernel of {k} taps with dilation {step}, "
                f"got {length} (size {tuple(lengths)}, kernel {tuple(weight.shape[2:])})"
            )
    if dims == 1:
        weight, lengths, steps = weight.unsqueeze(2), [1, *lengths], [1, *steps]
    v: Tensor = call(KERNEL_SPECTRUM, weight, lengths, float(eps), steps)
    return v.squeeze(1) if dims == 1 else v


def _per_dimension(name: str, value: int | Sequence[int], dims: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * dims
    if len(values) != dims:
        raise ValueError(f"{name}: expected {dims} number{'s' if dims > 1 else ''}, got {value!r}")
    return [check_integer(name, entry, minimum=1) for entry in values]


class _KernelSpectrum(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, size: list[int], eps: float, dilation: list[int]) -> Tensor:
        result: Tensor = torch.ops.normkernels.kernel_spectrum(weight, size, eps, dilation)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, ctx.eps, ctx.dilation = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.autocast(weight.device.type, enabled=False):
                alias = weight.view_as(weight)  # a graph of its own, as in autograd.gradients
                exact = in_float64(alias)
                v = eager.spectrum(exact, eager.both_waves(exact, grad.shape[1:], ctx.dilation), ctx.eps)
                (grad_weight,) = torch.autograd.grad(v, alias, in_float64(grad), create_graph=True)
            return grad_weight, None, None, None
        grad_weight = torch.ops.normkernels.kernel_spectrum_backward(grad, weight, ctx.eps, ctx.dilation)
        return grad_weight, None, None, None


def _kernel_spectrum_fake(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Tensor:
    return weight.new_empty((weight.shape[0], *size), dtype=statistics_dtype(weight.dtype))


def _kernel_spectrum_backward_fake(grad: Tensor, weight: Tensor, eps: float, dilation: Sequence[int]) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def transform_flops(size: Sequence[int]) -> int:
    """Return the FLOPs of a real plane's Fourier transform, 2.5 n log2 n by convention, and of a product with it."""
    n = math.prod(size)
    return round(2.5 * n * math.log2(n)) + 4 * n


KERNEL_SPECTRUM = define(
    Op(
        schema="kernel_spectrum(Tensor weight, SymInt[] size, float eps, SymInt[] dilation) -> Tensor",
        eager=eager.kernel_spectrum,
        kernels=("kernel_spectrum",),
        fake=_kernel_spectrum_fake,
        autograd=_KernelSpectrum,
        channels=((0,), (0,)),
        onnx=onnx.kernel_spectrum,
        request=lambda weight, size, eps, dilation: Request(weight),
        reference=reference.kernel_spectrum,
        tolerance=lambda weight, *_: reference.tolerance(weight.device),
        samples=reference.samples,
        flops=lambda weight, size, eps, dilation: weight[0] * weight[1] * transform_flops(size),
    )
)
KERNEL_SPECTRUM_BACKWARD = define(
    Op(
        schema="kernel_spectrum_backward(Tensor grad, Tensor weight, float eps, SymInt[] dilation) -> Tensor",
        eager=eager.kernel_spectrum_backward,
        kernels=("kernel_spectrum_backward",),
        fake=_kernel_spectrum_backward_fake,
        channels=((0, 0), (0,)),
        request=lambda grad, weight, eps, dilation: Request(weight),
        reference=reference.kernel_spectrum_backward,
        tolerance=lambda grad, *_: 8 * reference.tolerance(grad.device),
        samples=reference.backward_samples,
        flops=lambda grad, weight, eps, dilation: 2 * weight[0] * weight[1] * transform_flops(grad[1:]),
    )
)
