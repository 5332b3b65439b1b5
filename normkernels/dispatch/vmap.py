"""Rules for torch.vmap: ops treat channels, or groups of them, apart, so more models are more channels of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Op -> the dimension of the channels or groups, of each tensor that it takes and of each that it returns.
DIMENSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "moments": ((1,), (0, 0, 0)),
    "cross_moments": ((1, 1, 0), (0, 0)),
    "inverse_sqrt": ((0,), (0, 0, 0)),
    "inverse_sqrt_backward": ((0, 0, 0, 0), (0,)),
    "whiten": ((1, 0, 0, 0, 0), (1,)),
    "stacked_mix": ((1, 1, 0, 0, 0, 0), (1,)),
    "iter_norm": ((1, 0, 0), (1, 0, 0, 0, 0)),
    "iter_norm_backward": ((1, 1, 0, 0, 0, 0, 0), (1, 0, 0)),
    "pop_norm": ((1, 0, 0), (1, 0, 0)),
    "pop_norm_backward": ((1, 1, 0, 0, 0, 0), (1, 0, 0)),
    "kernel_spectrum": ((0,), (0,)),
    "kernel_spectrum_backward": ((0, 0), (0,)),
    "spectral_filter": ((1, 0), (1,)),
    "cross_spectrum": ((1, 1), (0,)),
}


def rule(op: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of ``call``, which takes and returns what ``op`` does."""
    taken, returned = DIMENSIONS[op]

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


def register(op: str, autograd: type[torch.autograd.Function] | None, library: torch.library.Library) -> None:
    """Register the rule for the raw op, which backward calls, and for its Function."""
    if op not in DIMENSIONS:
        return
    torch.library.register_vmap(f"normkernels::{op}", rule(op, getattr(torch.ops.normkernels, op)), lib=library)
    if autograd is not None:
        autograd.vmap = staticmethod(rule(op, autograd.apply))  # type: ignore[method-assign]
