"""Statistics of one layer's input in a forward pass, and of several passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkernels.primitives.moments.op import MOMENTS


@dataclass(frozen=True, eq=False)
class Batch:
    """Statistics of one layer's input: mean and biased variance (I,) per input channel over all rows, and counts."""

    rows: int  # every position of every sample
    samples: int  # N
    outputs: int  # output positions, of all samples together
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(x: Tensor, output: Tensor, weight: Tensor) -> Batch:
        """Return the statistics of one call.

        x and output: of a Linear, (*, in) with the samples first, or of a convolution, (N, C, *) or (C, *).
        """
        if weight.dim() == 2:
            x = x.unsqueeze(0) if x.dim() == 1 else x.movedim(-1, 1)  # a view: positions are rows, as in a convolution
        elif x.dim() < weight.dim():
            x = x.unsqueeze(0)
        # The op itself is called: the public function's work for gradients is not needed, and shows in small layers.
        mean, _, variance = MOMENTS.raw(x, 1, False)
        rows = x.numel() // x.shape[1]
        return Batch(rows, x.shape[0], output.numel() // weight.shape[0], mean, variance.flatten())

    def merged(self, other: Batch) -> Batch:
        """Return both together, by Chan's formula: nothing cancels, however large the means."""
        rows = self.rows + other.rows
        t, delta = other.rows / rows, other.mean - self.mean
        return Batch(
            rows,
            self.samples + other.samples,
            self.outputs + other.outputs,
            torch.add(self.mean, delta, alpha=t),
            torch.lerp(self.variance, other.variance, t).addcmul_(delta, delta, value=t * (1 - t)),
        )
