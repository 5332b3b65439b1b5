"""Which backend serves a call: the order of backends by device and op, and the registrations that follow it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_integer, resolve_group_size
from normkernels.dispatch import compiled
from normkernels.dispatch.record import IMPLEMENTATIONS, OPS, Request
from normkernels.triton import launch, support
from normkernels.triton.support import Unsupported

BACKENDS = ("cuda", "triton", "eager")
KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # device -> dispatch key

# Device -> op -> backends, fastest first, as `make gpu-check` measures it; "default" is for ops without an entry. Other
# devices have eager. The file that NORMKERNELS_BACKEND_ORDER names is laid over it.
Order = dict[str, dict[str, tuple[str, ...]]]
ORDER: Order = {"cpu": {"default": ("eager",)}, "cuda": {"default": BACKENDS}}

_compiled: set[tuple[str, str]] = set()  # (op, device) of the kernels that the extension has registered
_chosen = "auto"
_overrides: torch.library.Library | None = None


def availability(backend: str) -> tuple[bool, str]:
    """Return whether a backend can run here, and why (not)."""
    _check_backend(backend, BACKENDS)
    if backend == "cuda":
        return compiled.availability()
    if backend == "eager":
        return True, "plain PyTorch, on every device"
    if not support.installed():
        return False, "the package triton is not installed"
    if support.interpreted():
        return True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors"
    if torch.cuda.is_available():
        return True, "Triton kernels, on NVIDIA GPUs of compute capability 8.0 or newer"
    return False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, to test them)"


def explain(
    op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None
) -> tuple[str, str]:
    """Return (backend, reason) for ``op`` applied to a tensor like this one; see backend_of for the options."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if group_size is not None and tensor.dim() >= 2:
        group_size = resolve_group_size(tensor.shape[1], group_size)  # as the op does: more than C means one group
    if plane is not None:
        plane = [check_integer("plane", side, minimum=1) for side in plane]
    request = Request(tensor, group_size, plane)
    chosen = "chosen by use_backend or NORMKERNELS_BACKEND"
    if _chosen == "eager":
        return "eager", chosen
    passed_over = []
    # In the default order a CPU is asked about all backends, so that the answer says why none of them serves it.
    asked = BACKENDS if _chosen == "auto" and not tensor.is_cuda else candidates(op, tensor.device.type)
    for backend in asked[: asked.index("eager")]:
        reason = _refusal(backend, op, request)
        if not reason:
            return backend, chosen if backend == _chosen else availability(backend)[1]
        passed_over.append(f"{backend}: {reason}")
        if backend == "triton" and availability(backend)[0] and backend in IMPLEMENTATIONS[op] and tensor.is_cuda:
            break  # a call that Triton does not serve goes to eager, whatever the order
    return "eager", "; ".join(passed_over)


def _refusal(backend: str, op: str, request: Request) -> str:
    """Return why a backend leaves a call to the next one, "" if it does not."""
    if backend == "eager":
        return ""
    available, reason = availability(backend)
    if backend not in IMPLEMENTATIONS[op] and not (backend == "cuda" and (op, "cuda") in _compiled):
        return "does not implement it" if available or backend == "triton" else reason
    if not available:
        return reason
    asked = backend in IMPLEMENTATIONS[op] and backend in candidates(op, request.data.device.type)
    if not request.data.is_cuda and not asked:
        return "serves CUDA tensors only" + (", unless use_backend chooses it" if backend == "triton" else "")
    if backend == "cuda":
        return compiled.refusal(op, request)
    try:
        support.check_supported(request.data, group_size=request.group_size, plane=request.plane)
        if request.group_size is not None:
            launch.check_entries(OPS[op].kernels, request.data, request.group_size)
    except Unsupported as unsupported:
        return str(unsupported)
    return ""


def after_compiled(op: str, request: Request) -> str:
    """Return the backend that serves a call which the compiled kernels leave."""
    backends = candidates(op, request.data.device.type)
    following = backends[backends.index("cuda") + 1 :] if "cuda" in backends else BACKENDS[1:]
    return next(backend for backend in following if not _refusal(backend, op, request))


def backend_of(op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None) -> str:
    """Return the name of the backend ("cuda", "triton" or "eager") that serves ``op`` on a tensor like this one.

    Whether kernels serve a call may also depend on group_size, the channels whitened together, or on plane, the size
    (H, W) of the spectrum of a filter; None leaves that out of the answer.
    Raises ValueError for an unknown op, and for a group_size that the op refuses on this tensor.
    ``python -m normkernels.info`` shows the reason too.
    """
    return explain(op, tensor, group_size=group_size, plane=plane)[0]


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op from one backend inside a ``with`` block; "auto" is the default order.

    Ops that the backend does not implement get the next one of cuda, triton and eager. It holds for the whole process
    (all threads), like the dispatcher it changes.
    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    _check_available(backend)
    before = _chosen
    _choose(backend)
    try:
        yield
    finally:
        _choose(before)


def _choose(backend: str) -> None:
    global _chosen, _overrides, _compiled
    if _overrides is not None:
        # This comes before the next registration: the dispatcher warns of kernels that replace kernels.
        _overrides._destroy()
        _overrides = None
    _chosen = backend
    _compiled = {(op, device) for op in OPS for device, key in KEYS.items() if compiled.registered(op, key)}
    _overrides = torch.library.Library("normkernels", "IMPL")
    with warnings.catch_warnings():
        # A compiled kernel is replaced on purpose.
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for op in OPS:
            for device, key in KEYS.items():
                implementation = _implementation(op, device)
                if implementation is not None:
                    _overrides.impl(op, implementation, key)


def _implementation(op: str, device: str) -> Callable[..., Any] | None:
    """Return what to register for an op on a device; None where the compiled kernel is to serve it."""
    implementations = IMPLEMENTATIONS[op]
    for backend in candidates(op, device):
        if backend == "cuda" and (op, device) in _compiled:
            return None
        if backend in implementations and (backend != "triton" or support.installed()):
            return implementations[backend]
    return implementations["eager"]


def candidates(op: str, device: str) -> tuple[str, ...]:
    """Return the backends that may serve an op on a device, in order; the last one is eager."""
    if _chosen == "auto":
        table = order().get(device, ORDER["cpu"])
        return table.get(op, table["default"])
    return (_chosen, "eager") if device == "cpu" else BACKENDS[BACKENDS.index(_chosen) :]


@functools.cache
def order() -> Order:
    """Return ORDER, with the entries of the file that NORMKERNELS_BACKEND_ORDER names in place of its own."""
    extra = os.environ.get("NORMKERNELS_BACKEND_ORDER")
    read = read_order(Path(extra)) if extra else {}
    return {device: table | read.get(device, {}) for device, table in ORDER.items()}


def read_order(path: Path) -> Order:
    """Read a file such as {"cuda": {"default": ["cuda", "triton", "eager"], "moments": ["triton", "eager"]}}.

    A file without devices is about "cuda". Raises ValueError that names what was expected.
    """
    try:
        tables = json.loads(path.read_text())
        if not isinstance(tables, Mapping):
            raise ValueError(f"a {type(tables).__name__}")
        if not tables.keys() <= ORDER.keys():
            tables = {"cuda": tables}
        for table in tables.values():
            if not isinstance(table, Mapping):
                raise ValueError(f"a {type(table).__name__} for a device")
            for op, backends in table.items():
                if op not in ("default", *OPS):
                    raise ValueError(f"the op {op!r}")
                if (
                    not isinstance(backends, list)
                    or backends[-1:] != ["eager"]
                    or not all(backend in BACKENDS and backends.count(backend) == 1 for backend in backends)
                ):
                    raise ValueError(f"{backends!r} for {op}")
    except (OSError, ValueError) as error:
        expected = (
            f"a JSON object of ops (or default) and lists of {', '.join(BACKENDS)}, each once, eager last, "
            f"or an object with one for each of {', '.join(ORDER)}"
        )
        raise ValueError(f"NORMKERNELS_BACKEND_ORDER: expected {path} to be {expected}; got {error}") from None
    return {device: {op: tuple(names) for op, names in table.items()} for device, table in tables.items()}


def _check_backend(backend: str, names: tuple[str, ...]) -> None:
    if backend not in names:
        raise ValueError(f"backend: expected one of {', '.join(names)}, got {backend!r}")


def _check_available(backend: str) -> None:
    _check_backend(backend, ("auto", *BACKENDS))
    if backend != "auto":
        available, reason = availability(backend)
        if not available:
            raise RuntimeError(f"backend {backend!r} is not available: {reason}")


def apply_environment() -> None:
    """Load the compiled kernels, follow NORMKERNELS_BACKEND and its ORDER; called once, when all ops are defined."""
    compiled.load()
    order()
    backend = os.environ.get("NORMKERNELS_BACKEND", "auto")
    try:
        _check_available(backend)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"NORMKERNELS_BACKEND: {error}") from None
    _choose(backend)
