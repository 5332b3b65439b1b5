"""Plain PyTorch implementation of the reductions, tile by tile (see eager/tiles.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from normkernels._checks import statistics_dtype
from normkernels.eager.devices import in_float64, widest
from normkernels.eager.layouts import as_image, channels_innermost
from normkernels.eager.products import fast, times_transposed
from normkernels.eager.tiles import stack, tiles, workspace

SMALL = 2**19  # the most values of which an exact covariance is made with float64 products
CHAIN = 64  # the most columns of one of the float32 sums that add up to an exact covariance


def moments(x: Tensor, group_size: int, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), what rounding the mean left out (C,), and biased covariance (G, d, d) of x (N, C, *).

    It takes one pass. Sums are taken of x - s, with s the mean of the first tile, and corrected once at the end:
    mean = s + delta and cov = sum (x - s)(x - s)^T / m - delta delta^T, with delta = sum (x - s) / m.
    Nothing cancels: |delta|^2 is at most the variance times the number of tiles, however large the mean is.

    exact: whether the covariance keeps the digits that an eigendecomposition needs; it is float64 then, and on the CPU
    where x's device has no such type. See ``_chained_products``.
    """
    image = as_image(x)
    n, channels, _, positions = image.shape
    dtype, wide = statistics_dtype(x.dtype), widest(x)
    gram = x.new_zeros((channels // group_size, group_size, group_size), **kind_of_covariance(x, exact))
    total = torch.zeros(channels, dtype=wide, device=x.device)
    m = n * positions
    if m == 0:  # the neutral element when moments are merged over processes
        return total.to(dtype), torch.zeros_like(total, dtype=dtype), gram
    factor = wide if exact and x.numel() <= SMALL else dtype  # the type of the factors of products
    chain = max(8, min(CHAIN, math.isqrt(m) // 2)) if exact and factor == torch.float32 and group_size > 1 else 0
    shift = None
    for samples, at in tiles(image):
        tile = image[samples, :, :, at]
        if shift is None:
            shift = tile.mean((0, 2, 3), dtype=dtype)
        if chain:
            for piece, of_samples, of_positions in _in_chains(tile, chain):
                sums, products = _chained_products(piece, shift, group_size, of_samples, of_positions)
                total += sums
                gram += products
            continue
        centred = _operand(tile, shift.to(factor), factor, len(gram), rows=exact or not channels_innermost(image))
        total += centred.sum((0, 2, 3))
        gram += outer(centred, centred, gram).to(gram)
    assert shift is not None
    delta = total / m
    squares = gram.to(torch.float64 if exact else wide) / m
    d = delta.view(-1, group_size, 1).to(squares)
    cov = squares - d * d.mT
    if exact:  # entries beyond the statistics' type become NaN: a batch overflows in every size and layout alike
        cov = torch.where(cov.abs() <= torch.finfo(dtype).max, cov, torch.nan)
    mean = (shift + delta).to(dtype)
    return mean, (shift.to(wide) - mean + delta).to(dtype), (0.5 * (cov + cov.mT)).to(gram.dtype)


def kind_of_covariance(x: Tensor, exact: bool) -> dict[str, Any]:
    """Return type and device of the covariance of x."""
    if not exact:
        return {"dtype": statistics_dtype(x.dtype), "device": x.device}
    return {"dtype": torch.float64, "device": x.device if widest(x) == torch.float64 else "cpu"}


def _in_chains(tile: Tensor, chain: int) -> Iterator[tuple[Tensor, int, int]]:
    """Cut a tile (n, C, 1, l) into pieces, each with the samples and the positions of its chains of columns."""
    n, _, _, positions = tile.shape
    if positions >= chain:
        length = -(-positions // -(-positions // chain))  # equal parts of at most `chain`, but for the last one
        full = positions - positions % length
        pieces = [(tile[..., :full], 1, length), (tile[..., full:], 1, positions - full)]
    else:
        samples = chain // positions
        full = n - n % samples
        pieces = [(tile[:full], samples, positions), (tile[full:], n - full, positions)]
    yield from (piece for piece in pieces if piece[0].numel() > 0)


def _chained_products(
    tile: Tensor, shift: Tensor, group_size: int, samples: int, positions: int
) -> tuple[Tensor, Tensor]:
    """Return sum (x - shift) (C,), and sum (x - shift)(x - shift)^T (G, d, d) in float64, added up from short chains.

    A float32 sum of K products has a random error of about sqrt(K) roundings, and the mean of m / K of them, added in
    float64, K / sqrt(m). With K = sqrt(m) / 2 it is half of a float32 rounding, which
    whitening multiplies by half the condition number of the correlation matrix. Products in float64, for small data,
    take three times as long, but need no other order of the columns.
    """
    n, channels, _, length = tile.shape
    groups, d = channels // group_size, group_size
    chains = (n // samples, length // positions)
    memory = workspace(tile, tile.numel(), shift.dtype).view(*chains, groups, d, samples, positions)
    source = tile.squeeze(2).unflatten(1, (groups, d)).unflatten(0, (-1, samples)).unflatten(-1, (-1, positions))
    torch.sub(source, shift.view(groups, d, 1, 1), out=memory.permute(0, 4, 2, 3, 1, 5))
    columns = memory.view(-1, d, samples * positions)
    products = torch.bmm(columns, columns.mT).view(-1, groups, d, d)
    sums = memory.sum((0, 1, 4, 5)).flatten()
    if widest(tile) == torch.float64:
        return sums, products.sum(0, dtype=torch.float64)
    mean = products.mean(0)  # the sum in two float32 numbers: what is left beside the mean is small
    return sums, in_float64(mean) * len(products) + in_float64((products - mean).sum(0))


def summed_products(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum y (x - mean)^T (G, d, d), sum y (C,) and sum (x - mean) (C,), in one pass over both.

    The last one is zero but for the rounding of ``mean``; the fused backward corrects with it.
    """
    image, other = as_image(x), as_image(y)
    channels = image.shape[1]
    cross = mean.new_zeros(channels // group_size, group_size, group_size)
    sum_y = torch.zeros(channels, dtype=widest(x), device=x.device)
    sum_x = torch.zeros_like(sum_y)
    rows = not channels_innermost(image)
    for samples, at in tiles(image):
        left = _operand(other[samples, :, :, at], None, cross.dtype, len(cross), rows, slot="y")
        right = _operand(image[samples, :, :, at], mean, cross.dtype, len(cross), rows)
        sum_y += left.sum((0, 2, 3))
        sum_x += right.sum((0, 2, 3))
        cross += outer(left, right, cross)
    return cross, sum_y, sum_x


def _operand(tile: Tensor, shift: Tensor | None, dtype: torch.dtype, groups: int, rows: bool, slot: str = "") -> Tensor:
    """Return tile - shift (n, C, 1, l) in a type, as ``outer`` wants it: in rows, or with the channels innermost."""
    if shift is None and not rows:
        return tile.to(dtype)
    return stack((tile, shift), groups=groups, dtype=dtype, rows=rows, slot=slot)


def outer(y: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return sum y x^T of images (n, C, 1, l), per group (G, d, d) as ``like``.

    With the channels innermost it is the weight gradient of the 1x1 convolution that maps x to y, at 350 to 400
    GFLOP/s. Images in rows are multiplied as rows, small groups in one batch; a convolution would reorder them inside,
    at 230 to 270. For groups of one channel the products are elementwise and take the place of x.
    """
    g, d, _ = like.shape
    if d == 1:
        return x.mul_(y).sum((0, 2, 3)).view(g, 1, 1)
    if channels_innermost(x):
        return conv2d_weight(x, (g * d, d, 1, 1), y, groups=g).view(g, d, d)
    y, x = (image.transpose(0, 1).reshape(g, d, -1) for image in (y, x))
    if d < 32 or not fast(x):
        return torch.bmm(y, x.mT)
    return torch.stack([times_transposed(left, right) for left, right in zip(y, x, strict=True)])


def cross_moments(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    cross, sum_y, _ = summed_products(y, x, mean, group_size)
    return cross, sum_y.to(mean.dtype)
