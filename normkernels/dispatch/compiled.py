"""The compiled CUDA kernels, if they are here: normkernels._C, which registers them in PyTorch's dispatcher.

Python is not in the path of a call that they serve. They hand on a call that they do not serve, by calling
``normkernels_next::<op>`` (fallback.py). Only a torch built for CUDA can load the extension, so any other torch does
not try.
"""

from __future__ import annotations

import functools
import importlib.machinery
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normkernels import _build
from normkernels._torch import has_kernel
from normkernels.dispatch.record import Request
from normkernels.triton.support import first_line

PACKAGE = Path(__file__).resolve().parent.parent
REBUILD = "build again with `pip install --no-build-isolation --force-reinstall --no-deps .`"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return (the extension, "") or (None, why not). The first call imports it and so registers the kernels."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if not any((PACKAGE / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        record = _build.build_record()
        missing = "its file is missing, or is another Python version's" if record["built"] else record["reason"]
        return None, f"the extension was not built: {missing}"
    try:
        from normkernels import _C

        return _C, ""
    except Exception as error:  # from the dynamic linker or the dispatcher: the package works without the extension
        reason = f"the extension was built but cannot be imported ({first_line(error)}); {REBUILD}"
        warnings.warn(f"normkernels: {reason}", stacklevel=2)
        return None, reason


def availability() -> tuple[bool, str]:
    """Return whether the kernels can run here, and why (not)."""
    module, reason = load()
    if module is None:
        return False, reason
    compiled = ", ".join(module.architectures())
    if not torch.cuda.is_available():
        return False, f"no CUDA device (the extension is built, for {compiled})"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not any(map(compiled_for, devices)):
        return (
            False,
            f"expected a GPU that the extension was compiled for ({compiled}), got sm_{_architecture(devices[0])}",
        )
    return True, f"compiled CUDA kernels for {compiled}"


def compiled_for(device: torch.device) -> bool:
    """Return whether the extension has kernels for the architecture of a GPU."""
    module, _ = load()
    return module is not None and module.compiled_for(_architecture(device))


def refusal(op: str, request: Request) -> str:
    """Return why the kernels do not serve a call, "" if they do; an option that is None is left out of the answer."""
    module, reason = load()
    if module is None:
        return reason
    type = str(request.data.dtype).removeprefix("torch.")
    plane = list(request.plane or ())
    return module.refusal(op, type, request.group_size or 0, plane, _architecture(request.data.device))


def _architecture(device: torch.device) -> int:
    """Return 90 for sm_90, and 0 for what is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Architecture, multiprocessors and a block's shared memory of an H200, for plans where there is no GPU.
PLANNED = (90, 132, 232448)


def has_kernels(op: str) -> bool:
    """Return whether the extension is loaded and has kernels for an op."""
    return has_kernel(f"normkernels_launches::{op}", "Meta")


def launch_plan(op: str, *arguments: Any) -> list[dict[str, Any]]:
    """Return an op's launches on the current GPU: kernel, grid, threads, shared_bytes, read_bytes and written_bytes.

    arguments: those of the raw op, with tensors on the device "meta". Where there is no GPU, launches are those on an
    H200. A call that the kernels leave to a library has none.
    Raises RuntimeError for a call that the kernels do not serve, and where the extension cannot be loaded.
    """
    device = PLANNED
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = (10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)
    return launches_on(device, op, *arguments)


def launches_on(device: tuple[int, int, int], op: str, *arguments: Any) -> list[dict[str, Any]]:
    """Return the launches on a GPU with this architecture, so many multiprocessors and a block's shared memory."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"launch_plan: {reason}")
    call = getattr(torch.ops.normkernels_launches, op)
    module.record(*device)
    try:
        call(*arguments)
    finally:
        launches = module.recorded()
    return launches


def registered(op: str, key: str) -> bool:
    """Return whether there is a kernel for this dispatch key: a compiled one, unless Python has registered one."""
    return has_kernel(f"normkernels::{op}", key)
