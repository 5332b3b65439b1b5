"""The calls that the Triton backend can serve, and where.

Importing this does not import triton: that takes half a second and triton may be missing.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_GROUP, LARGEST_PLANE = 128, 64

OLDEST_ARCHITECTURE = 80


class Unsupported(Exception):  # noqa: N818 -- no error: it never leaves the package
    """A reason, in words, why a call is left to the eager backend. Launches before it do not count."""


# --- what runs here -----------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1 at triton's import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def defect() -> str:
    """Return what keeps Triton from working here, or "". It needs a C compiler for its binding to the driver."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, plain PyTorch works
        return first_line(error)
    return ""


class Device(NamedTuple):
    """Compute capability, as in sm_90, and multiprocessors, by which a pass is cut into parts."""

    architecture: int
    processors: int


@functools.cache
def properties(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter gets few parts, but several
        return Device(OLDEST_ARCHITECTURE, 3)
    found = torch.cuda.get_device_properties(device)
    return Device(10 * found.major + found.minor, found.multi_processor_count)


def architecture(device: torch.device) -> int:
    return properties(device).architecture if _recording is None else _recording.architecture


def check_supported(tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None) -> None:
    """Raise Unsupported, with the reason, for what the kernels were not written for."""
    device = tensor.device
    if _recording is None and device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise Unsupported(f"expected a CUDA tensor, got one on {device}")
    if architecture(device) < OLDEST_ARCHITECTURE or torch.version.hip is not None:
        name = torch.cuda.get_device_name(device)
        raise Unsupported(f"expected an NVIDIA GPU of compute capability 8.0 or newer, got {name}")
    if device.type == "cuda" and defect():
        raise Unsupported(f"expected a working Triton, got {defect()}")
    if tensor.dtype == torch.float64:
        raise Unsupported("expected float32 or a half type, got float64")
    if group_size is not None and group_size > LARGEST_GROUP:
        raise Unsupported(f"expected groups of at most {LARGEST_GROUP} channels, got {group_size}")
    if plane is not None and max(plane) > LARGEST_PLANE:
        raise Unsupported(f"expected planes of at most {LARGEST_PLANE} x {LARGEST_PLANE}, got {tuple(plane)}")


# --- TF32, the opt-in -----------------------------------------------------------------------------------------------

_tf32 = False


class use_tf32:  # noqa: N801 -- used like a function
    """Inside the ``with`` block, let the Triton kernels mix float32 data by single TF32 products.

    It takes effect only where torch's own setting allows it too: ``torch.backends.cuda.matmul.fp32_precision`` is
    "tf32", as after ``torch.set_float32_matmul_precision("high")``. It concerns the products with activations that give
    y and dx, whose error relative to their largest value becomes about 1e-3 instead of 1e-6 (docs/triton.md);
    statistics and Newton's iteration never run in TF32. It is process-wide, like torch's setting.
    """

    def __enter__(self) -> None:
        global _tf32
        self.before, _tf32 = _tf32, True

    def __exit__(self, *_: object) -> None:
        global _tf32
        _tf32 = self.before


def tf32_allowed() -> bool:
    """Return whether both the user of this package and torch's setting ask for TF32."""
    return _tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class recording:  # noqa: N801 -- used like a function
    """Inside the ``with`` block kernels are not run: ``record(kernel, grid, arguments, config, meta)`` gets them.

    Launches are those for a GPU of the given architecture, on tensors of any device. So they can be compiled, counted
    and tested where there is no such GPU.
    """

    def __init__(self, architecture: int, record: Callable[..., None]) -> None:
        self.architecture, self.record = architecture, record

    def __enter__(self) -> None:
        global _recording
        _recording = self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None


_recording: recording | None = None


def recorder() -> recording | None:
    """Return the ``recording`` that is in force."""
    return _recording
