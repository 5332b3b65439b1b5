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


def handed_on(
    op: str, kernels: Callable[..., Any] | None, eager: Callable[..., Any], texts: Sequence[int] = ()
) -> Callable[..., Any]:
    """Return a function that serves a call which a compiled kernel leaves to the next backend.

    Its last argument is the reason. Triton's ``kernels`` serve the call where they can, else ``eager``. One warning
    tells that, unless the reason is empty. The reason, and the arguments number ``texts``, come as UTF-8: LibTorch
    would leak strings (csrc/tensors.h).
    """

    def call(*args: Any) -> Any:
        *arguments, reason = args
        reason = bytes(reason).decode()
        for i in texts:
            arguments[i] = bytes(arguments[i]).decode()
        server, refusal, result = "plain PyTorch", "", None
        on_gpu = device_of(args).type == "cuda"
        if kernels is not None and on_gpu and support.installed() and "triton" in _next_backends(op):
            try:
                server, result = "Triton", kernels(*arguments)
            except Unsupported as unsupported:
                server, refusal = "plain PyTorch", str(unsupported)
        if reason:
            # A GPU that was not compiled for is one reason, not one for each op.
            subject = "" if reason.startswith(compiled.OTHER_GPU) else f"{op}: "
            warn_once(f"{subject}{server} instead of the CUDA kernels: {reason}")
        elif refusal:
            warn_once(f"{op}: plain PyTorch instead of the Triton kernels: {refusal}")
        return result if server == "Triton" else eager(*arguments)

    return call


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` for a call from C++, which gets the text of its errors this way."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:  # a KeyboardInterrupt, too
            compiled.set_error(error)
            raise

    return call
