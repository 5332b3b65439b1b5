"""How the eager backend walks over activations: views and cache-sized tiles.

Letters: n samples in a tile, g groups, d channels per group, l positions, k = n l columns of a tile.

Whitening reads every activation a handful of times. Done on whole tensors each of these reads is a pass
through main memory, and each centred copy is a fresh allocation whose pages have to be faulted in (about
8 ms for 33 MB, as long as the arithmetic). So x is walked in tiles that stay in the second-level cache:
a tile is centred into one reused scratch matrix (g, d, k) and multiplied there. Rejected: a product per
sample on views of x (no scratch), because the data cannot be centred that way before the product, and
one on a transposed copy of x, because that is two more passes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a tile for each thread: 1 MiB of float32. From 2**17 to 2**20 it makes less than a tenth of a difference.
TILE_ELEMENTS = 2**18
MAX_TILE_THREADS = 8  # bounds the memory that each calling thread keeps: 16 MiB for a backward pass


def as_groups(x: Tensor, group_size: int) -> Tensor:
    """View of x (N, C, *) as (N, G, d, L); a copy only where the spatial dimensions do not collapse."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return flat.unflatten(1, (-1, group_size))


def empty_output(x: Tensor) -> Tensor:
    """Uninitialized tensor like x: channels innermost where x has them innermost, else contiguous.

    Not empty_like: its strides for an x with gaps need not collapse to (N, C, L), and these always do.
    """
    if x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def in_layout_of(x: Tensor, value: Tensor) -> Tensor:
    """value, of x's shape, with the strides of empty_output(x)."""
    result = empty_output(x)
    return value if value.stride() == result.stride() else result.copy_(value)


def tiles(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut x (N, G, d, L) into (samples, positions) slices of about TILE_ELEMENTS for each thread.

    Elsewhere than on a CPU a tile is all of x: there a pass costs less than the launches of its tiles.
    """
    n, g, d, positions = x.shape
    if x.device.type != "cpu":
        yield slice(0, n), slice(0, positions)
        return
    columns = max(1, TILE_ELEMENTS * min(torch.get_num_threads(), MAX_TILE_THREADS) // (g * d))
    if columns >= positions:
        step = columns // max(positions, 1)
        for i in range(0, n, step):
            yield slice(i, i + step), slice(0, positions)
    else:
        step = -(-positions // -(-positions // columns))  # equal parts of at most `columns`
        for i in range(n):
            for j in range(0, positions, step):
                yield slice(i, i + 1), slice(j, j + step)


class Scratch:
    """The working matrix (G, parts * d, k) of a tile.

    It follows x's own order so that filling it copies runs: (G, parts, d, k) in memory where positions are
    innermost, (k, G, parts, d) where channels are. Its memory belongs to the thread and is kept, by slot: fresh
    pages for every pass would cost more than filling them.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, parts: int = 1, slot: int = 0) -> None:
        self.channels_innermost = x.shape[3] == 1 or (x.stride(2) == 1 and x.stride(3) != 1)
        self.parts = parts
        self.slot = slot
        self.like = x.new_empty(0, dtype=dtype)

    def fill(self, *sources: tuple[Tensor, Tensor | None]) -> Tensor:
        """Stack ``source - shift`` over the pairs given; source (n, G, d, l), shift (G, d) or None."""
        n, g, d, positions = sources[0][0].shape
        flat = _workspace(self.like, n * g * d * positions * self.parts, self.slot)
        if self.channels_innermost:
            targets = flat.view(n, positions, g, self.parts, d).permute(3, 0, 2, 4, 1)
            matrix = flat.view(n * positions, g, self.parts * d).permute(1, 2, 0)
        else:
            targets = flat.view(g, self.parts, d, n, positions).permute(1, 3, 0, 2, 4)
            matrix = flat.view(g, self.parts * d, n * positions)
        for target, (source, shift) in zip(targets.unbind(), sources, strict=True):
            if shift is None:
                target.copy_(source)
            else:
                torch.sub(source, shift.unsqueeze(-1), out=target)
        return matrix


_kept = threading.local()


def _workspace(like: Tensor, size: int, slot: int) -> Tensor:
    """Uninitialized memory for ``size`` elements: on a CPU the thread's own, overwritten by the next call."""
    if like.device.type != "cpu":
        return like.new_empty(size)
    name = f"{like.dtype} {slot}"
    buffer: Tensor | None = getattr(_kept, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a later call may come from outside of inference mode
            buffer = torch.empty(size, dtype=like.dtype)
        setattr(_kept, name, buffer)
    return buffer[:size]
