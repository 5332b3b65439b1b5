"""Rules for torch.vmap: ops treat channels, or groups of them, apart, so more models are more channels of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def rule(channels: tuple[tuple[int, ...], tuple[int, ...]], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of ``call``; channels: as in an op's record."""
    taken, returned = channels

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        folded = list(args)
        for i, dim in enumerate(taken):
            if args[i] is not None:
                folded[i] = side_by_side(args[i], in_dims[i], dim, info.batch_size)
        result = call(*folded)
        if isinstance(result, Tensor):
            return result.unflatten(returned[0], (info.batch_size, -1)), returned[0]
        parts = zip(result, returned, strict=True)
        return tuple(value.unflatten(dim, (info.batch_size, -1)) for value, dim in parts), returned

    return vmap


def side_by_side(value: Tensor, mapped: int | None, dim: int, count: int) -> Tensor:
    """Return ``count`` models' channels in one dimension, the first model's first; shared values are copied."""
    if mapped is None:
        value = value.unsqueeze(dim).expand(*value.shape[:dim], count, *value.shape[dim:])
    else:
        value = value.movedim(mapped, dim)
    return value.flatten(dim, dim + 1)
