"""Which backend serves an op."""

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
from normkernels.dispatch.record import _IMPLEMENTATIONS
from normkernels.triton import launch, support
from normkernels.triton.support import Unsupported

BACKENDS = ("cuda", "triton", "eager")

KEYS = ("CPU", "CUDA")

# Op -> backends, fastest first, as `make gpu-check` measures it; "default" is for ops without an entry.
# The file that NORMKERNELS_BACKEND_ORDER names is laid over it.
ORDER: dict[str, tuple[str, ...]] = {"default": BACKENDS}

_compiled: set[tuple[str, str]] = set()  # (op, dispatch key) of the kernels that the extension has registered

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
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op: expected one of {', '.join(_IMPLEMENTATIONS)}, got {op!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if group_size is not None and tensor.dim() >= 2:
        group_size = resolve_group_size(tensor.shape[1], group_size)  # as the op does: more than C means one group
    if plane is not None:
        plane = [check_integer("plane", side, minimum=1) for side in plane]
    chosen = "chosen by use_backend or NORMKERNELS_BACKEND"
    if _chosen == "eager":
        return "eager", chosen
    passed_over = []
    for backend in _candidates(op):
        reason = _refusal(backend, op, tensor, group_size, plane)
        if not reason:
            return backend, chosen if backend == _chosen else availability(backend)[1]
        passed_over.append(f"{backend}: {reason}")
        if backend == "triton" and availability(backend)[0] and backend in _IMPLEMENTATIONS[op] and tensor.is_cuda:
            break  # a call that Triton does not serve goes to eager, whatever the order
    return "eager", "; ".join(passed_over)


def _refusal(backend: str, op: str, tensor: Tensor, group_size: int | None, plane: Sequence[int] | None) -> str:
    """Return why a backend that is not eager leaves a call to the next one, "" if it does not."""
    available, reason = availability(backend)
    if backend not in _IMPLEMENTATIONS[op] and not (backend == "cuda" and (op, "CUDA") in _compiled):
        return "does not implement it" if available or backend == "triton" else reason
    if not available:
        return reason
    if not tensor.is_cuda and not (backend == _chosen and backend in _IMPLEMENTATIONS[op]):
        return "serves CUDA tensors only" + (", unless use_backend chooses it" if backend == "triton" else "")
    if backend == "cuda":
        return compiled.refusal(op, tensor.device, tensor.dtype, group_size=group_size, plane=plane)
    try:
        support.check_supported(tensor, group_size=group_size, plane=plane)
        if group_size is not None:
            launch.check_entries(op, tensor, group_size)
    except Unsupported as unsupported:
        return str(unsupported)
    return ""


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
    _compiled = {(op, key) for op in _IMPLEMENTATIONS for key in KEYS if compiled.registered(op, key)}
    _overrides = torch.library.Library("normkernels", "IMPL")
    with warnings.catch_warnings():
        # A compiled kernel is replaced on purpose.
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for op in _IMPLEMENTATIONS:
            for key in KEYS:
                implementation = _implementation(op, key)
                if implementation is not None:
                    _overrides.impl(op, implementation, key)


def _implementation(op: str, key: str) -> Callable[..., Any] | None:
    """Return what to register for an op under a dispatch key; None where the compiled kernel is to serve it."""
    implementations = _IMPLEMENTATIONS[op]
    for backend in _candidates(op) if key == "CUDA" or _chosen != "auto" else ():
        if backend == "cuda" and (op, key) in _compiled:
            return None
        usable = key == "CUDA" or backend == _chosen  # on a CPU only the chosen backend, or eager
        if backend in implementations and usable and (backend != "triton" or support.installed()):
            return implementations[backend]
    return implementations["eager"]


def _candidates(op: str) -> tuple[str, ...]:
    """Return the backends that may serve an op, in order, without eager, which follows them."""
    order = _order(op) if _chosen == "auto" else BACKENDS[BACKENDS.index(_chosen) :]
    return order[: order.index("eager")]


def _next_backends(op: str) -> tuple[str, ...]:
    """Return the backends after cuda, in order of preference."""
    order = _order(op) if "cuda" in _order(op) else BACKENDS
    return order[order.index("cuda") + 1 :]


def _order(op: str) -> tuple[str, ...]:
    table = order()
    return table.get(op, table["default"])


@functools.cache
def order() -> dict[str, tuple[str, ...]]:
    """Return ORDER, with the entries of the file that NORMKERNELS_BACKEND_ORDER names in place of its own."""
    extra = os.environ.get("NORMKERNELS_BACKEND_ORDER")
    return ORDER | read_order(Path(extra)) if extra else ORDER


def read_order(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file such as {"default": ["cuda", "triton", "eager"], "whiten": ["triton", "cuda", "eager"]}.

    Raises ValueError that names what was expected.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, Mapping):
            raise ValueError(f"a {type(table).__name__}")
        for op, backends in table.items():
            if op not in ("default", *_IMPLEMENTATIONS):
                raise ValueError(f"the op {op!r}")
            if (
                not isinstance(backends, list)
                or backends[-1:] != ["eager"]
                or not all(backend in BACKENDS and backends.count(backend) == 1 for backend in backends)
            ):
                raise ValueError(f"{backends!r} for {op}")
    except (OSError, ValueError) as error:
        expected = f"a JSON object of ops (or default) and lists of {', '.join(BACKENDS)}, each once, eager last"
        raise ValueError(f"NORMKERNELS_BACKEND_ORDER: expected {path} to be {expected}; got {error}") from None
    return {op: tuple(backends) for op, backends in table.items()}


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
