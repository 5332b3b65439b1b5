"""BatchNorms that are frozen by design: FrozenBatchNorm2d of torchvision, detectron2 and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module has a BatchNorm's numbers as buffers, and nothing to be trained."""
    buffers = module._buffers.keys() - {"num_batches_tracked"}
    return buffers == BUFFERS and not module._parameters and not module._modules


@torch.no_grad()
def as_batch_norm(module: Any) -> nn.BatchNorm2d:
    """Return the BatchNorm2d in evaluation, float64 on the CPU, that computes what a frozen one does.

    Both are compared on an input, because the class of the frozen one does not tell what it computes.

    Args:
        module: one that :func:`is_frozen`, float64 on the CPU. Without an ``eps`` it is 1e-5, as in transformers.

    Raises:
        ValueError: it computes something else.
    """
    norm = nn.BatchNorm2d(len(module.running_mean), getattr(module, "eps", 1e-5), dtype=torch.float64).eval()
    norm.load_state_dict({name: getattr(module, name) for name in BUFFERS}, strict=False)
    draw = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(2, norm.num_features, 4, 3, dtype=torch.float64, generator=draw)
    expected = norm(x)
    try:
        difference = float((module(x) - expected).abs().max() / expected.abs().max())
    except Exception as error:  # whatever another module's code raises
        raise ValueError(
            f"expected a frozen BatchNorm that takes images, got {type(error).__name__}: {error}"
        ) from error
    if not difference < 1e-12:
        raise ValueError(
            f"expected a frozen BatchNorm to compute weight (x - running_mean) / sqrt(running_var + eps) + bias, "
            f"got {type(module).__name__}, which differs by {difference:.2g}"
        )
    return norm
