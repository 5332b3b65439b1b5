"""Plain PyTorch implementation of the reductions, tile by tile (see _tiles)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from normkernels.ops._checks import statistics_dtype
from normkernels.ops._products import fast, times_transposed
from normkernels.ops._tiles import as_image, channels_innermost, stack, tiles


def moments(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) in float64 and biased covariance (G, d, d) of x (N, C, *), in one pass.

    Sums are taken of x - s, with s the mean of the first tile, and corrected once at the end:
    mean = s + delta and cov = sum (x - s)(x - s)^T / m - delta delta^T, with delta = sum (x - s) / m.
    Nothing cancels: |delta|^2 is at most the variance times the number of tiles, however large the mean is.
    """
    image = as_image(x)
    n, channels, _, positions = image.shape
    dtype = statistics_dtype(x.dtype)
    gram = torch.zeros(channels // group_size, group_size, group_size, dtype=dtype, device=x.device)
    total = torch.zeros(channels, dtype=torch.float64, device=x.device)
    m = n * positions
    if m == 0:  # the neutral element when moments are merged over processes
        return total, gram
    shift = None
    for samples, at in tiles(image):
        tile = image[samples, :, :, at]
        if shift is None:
            shift = tile.mean((0, 2, 3), dtype=dtype)
        centred = _operand(tile, shift, gram, rows=not channels_innermost(image))
        total += centred.sum((0, 2, 3))
        gram += outer(centred, centred, gram)
    assert shift is not None
    delta = total / m
    d = delta.view(-1, group_size, 1)
    cov = gram.double() / m - d * d.mT
    return shift + delta, (0.5 * (cov + cov.mT)).to(dtype)


def summed_products(y: Tensor, x: Tensor, mean: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """sum y (x - mean)^T (G, d, d), sum y (C,) and sum (x - mean) (C,), in one pass over both.

    The last one is zero but for the rounding of ``mean``; the fused backward corrects with it.
    """
    image, other = as_image(x), as_image(y)
    channels = image.shape[1]
    cross = mean.new_zeros(channels // group_size, group_size, group_size)
    sum_y = torch.zeros(channels, dtype=torch.float64, device=x.device)
    sum_x = torch.zeros_like(sum_y)
    rows = not channels_innermost(image)
    for samples, at in tiles(image):
        left = _operand(other[samples, :, :, at], None, cross, rows, slot="y")
        right = _operand(image[samples, :, :, at], mean, cross, rows)
        sum_y += left.sum((0, 2, 3))
        sum_x += right.sum((0, 2, 3))
        cross += outer(left, right, cross)
    return cross, sum_y, sum_x


def _operand(tile: Tensor, shift: Tensor | None, like: Tensor, rows: bool, slot: str = "") -> Tensor:
    """tile - shift (n, C, 1, l) in like's type, as ``outer`` wants it: in rows, or with the channels innermost."""
    if shift is None and not rows:
        return tile.to(like.dtype)
    return stack((tile, shift), groups=len(like), dtype=like.dtype, rows=rows, slot=slot)


def outer(y: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """sum y x^T of images (n, C, 1, l), per group (G, d, d) as ``like``.

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
