"""Views of activations as images, and the cache-sized tiles in which the eager backend walks over them.

Letters: n samples in a tile, C channels in G groups of d, l positions.

Whitening reads every activation a handful of times. Done on whole tensors each of these reads is a pass
through main memory, and each centred copy is a fresh allocation whose pages have to be faulted in (about
8 ms for 33 MB, as long as the arithmetic). So x is walked in tiles that stay in the cache: a tile is centred into one
reused piece of memory and multiplied there.

Rejected: a batched product per sample on views of x, which cannot centre first, and one product for every layout.
``outer`` in moments/eager.py and ``product`` in whiten/eager.py say which product serves which layout.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from normkernels.eager.devices import has_float64
from normkernels.eager.layouts import channels_innermost

# Elements of a tile for each thread: 2 MiB of float32. Half of it costs a tenth more time; twice as much gains up to a
# tenth and keeps twice the memory.
TILE_ELEMENTS = 2**19

MAX_TILE_THREADS = 8  # bounds the memory that each calling thread keeps: 48 MiB for a backward pass


def tile_threads() -> int:
    """Return the number of threads that share a tile."""
    return min(torch.get_num_threads(), MAX_TILE_THREADS)


def tiles(image: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut an image (N, C, 1, L) into (samples, positions) slices of about TILE_ELEMENTS for each thread.

    On other devices than a CPU one tile is the whole image, because a pass costs less than the launches of its tiles.
    The same holds for a CPU that pretends to lack float64 (``has_float64``), which sums of several tiles would need.
    """
    samples, channels, _, positions = image.shape
    if image.numel() == 0:
        return
    if image.device.type != "cpu" or not has_float64(image.device):
        yield slice(0, samples), slice(0, positions)
        return
    columns = max(1, TILE_ELEMENTS * tile_threads() // channels)
    if columns >= positions:
        step = columns // positions
        for i in range(0, samples, step):
            yield slice(i, i + step), slice(0, positions)
    else:
        step = -(-positions // -(-positions // columns))  # equal parts of at most `columns`
        for i in range(samples):
            for j in range(0, positions, step):
                yield slice(i, i + 1), slice(j, j + step)


def stack(
    *sources: tuple[Tensor, Tensor | None], groups: int, dtype: torch.dtype, rows: bool = False, slot: str = ""
) -> Tensor:
    """Return tiles minus shifts, their groups stacked: (n, G * parts * d, 1, l), each group's parts side by side.

    sources: pairs of a tile (n, C, 1, l) and a shift (C,) or None. The result has the first one's layout, or with
    ``rows`` that of (channels, n, l): all values of a channel in one row. On a CPU its memory belongs to the thread and
    the next call with the same ``slot`` overwrites it: fresh pages for every tile would cost more than filling them.
    """
    n, channels, _, positions = sources[0][0].shape
    parts, d = len(sources), channels // groups
    memory = workspace(sources[0][0], n * channels * positions * parts, dtype, slot)
    if rows:
        memory = memory.view(groups, parts, d, n, positions).permute(3, 0, 1, 2, 4)
    elif channels_innermost(sources[0][0]):
        memory = memory.view(n, positions, groups, parts, d).permute(0, 2, 3, 4, 1)
    else:
        memory = memory.view(n, groups, parts, d, positions)
    for part, (tile, shift) in enumerate(sources):
        target = memory[:, :, part]
        grouped = tile.squeeze(2).unflatten(1, (groups, d))
        if shift is None:
            target.copy_(grouped)
        else:
            torch.sub(grouped, shift.view(groups, d, 1), out=target)
    return memory.flatten(1, 3).unsqueeze(2)


_kept = threading.local()


def workspace(like: Tensor, size: int, dtype: torch.dtype, slot: str = "") -> Tensor:
    """Return uninitialized memory: on a CPU the thread's own, overwritten by the next call for the same slot."""
    if like.device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=like.device)
    key = f"{dtype} {slot}"
    buffer: Tensor | None = getattr(_kept, key, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a later call may come from outside of inference mode
            buffer = torch.empty(size, dtype=dtype)
        setattr(_kept, key, buffer)
    return buffer[:size]
