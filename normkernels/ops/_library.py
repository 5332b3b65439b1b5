"""The one torch.library.Library, and which backend serves an op.

PyTorch's dispatcher is the only dispatcher. Every op is defined here once, with its eager implementation under
CompositeExplicitAutograd: that is the fallback on every device. The faster backends' implementations are registered
under their device's key and so take precedence there; ``use_backend`` replaces these registrations for the time of
a ``with`` block, which costs nothing outside of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels.ops import _triton
from normkernels.ops._checks import check_integer, resolve_group_size
from normkernels.ops._triton import Unsupported

LIBRARY = torch.library.Library("normkernels", "DEF")
BACKENDS = ("cuda", "triton", "eager")  # fastest first

# op -> backend -> implementation.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
_warned: set[str] = set()
_chosen = "auto"
_overrides: torch.library.Library | None = None


def define(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
    triton: str | None = None,
) -> None:
    """Define an op by its schema, with the eager implementation, the shape function (fake) and its gradient.

    triton: the module whose function of the op's name is the Triton implementation; it serves CUDA tensors, and
    what it does not support falls back to eager, with one warning for each reason.

    The public functions apply ``autograd`` themselves: it is cheaper than the registration, and forward-mode
    differentiation raises where the registration would return zeros. The raw op has it registered all the same, for
    exported programs, in which nothing but the raw op is left.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    exact = full_precision(eager)
    LIBRARY.impl(name, exact, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkernels::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        torch.library.register_autograd(
            f"normkernels::{name}", autograd.backward, setup_context=autograd.setup_context, lib=LIBRARY
        )
    _IMPLEMENTATIONS[name] = {"eager": exact}
    if triton is not None:
        _IMPLEMENTATIONS[name]["triton"] = falling_back(name, _triton.implementation(triton, name), exact)


def ops() -> tuple[str, ...]:
    """Names of all ops, in order of definition."""
    return tuple(_IMPLEMENTATIONS)


def falling_back(op: str, kernels: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """``kernels``, or ``eager`` where they raise Unsupported."""

    def call(*args: Any) -> Any:
        try:
            return kernels(*args)
        except Unsupported as reason:
            message = f"{op}: plain PyTorch instead of the Triton kernels: {reason}"
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, stacklevel=2)
        return eager(*args)

    return call


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without autocast and without reduced-precision float32 products.

    Covariances and Newton's iteration lose all meaning in TF32 or bfloat16 (three decimal digits), and allowing
    these for convolutions is not asking for that. Both switches are process-wide, so they are touched only
    when they are set.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            backends: Any = torch.backends
            on_cpu = (backends.mkldnn.matmul, backends.mkldnn.conv)
            on_cuda = (backends.cuda.matmul, backends.cudnn.conv)  # cuDNN's convolutions are TF32 unless told otherwise
            for kind in on_cuda if device == "cuda" else on_cpu:
                before = kind.fp32_precision
                if before not in ("none", "ieee"):
                    kind.fp32_precision = "ieee"
                    stack.callback(_restore_precision, kind, before)
            if device == "cuda" and not backends.cudnn.deterministic:  # sums in a fixed order
                backends.cudnn.deterministic = True
                stack.callback(setattr, backends.cudnn, "deterministic", False)
            return function(*args, **kwargs)

    return wrapped


def traceable_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """``full_precision`` for functions that are no ops, so that torch.compile traces into them.

    Compiled, they run only without autocast: Dynamo cannot trace the other switches.
    """
    exact = full_precision(function)

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return exact(*args)
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped


def _restore_precision(kind: Any, before: str) -> None:
    """Back to the precision in force before, and to inheriting it ("none") where that comes to the same."""
    kind.fp32_precision = "none"
    if kind.fp32_precision != before:
        kind.fp32_precision = before


def availability(backend: str) -> tuple[bool, str]:
    """Whether a backend can run here, and why (not)."""
    _check_backend(backend, BACKENDS)
    if backend == "cuda":
        return False, "this version of normkernels has no compiled CUDA kernels"
    if backend == "eager":
        return True, "plain PyTorch, on every device"
    if not _triton.installed():
        return False, "the package triton is not installed"
    if _triton.interpreted():
        return True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors"
    if torch.cuda.is_available():
        return True, "Triton kernels, on NVIDIA GPUs of compute capability 8.0 or newer"
    return False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, to test them)"


def explain(
    op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None
) -> tuple[str, str]:
    """(backend, reason) for ``op`` applied to a tensor like this one; see backend_of for the options."""
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op: expected one of {', '.join(_IMPLEMENTATIONS)}, got {op!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if group_size is not None and tensor.dim() >= 2:
        group_size = resolve_group_size(tensor.shape[1], group_size)  # as the op does: more than C means one group
    if plane is not None:
        plane = [check_integer("plane", side, minimum=1) for side in plane]
    implementations = _IMPLEMENTATIONS[op]
    if _chosen == "eager":
        return "eager", "chosen by use_backend or NORMKERNELS_BACKEND"
    if _chosen not in ("auto", *implementations):
        return "eager", f"{_chosen} was chosen and does not implement it"
    passed_over = [f"cuda: {availability('cuda')[1]}"]
    available, reason = availability("triton")
    if "triton" not in implementations:
        reason = "does not implement it"
    elif available and (_chosen == "triton" or tensor.is_cuda):
        try:
            _triton.check_supported(tensor, group_size=group_size, plane=plane)
            if group_size is not None:
                _triton.check_entries(op, tensor, group_size)
            return "triton", "chosen by use_backend or NORMKERNELS_BACKEND" if _chosen == "triton" else reason
        except Unsupported as unsupported:
            reason = str(unsupported)
    elif available:
        reason = "serves CUDA tensors only, unless use_backend chooses it"
    return "eager", "; ".join([*passed_over, f"triton: {reason}"])


def backend_of(op: str, tensor: Tensor, *, group_size: int | None = None, plane: Sequence[int] | None = None) -> str:
    """Name of the backend ("cuda", "triton" or "eager") that serves ``op`` on a tensor like this one.

    Whether kernels serve a call may also depend on group_size, the channels whitened together, or on plane, the size
    (H, W) of the spectrum of a filter; None leaves that out of the answer.
    Raises ValueError for an unknown op, and for a group_size that the op refuses on this tensor.
    ``python -m normkernels.info`` shows the reason too.
    """
    return explain(op, tensor, group_size=group_size, plane=plane)[0]


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op from one backend inside a ``with`` block; "auto" is the default order.

    Ops that the backend does not implement stay with eager. It holds for the whole process (all threads),
    like the dispatcher it changes.
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
    global _chosen, _overrides
    if _overrides is not None:
        # Before, not after, the next one is registered: the dispatcher warns of kernels that replace kernels.
        _overrides._destroy()
        _overrides = None
    _chosen = backend
    keys = ("CUDA",) if backend == "auto" else ("CPU", "CUDA")
    if backend == "auto":
        backend = "triton" if _triton.installed() else "eager"
    _overrides = torch.library.Library("normkernels", "IMPL")
    for name, implementations in _IMPLEMENTATIONS.items():
        for key in keys:
            _overrides.impl(name, implementations.get(backend, implementations["eager"]), key)


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
    """Follow NORMKERNELS_BACKEND; called once, when all ops are defined."""
    backend = os.environ.get("NORMKERNELS_BACKEND", "auto")
    try:
        _check_available(backend)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"NORMKERNELS_BACKEND: {error}") from None
    _choose(backend)
