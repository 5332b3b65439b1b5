"""Channels that a network may do without, by the parameters of its normalization."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from normkernels._checks import check_number
from normkernels._torch import BatchNormBase
from normkernels.analysis._checks import check_module
from normkernels.layers.whitening import _Whitening


class PruningCandidate(NamedTuple):
    """Channels of one layer, and why they are candidates."""

    layer: str
    channels: tuple[int, ...]
    reason: Literal["small", "similar"]
    value: float  # |gamma|, or the largest distance of (gamma, beta) to that of the first channel


@torch.no_grad()
def pruning_candidates(
    model: nn.Module, *, gamma_below: float | None = None, similar_within: float | None = None
) -> list[PruningCandidate]:
    r"""Return channels with a small gamma, and channels with similar gamma and beta.

    "small": a channel whose :math:`\lvert \gamma \rvert` is below ``gamma_below`` is nearly the constant beta (Liu et
    al., 2017, "Network Slimming"). "similar": by eq. 4 of Sun et al. (2020, "New Interpretations of Normalization
    Methods in Deep Learning", section 2.2) two channels' outputs, if their normalized values are the same, differ by

    .. math:: \left( (\gamma_i - \gamma_j)^2 + (\beta_i - \beta_j)^2 \right)^{1/2}

    in root mean square; channels that are within ``similar_within`` of one channel make a group with it, of which the
    first is to stay. Whether their normalized values are alike, only data can tell: these are candidates.

    Args:
        model: its nn.BatchNorm, nn.SyncBatchNorm, IterNorm and DBN layers with gamma and beta are looked at.
        gamma_below: the bound for "small", at least 0. None: not looked for.
        similar_within: the distance for "similar", at least 0. None: not looked for.

    Returns:
        A list of PruningCandidate(layer, channels, reason, value), layer by layer: first the small ones, each by
        itself, from the smallest gamma on, then groups of two or more. Groups do not overlap; they form greedily, in
        the channels' order.

    Raises:
        TypeError: model is no module, or a bound no number.
        ValueError: a bound is negative or not finite, or there is none.
    """
    check_module("model", model)
    if gamma_below is None and similar_within is None:
        raise ValueError("gamma_below, similar_within: expected at least one of them, got None for both")
    for name, bound in (("gamma_below", gamma_below), ("similar_within", similar_within)):
        if bound is not None:
            check_number(name, bound)
    found: list[PruningCandidate] = []
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNormBase | _Whitening) and layer.weight is not None and layer.bias is not None:
            gamma, beta = layer.weight.cpu().double(), layer.bias.cpu().double()
            if gamma_below is not None:
                small = [(value, channel) for channel, value in enumerate(gamma.abs().tolist()) if value < gamma_below]
                found += [PruningCandidate(name, (channel,), "small", value) for value, channel in sorted(small)]
            if similar_within is not None:
                found += [
                    PruningCandidate(name, channels, "similar", distance)
                    for channels, distance in _groups(torch.stack([gamma, beta], 1), similar_within)
                ]
    return found


def _groups(points: Tensor, radius: float) -> list[tuple[tuple[int, ...], float]]:
    """Return groups of two or more points (C, 2) within the radius of their first, each with its largest distance."""
    distance = torch.linalg.vector_norm(points[:, None] - points, dim=2)
    free = torch.ones(len(points), dtype=torch.bool)
    groups = []
    for first in range(len(points)):
        if free[first]:
            members = free & (distance[first] <= radius)  # earlier channels are not free, or are too far away
            free &= ~members
            if members.sum() > 1:
                groups.append((tuple(members.nonzero().flatten().tolist()), distance[first][members].max().item()))
    return groups
