"""Plain PyTorch implementation of the mix y = A x + c, the second and last pass over the activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from normkernels._torch import below_autograd
from normkernels.eager.layouts import as_image, channels_innermost, empty_output, in_layout_of, of_image
from normkernels.eager.products import times_columns
from normkernels.eager.tiles import stack, tiles

# A x + (c - A mean) is used instead of A (x - mean) + c where no |W| |mean| exceeds this, in standard deviations of y.
SMALL_MEAN = 8.0


def mix(sources: list[tuple[Tensor, Tensor | None]], matrix: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """Return matrix @ [source - shift; ...] + bias for the stacked sources, in one pass over them.

    sources: pairs of (N, C, *) data and (C,) shift; matrix (G, d, parts * d); bias (C,);
    like: (N, C, *), which gives the result's type, shape and layout.
    """
    result = empty_output(like)
    out = as_image(result)
    images = [(as_image(source), shift) for source, shift in sources]
    for samples, at in tiles(out):
        parts = [(image[samples, :, :, at], shift) for image, shift in images]
        if matrix.shape[1] == 1:
            mixed = scaled(parts, matrix, bias)
        else:
            mixed = product(matrix, stack(*parts, groups=len(matrix), dtype=matrix.dtype), bias)
        out[samples, :, :, at].copy_(mixed)
    return result


def stacked_mix(grad: Tensor, x: Tensor, grad_mean: Tensor, mean: Tensor, matrix: Tensor, constant: Tensor) -> Tensor:
    return mix([(grad, grad_mean), (x, mean)], matrix, constant, like=x)


def scaled(parts: list[tuple[Tensor, Tensor | None]], matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Do what ``product`` does, for groups of one channel: sum of factor * (tile - shift), + bias, in reused memory."""
    *others, (tile, shift) = parts
    # Contiguous vectors: with the channels innermost a step between factors would keep the loops from vectorizing.
    factors = matrix.view(len(matrix), len(parts)).T.contiguous().view(len(parts), -1, 1, 1).unbind()
    total = stack((tile, shift), groups=len(matrix), dtype=matrix.dtype).mul_(factors[-1])
    for (tile, shift), factor in zip(others, factors, strict=False):
        part = tile if shift is None else stack((tile, shift), groups=len(matrix), dtype=matrix.dtype, slot="other")
        total.addcmul_(part.to(matrix.dtype), factor)
    return total if bias is None else total.add_(bias.view(-1, 1, 1))


def product(matrix: Tensor, image: Tensor, bias: Tensor | None) -> Tensor:
    """Return matrix @ image + bias for a stacked image (n, G * parts * d, 1, l): (n, C, 1, l).

    It is a 1x1 convolution, which takes both layouts and all groups in one call: 400 to 430 GFLOP/s with the channels
    innermost (2 Zen 5 cores; bench/experiments/products.py). With the positions innermost oneDNN reorders input and
    output, at 230 to 280; one group of long planes avoids half of it, at 280 to 360.
    """
    g, d, k = matrix.shape
    if g == 1 and image.shape[3] >= 512 and not channels_innermost(image):
        return times_columns(matrix[0], image.squeeze(2), bias).unsqueeze(2)
    return conv2d(image, matrix.reshape(g * d, k, 1, 1), bias, groups=g)


def affine(W: Tensor, weight: Tensor | None) -> Tensor:
    """Return A = diag(weight) W (G, d, d), in W's type."""
    return W if weight is None else W * weight.to(W.dtype).view(W.shape[0], -1, 1)


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    A = affine(W, weight)
    bias = None if bias is None else bias.to(A.dtype)
    if x.dtype != A.dtype or x.numel() == 0 or not _small(mean, W):
        return mix([(x, mean)], A, bias, like=x)
    # Nothing has to be prepared for the product, so it is one call for all of x, whose result is y.
    if A.shape[1] == 1:
        y = torch.batch_norm(x, A.flatten(), bias, mean, torch.ones_like(mean), False, 0.0, 0.0, True)
        return in_layout_of(x, y)
    c = -torch.bmm(A, mean.view(*A.shape[:2], 1)).flatten()
    y = product(A, as_image(x), c if bias is None else c + bias)
    with below_autograd():  # a view could not be changed in place, as by the ReLU behind it
        return in_layout_of(x, of_image(y, x))


def _small(mean: Tensor, W: Tensor) -> bool:
    """Return whether y = A x + (c - A mean), which needs no centring of x, is exact enough.

    Its rounding error is u |W| (|x - mean| + |mean|) instead of u |W| |x - mean|, in standard deviations of y, where
    |W| |x - mean| is itself several. (BatchNorm's inference does the same for any mean.) The training op centres
    always: there one group's values must not decide how another one's are rounded. On other devices than a CPU x is
    always centred, because this test would make the host wait.
    """
    if W.device.type != "cpu":
        return False
    return torch.bmm(W.abs(), mean.abs().view(*W.shape[:2], 1)).max().item() <= SMALL_MEAN
