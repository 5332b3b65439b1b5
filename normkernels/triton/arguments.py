"""Arguments of Triton kernels that belong together, tensors and numbers by name; columns are in launch.py.

Triton takes a NamedTuple as it is and compiles a kernel for what is in it, as for single arguments: for None, for 1,
for multiples of 16. So numbers that differ from call to call, as the count of the columns, are arguments of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from normkernels.triton.launch import Columns, columns


class Moments(NamedTuple):
    """The moments of each part of the columns: the mean in two numbers shift + delta, the sum of squares about it.

    For groups they are (G, parts, D) and (G, parts, D, D), for single channels (parts, C). ticket (G,) is zero: it
    counts the programs of a kernel that finish with a group (see iter_norm/triton.py).
    """

    shift: Tensor
    delta: Tensor
    square: Tensor
    ticket: Tensor | None = None


class Statistics(NamedTuple):
    """Mean (C,), what rounding the mean left out (C,), and covariance (G, d, d)."""

    mean: Tensor
    remainder: Tensor
    cov: Tensor


class Products(NamedTuple):
    """The sums of y, of x - mean, and of y (x - mean)^T, of each part as Moments has them, or of all columns."""

    sum_y: Tensor
    sum_x: Tensor
    cross: Tensor
    ticket: Tensor | None = None


class Whitening(NamedTuple):
    """W, and what its adjoint needs: S (G, d, d) and its scale (G, 1)."""

    W: Tensor
    S: Tensor
    scale: Tensor


class Affine(NamedTuple):
    """The layer's weight and bias, (C,) each."""

    weight: Tensor | None
    bias: Tensor | None


class Matrix(NamedTuple):
    """Matrices (G, rows, columns) with their strides."""

    data: Tensor
    group_stride: int
    row_stride: int
    column_stride: int


def sources_of(sources: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Columns | Tensor | None, ...]:
    """Return one or two sources, each with its shift, as four arguments of a kernel.

    They are not nested: Triton forgets that a number is a constant in a NamedTuple within another.
    """
    arguments = [value for x, shift in sources for value in (columns(x), shift)]
    return (*arguments, None, None)[:4]
