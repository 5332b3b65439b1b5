"""Activations as the Triton kernels see them, and the one place that launches a kernel.

The kernels are in the triton.py of each primitive's folder, imported when one is first used.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkernels.eager.layouts import as_image
from normkernels.triton.configs import Config, configuration, passes_over_data, tile_size
from normkernels.triton.support import Unsupported, architecture, first_line, interpreted, properties, recorder

# --- activations as the kernels see them ----------------------------------------------------------------------------


class Columns(NamedTuple):
    """A tensor (N, C, *) as columns: C values for each of N * L samples, with the strides to find them.

    A kernel takes it as one argument. run: the number of columns that are next to each other in memory, a power of two
    up to 16, compiled in; runs start at multiples.
    """

    data: Tensor
    sample_stride: int
    channel_stride: int
    position_stride: int
    positions: int
    run: Any

    @property
    def total(self) -> int:
        return self.data.shape[0] * self.data.shape[2] * self.data.shape[3]

    @property
    def wide(self) -> bool:
        """Whether 32 bits may not hold the number of a column."""
        return self.total >= 2**31 - 2**18

    @property
    def layout(self) -> str:
        """The dimension that is dense in memory; "odd" for positions, in planes whose size is odd or nearly so."""
        if self.position_stride != 1:
            return "channels"
        return "positions" if self.run.value >= 4 else "odd"


def columns(x: Tensor) -> Columns:
    """Return x as columns, in place; it is copied only where its spatial dimensions do not collapse into one."""
    image = as_image(x)
    n, _, _, positions = image.shape
    sample_stride, channel_stride, _, position_stride = image.stride()
    if n == 1 or sample_stride == positions * position_stride:  # one long plane
        positions, sample_stride = n * positions, 0
    run = 1
    if position_stride == 1:
        while run < 16 and all(part % (2 * run) == 0 for part in (positions, sample_stride, channel_stride)):
            run *= 2
    return Columns(image, sample_stride, channel_stride, position_stride, positions, compiled_in(run))


@functools.cache
def compiled_in(value: int) -> Any:
    """Return a number that is a constant of the kernels which get it in a NamedTuple."""
    from triton.language import constexpr

    return constexpr(value)


def within_32_bits(operand: Tensor) -> Tensor:
    """Return a small operand as it is, or a compact copy where offsets in it do not fit 32 bits.

    Kernels compute these offsets in 32 bits; only activations, which are large, have offsets of 64 bits.
    """
    last = sum((n - 1) * stride for n, stride in zip(operand.shape, operand.stride(), strict=True))
    return operand if last < 2**31 else operand.contiguous()


class Split(NamedTuple):
    """The cut of a pass over ``columns``: ``parts`` programs for each group, each with ``chunk`` columns."""

    parts: int
    chunk: int


WAVES = 2  # programs for each multiprocessor

WARPS = 32  # warps of all programs on a multiprocessor in an elementwise pass, as many as registers allow


def split(total: int, groups: int, block: int, device: torch.device, waves: int = WAVES) -> Split:
    wanted = max(1, waves * properties(device).processors // groups)
    blocks = -(-total // block)
    chunk = -(-blocks // min(wanted, blocks)) * block
    return Split(-(-total // chunk), chunk)


def check_entries(kernels: Sequence[str], tensor: Tensor, group_size: int) -> None:
    """Raise Unsupported where the table has no entry for one of these kernels that pass over data like this."""
    if tensor.dim() >= 2:
        layout = columns(tensor).layout
        for kernel in filter(passes_over_data().__contains__, kernels):
            configuration(kernel, tile_size(group_size), layout, tensor.dtype, architecture(tensor.device))


# --- launching ------------------------------------------------------------------------------------------------------


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, device: torch.device, **meta: Any
) -> None:
    """Run a kernel on the device's current stream. Every launch of the package goes through here."""
    if (recording := recorder()) is not None:
        recording.record(kernel, grid, arguments, config, meta)
        return
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **meta, num_warps=config.warps, num_stages=config.stages)
    except Exception as error:
        if interpreted() or not from_compiling(error):
            raise
        raise Unsupported(f"expected {kernel.fn.__name__} to compile with {config}, got {first_line(error)}") from error


def from_compiling(error: Exception) -> bool:
    """Return whether an error says that Triton could not compile or load a kernel.

    Possible reasons: the kernel needs too much shared memory, Triton's assembler does not know the architecture, there
    is no C compiler, or a cache folder cannot be written. Errors of the GPU are RuntimeErrors of another kind.
    """
    return (
        type(error).__module__.startswith("triton.")
        or isinstance(error, OSError | subprocess.SubprocessError)
        or "C compiler" in str(error)
    )


def implementation(module: str, name: str) -> Callable[..., Any]:
    """Return the function ``name`` of a triton.py, which is imported at the first call."""

    @functools.cache
    def resolve() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def call(*arguments: Any) -> Any:
        return resolve()(*arguments)

    return call
