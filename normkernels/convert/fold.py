"""Normalizations that are one affine map per channel in evaluation, merged into the layer beside them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from normkernels.convert.pop_norm import POP_NORM
from normkernels.layers.pop_norm import _POPNorm
from normkernels.ops.pop_norm.eager import factors

Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fold_pop_norm(norm: _POPNorm, layer: Layer) -> Layer:
    r"""One layer for ``layer(norm(x))`` in evaluation, at no cost of its own.

    .. math:: W' = W \mathrm{diag}(a), \qquad b' = b + \sum W c, \qquad y = a x + c

    where y is what POP-Norm gives of x, channel by channel (eq. 11 and 12 with the running statistics). Zeros that a
    convolution pads y with are no values of x: with c other than 0 that is not one convolution, and is refused. Other
    padding modes repeat values of the image, so they are exact, and so is a norm with ``center=False``: there c = 0.

    Args:
        norm: POPNorm1d/2d/3d in evaluation mode, with running statistics.
        layer: nn.Linear (on (N, C)) or nn.Conv1d/2d/3d of the norm's rank and as many input channels.

    Returns:
        A copy of ``layer`` with other weights, computed in float64 and rounded once; it has a bias where b' needs one.

    Raises:
        TypeError: ``norm`` or ``layer`` is of another kind (a subclass of the layers may have another forward), or the
            layer's weight or bias is computed, as by parametrizations and pruning.
        ValueError: the norm is in training mode or has no running statistics, channels differ, or the layer pads with
            zeros and c is not 0.
    """
    if not isinstance(norm, _POPNorm):
        raise TypeError(f"norm: expected POPNorm1d, POPNorm2d or POPNorm3d, got {type(norm).__name__}")
    kinds = [kind for kind, pop in POP_NORM.items() if isinstance(norm, pop)]
    if type(layer) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"layer: expected {expected} behind {type(norm).__name__}, got {type(layer).__name__}")
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise TypeError(f"layer: expected its weight and bias to be parameters, got computed ones in {layer}")
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected one in evaluation mode with running statistics, got one that uses the batch's")
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if channels != norm.num_features:
        raise ValueError(f"layer: expected {norm.num_features} input channels as in the norm, got {channels}")
    mean, options = norm.running_mean.double(), (norm.kappa, norm.eps, norm.center, norm.scale)
    weight, bias = (None if value is None else value.double() for value in (norm.weight, norm.bias))
    a, _, beta = factors(mean, norm.running_var.double(), weight, bias, *options)
    c = a * (beta - mean) if norm.center else torch.zeros_like(a)
    if c.any() and _pads_with_zeros(layer):
        raise ValueError(
            f"layer: expected no zero padding, which the normalization would change at the borders, got {layer}"
        )
    folded = copy.deepcopy(layer)
    W = layer.weight.double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # Per output its own group's input channels: (O, I / groups, 1...).
    a, c = (
        value.view(groups, -1).repeat_interleave(len(W) // groups, 0).view(*W.shape[:2], *[1] * (W.dim() - 2))
        for value in (a, c)
    )
    folded.weight.copy_(W * a)
    if c.any():
        if folded.bias is None:
            folded.bias = nn.Parameter(layer.weight.new_zeros(len(W)), layer.weight.requires_grad)
        folded.bias.copy_(folded.bias.double() + (W * c).flatten(1).sum(1))
    return folded


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(k > 1 for k in layer.kernel_size)
    return any(layer.padding)
