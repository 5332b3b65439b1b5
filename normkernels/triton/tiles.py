"""Steps of all Triton kernels on activations: find columns in memory, load a tile of them, cut the work.

A tile has the D channels of a group as rows (d of them real, the others zero) and BLOCK samples as columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions_of(column, positions, sample_stride, position_stride, RUN: tl.constexpr):
    """Return where columns start, in elements, in 64 bits: there are tensors of more than 2^31 elements."""
    sample = column // positions
    position = column - sample * positions
    offset = sample.to(tl.int64) * sample_stride + position.to(tl.int64) * position_stride
    if RUN > 1:  # the compiler cannot see that a run never crosses a plane
        offset = tl.max_contiguous(tl.multiple_of(offset, RUN), RUN)
    return offset


@triton.jit
def pointers(data, channel, channel_stride, offset, RUN: tl.constexpr):
    """Return the pointers (D, BLOCK) of a tile."""
    start = channel.to(tl.int64) * channel_stride
    if RUN > 1:
        start = tl.multiple_of(start, RUN)
    return data + start[:, None] + offset[None, :]


@triton.jit
def load_tile(data, channel, channel_stride, offset, mask, RUN: tl.constexpr):
    """Return a tile in float32, zero outside of the mask."""
    return tl.load(pointers(data, channel, channel_stride, offset, RUN), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def bounds(part, chunk, columns, WIDE: tl.constexpr, RUN: tl.constexpr):
    """Return the first column of a part, and the one after its last. WIDE: 32 bits cannot hold a column's number."""
    start = part * chunk
    if WIDE:
        start = part.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, columns)
    return start, tl.multiple_of(stop, RUN)


@triton.jit
def count_of(part, parts, chunk, columns):
    """Return the number of columns of a part: the last part is shorter; zero beyond it."""
    count = tl.minimum(chunk, columns - part.to(tl.int64) * chunk)
    return tl.where(part < parts, count, 0)
