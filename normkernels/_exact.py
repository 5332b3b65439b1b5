"""ops' full_precision for functions that torch.compile traces into, as it does into what is no op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkernels.ops._library import full_precision


def traceable_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without autocast and TF32; compiled, only without autocast: Dynamo cannot trace the switches."""
    exact = full_precision(function)

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return exact(*args)
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped
