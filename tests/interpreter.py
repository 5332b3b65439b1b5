"""Repairs of Triton's interpreter, which runs the kernels where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch


def behave_as_gpus_do() -> None:
    """Make all repairs."""
    round_bfloat16_as_gpus_do()
    drop_nan_as_gpus_do()
    skip_work_without_effect()


def drop_nan_as_gpus_do() -> None:
    """Make maximum and minimum drop NaN.

    The interpreter's are NaN where one operand is, also where the kernel does not ask for it.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def round_bfloat16_as_gpus_do() -> None:
    """Make float32 round to the nearest bfloat16, as a GPU does.

    The interpreter cuts it off, and adds without carry where it rounds. Without this repair, every bfloat16 output of a
    kernel would be wrong by up to a whole unit in the last place.
    """
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (float32, bfloat16):
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy()).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    interpreter._convert_float = rounding


def skip_work_without_effect() -> None:
    """Run kernels in a third of the time, with the same results.

    The interpreter computes whether integers overflow, and asks for the answer only in debug mode. Every function that
    a kernel calls patches triton.language once more, which the launch has done; for Triton's own functions, in the
    module ``core``, the first call of one does it. And types of values and shapes of blocks are made anew each time.
    """
    from triton.language import core
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    core_is_patched = False

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal core_is_patched
        if not core_is_patched and any(value is core for value in self.fn.__globals__.values()):
            core_is_patched = True
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call

    find = interpreter._get_np_dtype
    of_values = cache(find)
    interpreter._get_np_dtype = lambda dtype: of_values(dtype) if type(dtype) is core.dtype else find(dtype)

    make = core.block_type.__init__
    shapes: dict[tuple[int, ...], Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes not in shapes:
            make(self, element_ty, shape)
            shapes[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = shapes[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    core.block_type.__init__ = block_type
