"""Exact folds of whitening groups that reach across the groups of a convolution, and what they cost.

With d channels in a whitening group, and c output channels and k weights for each of them in a convolution's group:

* "append": the whitening becomes a 1 x 1 convolution behind the layer, with a group for each whitening group. It takes
  d multiply-adds for each of C channels at each position.
* "widen": the convolution gets groups of lcm(c, d) output channels, and the whitening is merged into them. There is a
  weight for every input channel of a wider group, zero where the old group did not read it, which takes
  k (lcm(c, d) / c - 1) multiply-adds more for each channel at each position.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from normkernels.convert._affine import evaluated

GROUPED = ("refuse", "append", "widen")
POINTWISE = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@torch.no_grad()
def appended(norm: Any, rank: int) -> Any:
    """Return the 1 x 1 convolution that computes what a norm does in evaluation, for input of ``rank`` dimensions."""
    A, mean, beta = evaluated(norm)
    groups, d, _ = A.shape
    conv = POINTWISE[rank](groups * d, groups * d, 1, groups=groups, device="meta")  # where no weights are drawn
    conv.weight = nn.Parameter(A.reshape(conv.weight.shape))
    conv.bias = nn.Parameter(beta - (A @ mean.view(groups, d, 1)).flatten())
    return conv.eval()


def widened(layer: Any, d: int) -> Any:
    """Return the same convolution with wider groups, which consist of whole whitening groups of ``d`` channels."""
    factor = _merging(layer, d)
    folded = copy.deepcopy(layer)
    folded.groups = layer.groups // factor
    W = layer.weight.detach()
    # A convolution has (O, I / groups, *), a transposed one (I, O / groups, *): in both the groups are in the rows.
    blocks = W.unflatten(0, (folded.groups, factor, -1))
    wide = blocks.new_zeros(*blocks.shape[:3], factor, *blocks.shape[3:])
    for i in range(factor):
        wide[:, i, :, i] = blocks[:, i]
    folded.weight = nn.Parameter(wide.flatten(3, 4).flatten(0, 2), layer.weight.requires_grad)
    return folded


def costs(layer: Any, d: int) -> dict[str, int]:
    """Return how many multiply-adds per position each way adds; it adds as many weights."""
    return {"append": layer.out_channels * d, "widen": layer.weight.numel() * (_merging(layer, d) - 1)}


def _merging(layer: Any, d: int) -> int:
    """Return how many groups of the convolution become one."""
    each = layer.out_channels // layer.groups
    return math.lcm(each, d) // each
