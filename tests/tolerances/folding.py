"""Bounds of networks with norms folded into their layers.

one layer   y = A (W x + b - mean) + beta in two ways. Either way n products and d of their sums are added, with
            sums of three more terms, gamma and one rounding of what is merged: u (6 + sqrt(n) + sqrt(d)) of
            S = |A| (|W| |x| + |b| + |mean|) + |beta| for each, which is the pair's own value where all of its
            numbers are absolute values. Merged weights of another type are rounded once more, u_w S.
a network   The errors of its layers add up: normalized activations stay of one size, so none grows much. Of S at
            most a digit cancels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tests.tolerances.common import assert_within, largest, unit


def assert_folded(
    folded: torch.nn.Module,
    layer: torch.nn.Module,
    norm: torch.nn.Module,
    x: Tensor,
    weights: torch.dtype | None = None,
) -> None:
    """Check the function of the layer and the norm behind it, float64; weights: the type of the merged ones."""
    absolute = [copy.deepcopy(module) for module in (layer, norm)]
    for name, value in (item for module in absolute for item in module.state_dict().items()):
        if name != "num_batches_tracked":
            value.copy_(-value.abs() if name == "running_mean" else value.abs())
    with torch.no_grad():
        S = largest(absolute[1](absolute[0](x.abs())))
        got, expected = folded(x), norm(layer(x))
    n = layer.weight[0].numel() * layer.weight.shape[0]  # no fewer than there are, in transposed ones as well
    d = getattr(norm, "group_size", 1)
    relative = 2 * unit(torch.float64) * (6 + n**0.5 + d**0.5) + (0 if weights is None else unit(weights))
    assert_within("folded", got, expected, None, relative * S, S)


def assert_folded_network(got: Tensor, expected: Tensor, layers: int, terms: int, d: int) -> None:
    """Check the function of a folded network.

    layers: those with a norm; terms, d: at most so many products in a sum, channels in a whitening group.
    """
    relative = 10 * layers * 2 * unit(torch.float64) * (6 + terms**0.5 + d**0.5)
    assert_within("folded", got, expected, None, relative * largest(expected), largest(expected))
