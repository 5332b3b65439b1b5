"""What torch.compile is told, without importing torch._dynamo for it: that takes a second, and imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """As torch.compiler.assume_constant_result: Dynamo calls it while it traces, and keeps the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
