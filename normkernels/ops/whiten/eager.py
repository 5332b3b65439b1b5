"""Plain PyTorch implementation of the mix y = A x + c, the second and last pass over the activations."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv2d

from normkernels.ops._tiles import as_image, empty_output, stack, tiles


def mix(sources: list[tuple[Tensor, Tensor | None]], matrix: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """matrix @ [source - shift; ...] + bias for the stacked sources, in one pass over them.

    sources: pairs of (N, C, *) data and (C,) shift; matrix (G, d, parts * d); bias (C,);
    like: (N, C, *), which gives the result's type, shape and layout.
    """
    result = empty_output(like)
    out = as_image(result)
    images = [(as_image(source), shift) for source, shift in sources]
    weight = matrix.flatten(0, 1)[:, :, None, None]
    for samples, at in tiles(out):
        stacked = stack(
            *((image[samples, :, :, at], shift) for image, shift in images), groups=len(matrix), dtype=matrix.dtype
        )
        out[samples, :, :, at].copy_(conv2d(stacked, weight, bias, groups=len(matrix)))
    return result


def affine(W: Tensor, weight: Tensor | None) -> Tensor:
    """A = diag(weight) W (G, d, d), in W's type."""
    return W if weight is None else W * weight.to(W.dtype).view(W.shape[0], -1, 1)


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # x is centred before the product, A (x - mean) + c: A x + (c - A mean) would cancel at large means.
    return mix([(x, mean)], affine(W, weight), None if bias is None else bias.to(W.dtype), like=x)
