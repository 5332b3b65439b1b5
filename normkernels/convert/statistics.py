"""Running statistics for weights that no training step has seen: averaged weights, folded or edited ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from normkernels._torch import BatchNormBase
from normkernels.layers._base import BatchStatisticsLayer


@torch.no_grad()
def update_norm_stats(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    r"""Estimate the running statistics of all normalization layers anew, as averages over a loader's batches.

    .. math:: \hat s = \frac1B \sum_{b=1}^{B} s_b

    with a layer's statistics s_b of batch b: mean and variance, or mean and whitening matrix. It does for BatchNorm,
    SyncBatchNorm, IterNorm, DBN and POP-Norm what ``torch.optim.swa_utils.update_bn`` does for BatchNorm alone: the
    model runs in training mode, without gradients and with momentum None. Use it for averaged weights (SWA, EMA,
    ``torch.optim.swa_utils.AveragedModel``), whose statistics nothing has estimated, and to replace the moving
    averages of training. Batches of one size weigh their samples equally.

    A layer keeps its own statistics if no batch with finite statistics reaches it, or if ``track_running_stats=False``
    freezes it. A BatchNorm or SyncBatchNorm keeps them if the statistics of even one batch are not finite; other layers
    leave such a batch out.

    Args:
        loader: of batches, or of tuples or lists whose first element is one.
        model: called with each batch.
        device: where to move each batch, or None.

    Every module's training mode and every layer's momentum are afterwards what they were, also when the loader or the
    model raises; then the statistics are, too.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no layer with running statistics that are updated, no batch reaches one and leaves it
            finite statistics, or a batch is an empty tuple or list.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    kinds = (BatchNormBase, BatchStatisticsLayer)
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, kinds) and module.running_mean is not None and module.track_running_stats
    ]
    if not layers:
        raise ValueError(
            "model: expected a BatchNorm, IterNorm, DBN or POP-Norm layer that tracks running statistics, got none"
        )
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    statistics = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in layers]
    unseen, count = layers, 0  # after an exception all of them get their statistics back
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        model.train()
        for batch in loader:
            if isinstance(batch, list | tuple):
                if not batch:
                    raise ValueError(f"loader: expected batches, or tuples that begin with one, got {batch!r}")
                batch = batch[0]
            model(batch if device is None else batch.to(device))
            count += 1
        unseen = [layer for layer in layers if layer.num_batches_tracked == 0 or not _finite(layer)]
        if len(unseen) == len(layers):
            raise ValueError(
                f"loader: expected batches that reach the normalization layers with finite values, got {count} batches"
            )
    finally:
        for layer, momentum, before in zip(layers, momenta, statistics, strict=True):
            layer.momentum = momentum
            if layer in unseen:
                for name, value in before.items():
                    getattr(layer, name).copy_(value)
        for module, training in modes.items():
            module.training = training


def _finite(layer: nn.Module) -> bool:
    statistics = [value for name, value in layer.named_buffers(recurse=False) if name.startswith("running_")]
    return all(bool(value.isfinite().all()) for value in statistics)
