"""What a device lacks: float64 on Apple's and some of Intel's GPUs."""

from __future__ import annotations

import functools
import os

import torch


def has_float64(device: torch.device) -> bool:
    """Return whether tensors of float64 (and complex128) can be made on a device.

    ``NORMKERNELS_NO_FLOAT64=1`` pretends for every device that they cannot, so that a machine that has float64 can run
    what such a device would run. Data that comes in float64 is computed in float64 all the same.
    """
    return os.environ.get("NORMKERNELS_NO_FLOAT64", "0") != "1" and _supports_float64(device)


@functools.cache
def _supports_float64(device: torch.device) -> bool:
    if device.type == "mps":
        return False
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return True


def widest_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type in which sums over x are kept: float64 where there is one, else float32."""
    return torch.float64 if x.dtype == torch.float64 or has_float64(x.device) else torch.float32
