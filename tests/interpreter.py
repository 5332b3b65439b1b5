"""Repairs of Triton's interpreter, which runs the kernels where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def behave_as_gpus_do() -> None:
    """All repairs."""
    round_bfloat16_as_gpus_do()
    drop_nan_as_gpus_do()


def drop_nan_as_gpus_do() -> None:
    """The interpreter's maximum and minimum are NaN where one operand is, also where the kernel does not ask for it."""
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def round_bfloat16_as_gpus_do() -> None:
    """The interpreter cuts float32 off to bfloat16, and adds without carry where it rounds; a GPU rounds to nearest.

    Without this, every bfloat16 output of a kernel would be wrong by up to a whole unit in the last place.
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
