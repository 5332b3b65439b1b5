"""How a backend leaves a call to the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normkernels._warnings import warn_once
from normkernels.dispatch import compiled
from normkernels.dispatch.choose import _next_backends
from normkernels.dispatch.precision import device_of
from normkernels.triton import support
from normkernels.triton.support import Unsupported


def falling_back(op: str, kernels: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``kernels``, or ``eager`` where they raise Unsupported."""

    def call(*args: Any) -> Any:
        try:
            return kernels(*args)
        except Unsupported as reason:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {reason}")
        return eager(*args)

    return call


def handed_on(op: str, kernels: Callable[..., Any] | None, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that serves a call which a compiled kernel leaves to the next backend.

    Triton's ``kernels`` serve the call where they can, else ``eager``. One warning tells that, unless there is no
    reason for it.
    """

    def call(*arguments: Any) -> Any:
        reason = reason_of(op, arguments)
        server, refusal, result = "plain PyTorch", "", None
        on_gpu = device_of(arguments).type == "cuda"
        if kernels is not None and on_gpu and support.installed() and "triton" in _next_backends(op):
            try:
                server, result = "Triton", kernels(*arguments)
            except Unsupported as unsupported:
                server, refusal = "plain PyTorch", str(unsupported)
        if reason:
            warn_once(f"{op}: {server} instead of the CUDA kernels: {reason}")
        elif refusal:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {refusal}")
        return result if server == "Triton" else eager(*arguments)

    return call


# Op -> the arguments that decide: the data, and how to find the group size or the plane.
DECIDING: dict[str, tuple[int, Callable[..., Any] | None]] = {
    "moments": (0, lambda a: a[1]),
    "cross_moments": (1, lambda a: a[3]),
    "inverse_sqrt": (0, lambda a: a[0].shape[-1]),
    "inverse_sqrt_backward": (0, lambda a: a[0].shape[-1]),
    "whiten": (0, lambda a: a[2].shape[-1]),
    "stacked_mix": (1, lambda a: a[4].shape[-2]),
    "iter_norm": (0, lambda a: a[3]),
    "iter_norm_backward": (1, lambda a: a[4].shape[-1]),
    "pop_norm": (0, None),
    "pop_norm_backward": (1, None),
    "precondition": (0, None),
    "spectral_filter": (0, None),
}


def reason_of(op: str, arguments: Sequence[Any]) -> str:
    at, group_size = DECIDING.get(op, (0, None))
    data = arguments[at][0] if op == "precondition" else arguments[at]
    if data.numel() == 0:
        return ""
    plane = tuple(arguments[1].shape[1:]) if op == "spectral_filter" else None
    return compiled.refusal(
        op, data.device, data.dtype, group_size=group_size(arguments) if group_size else None, plane=plane
    )
