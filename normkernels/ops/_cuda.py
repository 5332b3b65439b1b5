"""The compiled CUDA kernels, if they are here: normkernels._C, which registers them in PyTorch's dispatcher.

Python is not in the path of a call that they serve. What they do not serve they hand on, by calling
``normkernels_next::<op>`` with the reason; _library.py defines these. Only a torch built for CUDA can load the
extension, so without one nothing is tried.
"""

from __future__ import annotations

import functools
import importlib.machinery
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normkernels import _build
from normkernels.ops._triton import first_line

PACKAGE = Path(__file__).resolve().parent.parent
OTHER_GPU = "expected a GPU that the extension was compiled for"  # how csrc/plans.cu begins this reason
REBUILD = "build again with `pip install --no-build-isolation --force-reinstall --no-deps .`"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(the extension, "") or (None, why not). The first call imports it and so registers the kernels."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if not any((PACKAGE / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        record = _build.build_record()
        missing = "its file is missing, or is another Python version's" if record["built"] else record["reason"]
        return None, f"the extension was not built: {missing}"
    try:
        from normkernels import _C

        return _C, ""
    except Exception as error:  # of the dynamic linker, of the dispatcher: the package works without it
        reason = f"the extension was built but cannot be imported ({first_line(error)}); {REBUILD}"
        warnings.warn(f"normkernels: {reason}", stacklevel=2)
        return None, reason


def availability() -> tuple[bool, str]:
    """Whether the kernels can run here, and why (not)."""
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
    """Why the kernels do not serve a call, "" if they do; None leaves that out of the answer."""
    module, reason = load()
    if module is None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    type = str(dtype).removeprefix("torch.")
    return module.refusal(op, type, group_size or 0, list(plane or ()), 10 * major + minor)


# Architecture, multiprocessors and shared memory of a block: an H200's, for plans where there is no GPU.
PLANNED = (90, 132, 232448)


def launch_plan(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    plane: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """The launches of an op: kernel, grid, threads, shared_bytes, read_bytes and written_bytes, on the current GPU.

    Raises ValueError for what the kernels do not serve, RuntimeError where they are not here.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(f"launch_plan: {reason}")
    device = PLANNED
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = (10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)
    type = str(dtype).removeprefix("torch.")
    return module.launch_plan(op, list(shape), type, group_size or 0, list(plane or ()), *device)


def registered(op: str, key: str) -> bool:
    """Whether a kernel serves tensors of this dispatch key: a compiled one, as long as Python registers none there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"normkernels::{op}", key)


def set_error(error: BaseException) -> None:
    """Leave the text of an exception to the C++ that called: all that it gets to know else is that there was one."""
    module, _ = load()
    if module is not None:
        module.set_error(f"{type(error).__name__}: {error}")
