"""Plain PyTorch implementation of the mix y = A x + c, the second and last pass over the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from normkernels.ops._products import products
from normkernels.ops._tiles import Scratch, as_groups, empty_output, tiles


def mix(sources: list[tuple[Tensor, Tensor | None]], matrix: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """matrix @ [source - shift; ...] + bias for the stacked sources, in one pass over them.

    sources: pairs of (N, G, d, L) data and (G, d) shift; matrix (G, d, parts * d); bias (G, d);
    like: (N, C, *), which gives the result's type, shape and layout.
    """
    result = empty_output(like)
    out = as_groups(result, matrix.shape[1])
    scratch = Scratch(sources[0][0], matrix.dtype, len(sources))
    for samples, at in tiles(out):
        stacked = scratch.fill(*((source[samples, :, :, at], shift) for source, shift in sources))
        tile = out[samples, :, :, at]
        for groups, product in products(matrix, stacked):
            product = product.unflatten(2, (tile.shape[0], tile.shape[3])).permute(2, 0, 1, 3)
            if bias is None:
                tile[:, groups].copy_(product)
            else:
                torch.add(product, bias[groups].unsqueeze(-1), out=tile[:, groups])
    return result


def affine(W: Tensor, weight: Tensor | None) -> Tensor:
    """A = diag(weight) W (G, d, d), in W's type."""
    return W if weight is None else W * weight.to(W.dtype).view(W.shape[0], -1, 1)


def per_group(value: Tensor | None, W: Tensor) -> Tensor | None:
    """A per-channel vector (C,) as (G, d), in W's type."""
    return None if value is None else value.to(W.dtype).view(W.shape[0], -1)


def whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # x is centred before the product, A (x - mean) + c: A x + (c - A mean) would cancel at large means.
    source = (as_groups(x, W.shape[1]), per_group(mean, W))
    return mix([source], affine(W, weight), per_group(bias, W), like=x)
