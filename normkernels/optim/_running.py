"""Statistics of all layers' inputs: their running averages, and those of a step merged over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkernels._torch import foreach_mul, foreach_norm, foreach_sub
from normkernels.optim._batch import Batch
from normkernels.optim._layers import Layer


class Running:
    """Running means and variances of all layers on one device and in one type, end to end: a few launches update all.

    It is made anew when the model has moved.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> None:
        self.layers = layers
        self.sizes = [len(layer.mean) for layer in layers]
        self.mean = torch.cat([layer.mean.to(device, dtype) for layer in layers])
        self.variance = torch.cat([layer.variance.to(device, dtype) for layer in layers])
        self.owner = torch.repeat_interleave(torch.tensor(self.sizes)).to(device)
        for layer, mean, variance in zip(layers, *map(self.split, (self.mean, self.variance)), strict=True):
            layer.mean, layer.variance = mean, variance

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.sizes)

    def update(self, rho: float) -> None:
        """Do step 2 of Algorithms 2 and 3 for the layers with a batch.

        The host does not wait: a layer whose batch is not finite keeps its statistics, by a mask, and a layer without a
        batch is averaged with itself, which changes no bit.
        """
        new = [layer for layer in self.layers if layer.batch is not None]
        if not new:
            return
        means, variances = ([getattr(layer.batch or layer, name) for layer in self.layers]
                            for name in ("mean", "variance"))  # fmt: skip
        # One row has no variance. The running mean, from before this update, stands in for its mean (section 3.3).
        single = [i for i, layer in enumerate(self.layers) if layer.batch is not None and layer.batch.rows == 1]
        if single:
            off = foreach_sub([means[i] for i in single], [self.layers[i].mean for i in single])
            for i, square in zip(single, foreach_mul(off, off), strict=True):
                variances[i] = square
        mean, variance = torch.cat(means), torch.cat(variances)
        largest = torch.stack(foreach_norm(self.split(mean + variance), float("inf")))
        finite = largest.isfinite()[self.owner]
        for running, batch in ((self.mean, mean), (self.variance, variance)):
            running.lerp_(torch.where(finite, batch, running), 1 - rho)


def merge_ranks(layers: Sequence[Layer], seen: bool, group: Any, world_size: int) -> bool:
    """Give every rank the statistics of all ranks; return whether any rank has seen a forward pass.

    DDP averages gradients: if each rank preconditioned them by its own statistics, the replicas would drift apart. It
    takes one collective, and one wait for it, because q^2 needs the numbers of samples on the host. All layers take
    part on every rank, layers without a batch with weight 0, so that all vectors have the same length.
    """
    counts = [(b.rows, b.samples, b.outputs) if (b := layer.batch) else (0, 0, 0) for layer in layers]
    values = [getattr(layer.batch or layer, name) for name in ("mean", "variance") for layer in layers]
    dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
    device = values[0].device
    header = torch.tensor([float(seen), *(n for numbers in counts for n in numbers)], dtype=dtype).to(device)
    mine = torch.cat([header, *(value.to(device, dtype) for value in values)])
    gathered = mine.new_empty(world_size * len(mine))
    dist.all_gather_into_tensor(gathered, mine, group=group)
    gathered = gathered.view(world_size, -1)

    table = gathered[:, : len(header)].cpu().double()
    by_layer = table[:, 1:].view(world_size, len(layers), 3)  # rows, samples, outputs
    totals = by_layer.sum(0)
    weights = by_layer[:, :, 0] / totals[:, 0]  # NaN where no rank has rows; it is not read then
    sizes = [len(layer.mean) for layer in layers]
    weights = weights.repeat_interleave(torch.tensor(sizes), 1).to(device, dtype)
    means, variances = gathered[:, len(header) :].chunk(2, 1)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    merged = zip(layers, totals.tolist(), mean.split(sizes), variance.split(sizes), strict=True)
    for layer, (rows, samples, outputs), m, v in merged:
        like = layer.mean
        layer.batch = Batch(int(rows), int(samples), int(outputs), m.to(like), v.to(like)) if rows else None
    return bool(table[:, 0].any())
