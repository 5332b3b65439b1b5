"""The calls that the Triton backend can serve, its configurations, and the one place that launches a kernel.

Importing this does not import triton: that takes half a second and triton may be missing. The kernels are in the
triton.py of each primitive's folder, imported when one is first used.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkernels.ops._tiles import as_image

LARGEST_GROUP, LARGEST_PLANE = 128, 64
OLDEST_ARCHITECTURE = 80
TABLE = Path(__file__).with_name("triton_configs.json")


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


# --- configurations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The options with which a kernel is compiled.

    block: columns of a tile, or the step of a product of small matrices. rows: the most rows of a result that one
    program computes; for single channels, the rows of a tile. precision: Triton's name of the products' precision.
    """

    block: int
    warps: int
    stages: int
    precision: str
    rows: int = 64


Key = tuple[str, int, str, str, int]


def read_table(path: Path) -> dict[Key, Config]:
    names = ("kernel", "size", "layout", "type", "arch")
    try:
        rows = json.loads(path.read_text())
        return {tuple(row.pop(name) for name in names): Config(**row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = ", ".join((*names, *(field.name for field in fields(Config))))
        raise ValueError(f"{path}: expected a JSON list of objects with {expected}, got {first_line(error)}") from None


@functools.cache
def table() -> dict[Key, Config]:
    """Return the package's table, with entries replaced by those of NORMKERNELS_TRITON_CONFIGS (see bench/tune.py)."""
    chosen = read_table(TABLE)
    if extra := os.environ.get("NORMKERNELS_TRITON_CONFIGS"):
        chosen |= read_table(Path(extra))
    return chosen


@functools.cache
def configuration(kernel: str, size: int, layout: str, dtype: torch.dtype, arch: int) -> Config:
    """Return the entry for this architecture, or for the newest older one of its kind.

    GPUs for desktops have less shared memory: from sm_120 on they use what sm_80 does, not sm_90's or sm_100's entries.

    size: the padded group size or plane, 1 for single channels and for gradients; layout as Columns.layout, "" where a
    kernel does not read activations or does not care.
    """
    kind = "float32" if dtype == torch.float32 else "half"
    older = [
        (key[4], config)
        for key, config in table().items()
        if key[:4] == (kernel, size, layout, kind) and key[4] <= arch and not 90 <= key[4] < 120 <= arch
    ]
    if not older:
        entry = f"{kernel}, size {size}, {layout or 'any layout'}, {kind}, sm_{arch}"
        raise Unsupported(f"expected an entry for {entry} in {TABLE.name}, got none")
    config = max(older, key=lambda entry: entry[0])[1]
    if interpreted() and _recording is None:
        # The interpreter knows no split products. Its tiles are small, so that the small tensors of tests are cut, too.
        return replace(config, block=min(config.block, 16), precision="ieee")
    return config


def padded(size: int) -> int:
    """Return the side of a tile: a power of two, at least 16, the smallest that tensor cores multiply."""
    return max(16, 1 << (size - 1).bit_length())


def tile_size(group_size: int) -> int:
    """Return the size by which the table knows a pass: 1 for single channels, which no tensor core multiplies."""
    return 1 if group_size == 1 else padded(group_size)


# --- activations as the kernels see them ----------------------------------------------------------------------------


class Columns(NamedTuple):
    """A tensor (N, C, *) as columns: C values for each of N * L samples, with the strides to find them.

    run: the number of columns that are next to each other in memory, a power of two up to 16; runs start at multiples.
    """

    data: Tensor
    positions: int
    sample_stride: int
    channel_stride: int
    position_stride: int
    run: int

    @property
    def total(self) -> int:
        return self.data.shape[0] * self.data.shape[2] * self.data.shape[3]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments that kernels take for it."""
        return (self.data, self.sample_stride, self.channel_stride, self.position_stride, self.positions)

    @property
    def wide(self) -> bool:
        """Whether 32 bits may not hold the number of a column."""
        return self.total >= 2**31 - 2**18

    @property
    def layout(self) -> str:
        """The dimension that is dense in memory; "odd" for positions, in planes whose size is odd or nearly so."""
        if self.position_stride != 1:
            return "channels"
        return "positions" if self.run >= 4 else "odd"


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
    return Columns(image, positions, sample_stride, channel_stride, position_stride, run)


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


# Op on activations -> kernels whose entries depend on its data.
PASSES = {
    "moments": ("moments",),
    "cross_moments": ("cross_moments",),
    "whiten": ("mix",),
    "stacked_mix": ("stacked_mix",),
    "iter_norm": ("moments", "mix"),
    "iter_norm_backward": ("cross_moments", "stacked_mix"),
    "pop_norm": ("moments", "mix"),
    "pop_norm_backward": ("cross_moments", "stacked_mix"),
}


def check_entries(op: str, tensor: Tensor, group_size: int) -> None:
    """Raise Unsupported where the table leaves an op on data like this to plain PyTorch."""
    if tensor.dim() >= 2:
        layout = columns(tensor).layout
        for kernel in PASSES.get(op, ()):
            configuration(kernel, tile_size(group_size), layout, tensor.dtype, architecture(tensor.device))


# --- launching ------------------------------------------------------------------------------------------------------


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, device: torch.device, **meta: Any
) -> None:
    """Run a kernel on the device's current stream. Every launch of the package goes through here."""
    if _recording is not None:
        _recording.record(kernel, grid, arguments, config, meta)
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
        configuration.cache_clear()

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None
        configuration.cache_clear()


_recording: recording | None = None


def implementation(module: str, name: str) -> Callable[..., Any]:
    """Return the function ``name`` of a triton.py, which is imported at the first call."""

    @functools.cache
    def resolve() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def call(*arguments: Any) -> Any:
        return resolve()(*arguments)

    return call
