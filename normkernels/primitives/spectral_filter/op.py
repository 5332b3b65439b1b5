"""spectral_filter and cross_spectrum: ConvNorm on image planes in the Fourier domain. Algebra in DERIVATION.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_data, check_integer, check_like, check_tensor, statistics_dtype
from normkernels.dispatch.autograd import call
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.eager.layouts import channels_innermost, empty_output, in_layout_of
from normkernels.primitives.kernel_spectrum.op import transform_flops
from normkernels.primitives.spectral_filter import eager, onnx, reference


def spectral_filter(
    z: Tensor, v: Tensor, target: Sequence[slice] | None = None, source: Sequence[slice] | None = None,
    ) -> Tensor:  # fmt: skip
    r"""Filter image planes circularly by a real spectrum, one for each channel.

    .. math:: y_{nk} = \mathrm{Re}\, F^{-1} ( v_k \odot F z_{nk} )

    (ConvNorm, eq. 7 and Algorithm 1), with the two-dimensional DFT F, or the one-dimensional one for signals.
    The map is self-adjoint: the gradient in z is the filter applied to dL/dy, with the windows exchanged.

    Args:
        z: (N, C, H, W) or (N, C, L) float16, bfloat16, float32 or float64.
        v: (C, H, W) or (C, L) in float32 (float64 for float64 z). Only the mean of v(f) and v(-f) matters.
        target: slices of the plane to return, such as a crop and a stride; what they leave out costs less than it would
            to filter it and throw it away. None for the whole plane.
        source: slices of the plane where z lies, the rest being zero; None if z is the whole plane.

    Returns:
        y: (N, C, *) of z's type and layout. Differentiable in z and v, any number of times.

    Raises:
        TypeError: z or v is not floating-point, or v is not in the type above.
        ValueError: the shapes do not fit each other or the windows, or a slice has a negative step.
    """
    check_data("z", z)
    check_tensor("v", v)
    if z.dim() not in (3, 4) or v.dim() != z.dim() - 1:
        raise ValueError(
            f"expected z (N, C, H, W) with v (C, H, W), or z (N, C, L) with v (C, L), "
            f"got z {tuple(z.shape)} and v {tuple(v.shape)}"
        )
    plane = tuple(v.shape[1:])
    places, takes = _windows("source", source, plane), _windows("target", target, plane)
    shape = tuple(count for _, _, count in places)
    if tuple(z.shape[2:]) != shape:
        raise ValueError(f"z: expected planes of {shape} for v {tuple(v.shape)}, got {tuple(z.shape)}")
    check_like("v", v, (z.shape[1], *plane), (statistics_dtype(z.dtype),), z)
    signals = z.dim() == 3
    if signals:
        z, v, places, takes = z.unsqueeze(2), v.unsqueeze(1), [(0, 1, 1), *places], [(0, 1, 1), *takes]
    source_window, target_window = [part for start, step, _ in places for part in (start, step)], [*chain(*takes)]
    y: Tensor = call(SPECTRAL_FILTER, z, v, source_window, target_window)
    return y.squeeze(2) if signals else y


def _windows(name: str, slices: Sequence[slice] | None, plane: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (start, step, count) of each slice."""
    if slices is None:
        return [(0, 1, n) for n in plane]
    if len(slices) != len(plane):
        raise ValueError(f"{name}: expected {len(plane)} slice{'s' if len(plane) > 1 else ''}, got {len(slices)}")
    windows = []
    for window, n in zip(slices, plane, strict=True):
        if not isinstance(window, slice):
            raise TypeError(f"{name}: expected slices, got {window!r}")
        start = 0 if window.start is None else window.start
        stop = n if window.stop is None else window.stop
        step = 1 if window.step is None else window.step
        for bound in (start, stop, step):
            check_integer(name, bound, minimum=0)
        if step < 1 or not 0 <= start <= stop <= n:
            raise ValueError(f"{name}: expected slices within 0:{n} with a positive step, got {window}")
        windows.append((start, step, (stop - start + step - 1) // step))
    return windows


class _SpectralFilter(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, v: Tensor, source: list[int], target: list[int]) -> Tensor:
        result: Tensor = torch.ops.normkernels.spectral_filter(z, v, source, target)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, v, ctx.source, ctx.target = inputs
        ctx.extent = tuple(z.shape[2:])
        ctx.layout = torch.channels_last if channels_innermost(z) else torch.contiguous_format
        # The filter is linear in z: without a gradient for v nothing of z's size is kept.
        ctx.save_for_backward(z if v.requires_grad else None, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        z, v = ctx.saved_tensors
        placed, taken = _exchanged(ctx.source, ctx.target, ctx.extent)
        need_z, need_v = ctx.needs_input_grad[:2]
        grad = grad.contiguous(memory_format=ctx.layout)  # the gradient has z's layout, whatever that of dL/dy
        grad_z = _SpectralFilter.apply(grad, v, placed, taken) if need_z else None
        grad_v = _CrossSpectrum.apply(grad, z, list(v.shape[1:]), placed, ctx.source) if need_v else None
        return grad_z, grad_v, None, None


class _CrossSpectrum(torch.autograd.Function):
    """The op sum_n Re(conj(Y) Z) / (H W), the filter's gradient in v."""

    @staticmethod
    def forward(y: Tensor, z: Tensor, size: list[int], of_y: list[int], of_z: list[int]) -> Tensor:
        result: Tensor = torch.ops.normkernels.cross_spectrum(y, z, size, of_y, of_z)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, z, _, ctx.of_y, ctx.of_z = inputs
        ctx.save_for_backward(y, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y, z = ctx.saved_tensors
        grad_y = in_layout_of(y, _SpectralFilter.apply(z, grad, ctx.of_z, _taken(ctx.of_y, y)))
        grad_z = in_layout_of(z, _SpectralFilter.apply(y, grad, ctx.of_y, _taken(ctx.of_z, z)))
        return grad_y, grad_z, None, None, None


def _taken(placed: list[int], t: Tensor) -> list[int]:
    """Return the target window that gives the part of the plane where the source window ``placed`` puts t."""
    return [*placed[:2], t.shape[2], *placed[2:], t.shape[3]]


def _exchanged(source: list[int], target: list[int], extent: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the source and target windows of the adjoint filter."""
    return [*target[:2], *target[3:5]], [*source[:2], extent[0], *source[2:], extent[1]]


def _spectral_filter_fake(z: Tensor, v: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    return empty_output(z, (target[2], target[5]))


def _cross_spectrum_fake(y: Tensor, z: Tensor, size: Sequence[int], of_y: Sequence[int], of_z: Sequence[int]) -> Tensor:
    return z.new_empty((z.shape[1], *size), dtype=statistics_dtype(z.dtype))


SPECTRAL_FILTER = define(
    Op(
        schema="spectral_filter(Tensor z, Tensor v, SymInt[] source, SymInt[] target) -> Tensor",
        eager=eager.spectral_filter,
        kernels=("spectral_filter",),
        fake=_spectral_filter_fake,
        autograd=_SpectralFilter,
        channels=((1, 0), (1,)),
        onnx=onnx.spectral_filter,
        request=lambda z, v, source, target: Request(z, plane=v.shape[1:]),
        reference=reference.spectral_filter,
        tolerance=reference.tolerance,
        samples=reference.samples,
        flops=lambda z, v, source, target: 2 * z[0] * z[1] * transform_flops(v[1:]),
    )
)
CROSS_SPECTRUM = define(
    Op(
        schema="cross_spectrum(Tensor y, Tensor z, SymInt[] size, SymInt[] of_y, SymInt[] of_z) -> Tensor",
        eager=eager.cross_spectrum,
        kernels=("cross_spectrum",),
        fake=_cross_spectrum_fake,
        autograd=_CrossSpectrum,
        channels=((1, 1), (0,)),
        request=lambda y, z, size, of_y, of_z: Request(z, plane=size),
        reference=reference.cross_spectrum,
        tolerance=lambda y, z, size, *_: reference.transform_error(size),
        samples=reference.cross_samples,
        flops=lambda y, z, size, of_y, of_z: 2 * z[0] * z[1] * transform_flops(size),
    )
)
