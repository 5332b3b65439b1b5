"""The compiled CUDA kernels, if they are here: normkernels._C, which registers them in PyTorch's dispatcher.

Python is not in the path of a call that they serve. They hand on a call that they do not serve, by calling
``normkernels_next::<op>``, which define.py defines. Only a torch built for CUDA can load the
extension, so any other torch does not try.
"""

from __future__ import annotations

import functools
import importlib.machinery
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normkernels import _build
from normkernels._torch import has_kernel
from normkernels.triton.support import first_line

PACKAGE = Path(__file__).resolve().parent.parent
OTHER_GPU = "expected a GPU that the extension was compiled for"  # csrc/plans.cu begins this reason so
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
    refusals = [refusal("moments", device, torch.float32) for device in devices]
    if all(refusals):
        return False, refusals[0]
    return True, f"compiled CUDA kernels for {compiled}"


def refusal(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    plane: Sequence[int] | None = None,
) -> str:
    """Return why the kernels do not serve a call, "" if they do; an option that is None is left out of the answer."""
    module, reason = load()
    if module is None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    type = str(dtype).removeprefix("torch.")
    return module.refusal(op, type, group_size or 0, list(plane or ()), 10 * major + minor)


# Architecture, multiprocessors and a block's shared memory of an H200, for plans where there is no GPU.
PLANNED = (90, 132, 232448)


LAUNCHES = torch.library.Library("normkernels_launches", "DEF")


@functools.cache
def _recorder(op: str) -> Callable[..., Any]:
    """Return the op whose launches the extension records, which has the schema of ``op``."""
    LAUNCHES.define(str(getattr(torch.ops.normkernels, op).default._schema).removeprefix("normkernels::"))
    return getattr(torch.ops.normkernels_launches, op)


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
    call = _recorder(op)
    module.record(*device)
    try:
        call(*arguments)
    finally:
        launches = module.recorded()
    return launches


def registered(op: str, key: str) -> bool:
    """Return whether there is a kernel for this dispatch key: a compiled one, unless Python has registered one."""
    return has_kernel(f"normkernels::{op}", key)


def set_error(error: BaseException) -> None:
    """Give the text of an exception to the C++ code that called, which otherwise only learns that there was one."""
    module, _ = load()
    if module is not None:
        module.set_error(f"{type(error).__name__}: {error}")
