"""How a backend leaves a call to the next one, with one warning for each reason.

Triton's kernels raise Unsupported. Compiled kernels call the op's twin in ``normkernels_next`` with the arguments that
they got; which backend is next, and why, is asked here and not in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normkernels._warnings import warn_once
from normkernels.dispatch import choose, compiled
from normkernels.dispatch.record import IMPLEMENTATIONS, Op
from normkernels.triton.support import Unsupported

TITLES = {"cuda": "the CUDA kernels", "triton": "Triton", "eager": "plain PyTorch"}


def from_triton(op: str, kernels: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls Triton's kernels, or plain PyTorch where they raise Unsupported."""

    def call(*args: Any) -> Any:
        try:
            return kernels(*args)
        except Unsupported as reason:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {reason}")
        return eager(*args)

    return call


def from_compiled(op: Op) -> Callable[..., Any]:
    """Return a function that serves a call which the compiled kernels have left to the next backend.

    Nothing is said where there is no reason: an empty batch, and a call that belongs to a library in any case, as an
    eigendecomposition does.
    """

    def call(*args: Any) -> Any:
        request = op.request(*args)
        server = choose.after_compiled(op.name, request)
        reason = compiled.refusal(op.name, request) if request.data.numel() else ""
        if reason:
            # A GPU that was not compiled for is one reason, not one for each op.
            subject = f"{op.name}: " if compiled.compiled_for(request.data.device) else ""
            warn_once(f"{subject}{TITLES[server]} instead of {TITLES['cuda']}: {reason}")
        return IMPLEMENTATIONS[op.name][server](*args)

    return call
