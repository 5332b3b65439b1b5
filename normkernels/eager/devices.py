"""Abilities that some devices lack: float64 on Apple's and some of Intel's GPUs, Fourier transforms on others."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from normkernels._warnings import warn_once


def has_float64(device: torch.device) -> bool:
    """Return whether tensors of float64 (and complex128) can be made on a device.

    ``NORMKERNELS_NO_FLOAT64=1`` pretends for every device that they cannot, so that a machine that has float64 can run
    what such a device would run. Data that comes in float64 is computed in float64 all the same.
    """
    return os.environ.get("NORMKERNELS_NO_FLOAT64", "0") != "1" and _supports_float64(device)


def widest(value: Tensor) -> torch.dtype:
    """Return the widest real type for computations on ``value``'s device: float64, or else float32."""
    return torch.float64 if value.dtype == torch.float64 or has_float64(value.device) else torch.float32


def with_float64(value: Tensor) -> Tensor:
    """Return ``value`` where float64 can be computed: as it is, or on the CPU, with one warning; differentiable.

    Use it for small or rare tensors, because the host waits for it. A device without float64 lacks complex numbers and
    decompositions of matrices more often than not, so computations that need these use it, too.
    """
    if value.dtype == torch.float64 or has_float64(value.device) or value.device.type == "cpu":
        return value
    warn_once(f"what needs float64 is computed on the CPU: {value.device.type} has no float64")
    return value.cpu()


def in_float64(value: Tensor) -> Tensor:
    """Return ``value`` in float64, on its own device or on the CPU (``with_float64``)."""
    return with_float64(value).double()


def has_fft(device: torch.device) -> bool:
    """Return whether torch.fft works on a device; if not, one warning says that transforms take the CPU."""
    if device.type in ("cpu", "cuda") or _transforms(device):
        return True
    warn_once(f"spectral_filter: on the CPU, because torch.fft does not work on {device.type}")
    return False


@functools.cache
def _transforms(device: torch.device) -> bool:
    """Return whether a small transform succeeds on a device: that depends on its driver, too, and no table tells."""
    try:
        torch.fft.irfft2(torch.fft.rfft2(torch.ones(1, 2, 2, dtype=torch.float32, device=device)), s=(2, 2))
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


@functools.cache
def _supports_float64(device: torch.device) -> bool:
    if device.type == "mps":
        return False
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return True


Made = TypeVar("Made")


def kept_on_device(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what ``make`` returns for each of its arguments, the last of which is a device, for good.

    On a GPU the first call waits for the result, so that other streams may read it. Inside of a graph capture that is
    impossible and the memory would belong to the graph: there nothing is kept. Nothing is ever dropped, because a
    captured graph may still read it.
    """
    made: dict[tuple[object, ...], Made] = {}

    @functools.wraps(make)
    def kept(*arguments: object) -> Made:
        if arguments in made:
            return made[arguments]
        device = arguments[-1]
        assert isinstance(device, torch.device)
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return make(*arguments)
        with torch.inference_mode(False):  # a later call may come from outside of inference mode
            result = make(*arguments)
        if all(type(tensor) is Tensor for tensor in (result if isinstance(result, tuple) else (result,))):  # no fakes
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            made[arguments] = result
        return result

    return kept
