"""Exact arithmetic, whatever autocast and TF32 say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def device_of(args: Sequence[Any]) -> torch.device:
    """Return the device of the first tensor among an op's arguments, or in lists among them; without one, the CPU."""
    tensors = (each for arg in args for each in (arg if isinstance(arg, list | tuple) else (arg,)))
    return next((each.device for each in tensors if isinstance(each, Tensor)), torch.device("cpu"))


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without autocast and without reduced-precision float32 products.

    Covariances and Newton's iteration lose all meaning in TF32 or bfloat16 (three decimal digits), and allowing
    these for convolutions is not asking for that. Both switches are process-wide, so they are touched only
    when they are set.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = device_of(args).type
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
    """Wrap a function that is no op as ``full_precision`` does, so that torch.compile traces into it.

    Compiled, they run only without autocast: Dynamo cannot trace the other switches.
    """
    exact = full_precision(function)

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return exact(*args)
        with torch.autocast(device_of(args).type, enabled=False):
            return function(*args)

    return wrapped


def _restore_precision(kind: Any, before: str) -> None:
    """Restore the precision that was in force before, by inheriting it ("none") where that gives the same."""
    kind.fp32_precision = "none"
    if kind.fp32_precision != before:
        kind.fp32_precision = before
