"""Steps of all Triton kernels on activations: find columns in memory, load a tile of them, cut the work.

A tile has the D channels of a group as rows (d of them real, the others zero) and BLOCK samples as columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions_of(x, column):
    """Return where columns of x start, in elements, in 64 bits: there are tensors of more than 2^31 elements."""
    sample = column // x.positions
    position = column - sample * x.positions
    offset = sample.to(tl.int64) * x.sample_stride + position.to(tl.int64) * x.position_stride
    if x.run > 1:  # the compiler cannot see that a run never crosses a plane
        offset = tl.max_contiguous(tl.multiple_of(offset, x.run), x.run)
    return offset


@triton.jit
def pointers(x, channel, column):
    """Return the pointers (D, BLOCK) of a tile of x, which is launch.Columns."""
    offset = positions_of(x, column)
    start = channel.to(tl.int64) * x.channel_stride
    if x.run > 1:
        start = tl.multiple_of(start, x.run)
    return x.data + start[:, None] + offset[None, :]


@triton.jit
def load_tile(x, channel, column, mask):
    """Return a tile in float32, zero outside of the mask."""
    return tl.load(pointers(x, channel, column), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def bounds(part, chunk, columns, WIDE: tl.constexpr, RUN: tl.constexpr):
    """Return the first column of a part, and the one after its last. WIDE: 32 bits cannot hold a column's number."""
    start = part * chunk
    if WIDE:
        start = part.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, columns)
    return start, tl.multiple_of(stop, RUN)


@triton.jit
def count_of(part, cut, columns):
    """Return the number of columns of a part: the last part is shorter; zero beyond it."""
    count = tl.minimum(cut.chunk, columns - part.to(tl.int64) * cut.chunk)
    return tl.where(part < cut.parts, count, 0)
