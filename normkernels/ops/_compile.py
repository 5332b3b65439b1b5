"""A mark for torch.compile that needs no import of torch._dynamo: that takes a second, and imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Mark a function as torch.compiler.assume_constant_result does: Dynamo calls it once and keeps the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
