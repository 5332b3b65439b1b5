"""Floating-point operations of the package's ops, for torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normkernels.dispatch.record import OPS, Op


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return a formula for each op of the package, as torch's counter takes them.

    Without them ``torch.utils.flop_counter.FlopCounterMode`` counts nothing in our layers::

        with FlopCounterMode(custom_mapping=nk.analysis.flop_formulas()) as counter:
            model(x).sum().backward()
        counter.get_total_flops()

    A multiplication with an addition is two operations. Only terms that grow fastest with the sizes count: for a
    training step of ``iter_norm`` on N x C x L values 10 d N C L, and the products of the small matrices.
    """
    return {getattr(torch.ops.normkernels, name): _formula(op) for name, op in OPS.items()}


def _formula(op: Op) -> Callable[..., int]:
    def flops(*shapes: Any, out_shape: Any = None) -> int:
        return int(op.flops(*shapes))

    return flops
