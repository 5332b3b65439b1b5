"""How the eager backend walks over activations: views, cache-sized tiles, and one matrix product.

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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of a tile for each thread: 2 MiB of float32. Half of it would fit the second-level cache, but the product's
# fixed cost for each tile then weighs more (measured; the third level serves the rest).
TILE_ELEMENTS = 2**19
MAX_TILE_THREADS = 8  # bounds the memory that each thread keeps: 32 MiB for a backward pass

# Multiply-adds from which one product a group through oneDNN is faster than one batched product for all
# groups through the BLAS (measured: a call costs about 14 us; bench/results has the whole table).
LINEAR_MULTIPLY_ADDS = 2**22


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
    """The working matrix (G, parts * d, k) of a tile, dense for every group.

    It follows x's own order, positions innermost or channels innermost, so that filling it copies runs. Its memory
    belongs to the thread and is kept: fresh pages for every pass would cost more than filling them.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, parts: int = 1) -> None:
        self.channels_innermost = x.shape[3] == 1 or (x.stride(2) == 1 and x.stride(3) != 1)
        self.parts = parts
        self.like = x.new_empty(0, dtype=dtype)

    def fill(self, *sources: tuple[Tensor, Tensor | None]) -> Tensor:
        """Stack ``source - shift`` over the pairs given; source (n, G, d, l), shift (G, d) or None."""
        n, g, d, positions = sources[0][0].shape
        flat = _workspace(self.like, n * g * d * positions * self.parts)
        if self.channels_innermost:
            rows = flat.view(g, n, positions, self.parts, d)
            targets = rows.permute(3, 1, 0, 4, 2)
            matrix = flat.view(g, n * positions, self.parts * d).mT
        else:
            planes = flat.view(g, self.parts, d, n, positions)
            targets = planes.permute(1, 3, 0, 2, 4)
            matrix = flat.view(g, self.parts * d, n * positions)
        for target, (source, shift) in zip(targets.unbind(), sources, strict=True):
            if shift is None:
                target.copy_(source)
            else:
                torch.sub(source, shift.unsqueeze(-1), out=target)
        return matrix


_kept = threading.local()


def _workspace(like: Tensor, size: int) -> Tensor:
    """Uninitialized memory for ``size`` elements: on a CPU the thread's own, overwritten by the next call."""
    if like.device.type != "cpu":
        return like.new_empty(size)
    buffer: Tensor | None = getattr(_kept, str(like.dtype), None)
    if buffer is None or buffer.numel() < size:
        buffer = like.new_empty(size)
        setattr(_kept, str(like.dtype), buffer)
    return buffer[:size]


def products(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The batched product a (G, p, q) @ b (G, q, r), as pairs (groups, a[groups] @ b[groups])."""
    if _linear_is_faster(a, b):
        for i in range(a.shape[0]):
            # linear(u, v) = u v^T. Its operands must be dense along the summed dimension or it falls to
            # a reference kernel, hundreds of times slower; and the product comes in the order of b.
            assert _linear is not None
            product = _linear(b[i].mT, a[i]).mT if b.stride(1) == 1 else _linear(a[i], b[i].mT)
            yield slice(i, i + 1), product.unsqueeze(0)
    else:
        yield slice(0, a.shape[0]), torch.bmm(a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (G, p, q) @ b (G, q, r) -> (G, p, r)."""
    if not _linear_is_faster(a, b):
        return torch.bmm(a, b)
    return torch.cat([product for _, product in products(a, b)])


def _linear_is_faster(a: Tensor, b: Tensor) -> bool:
    return (
        _linear is not None
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[1] * a.shape[2] * b.shape[2] >= LINEAR_MULTIPLY_ADDS
        and a.stride(2) == 1
        and 1 in (b.stride(1), b.stride(2))
    )


def _find_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's float32 product: 370 to 470 GFLOP/s where the BLAS has 160 to 220 (2 Zen 5 cores).

    torch.matmul takes oneDNN for half types only, and its BLAS (MKL) does not use AVX-512 on every CPU that has
    it. The op is what torch's own compiler calls for a linear layer. Where it is missing, or the CPU has
    no AVX-512, the BLAS does all products.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    op = torch.ops.mkldnn._linear_pointwise.default
    return lambda u, v: op(u, v, None, "none", [], "")


_linear = _find_linear()
