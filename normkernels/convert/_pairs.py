"""Layers and the norms behind them, which the caller names where a forward cannot be traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class Pair(NamedTuple):
    layer_name: str
    norm_name: str
    layer: Any
    norm: Any


def named_pairs(model: nn.Module, pairs: Iterable[Any]) -> list[Pair]:
    """Return the modules of these names, each of them in one pair. The caller checks their kinds."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs: expected tuples of two names, got {pairs!r}")
    named = dict(model.named_modules(remove_duplicate=False))
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"pairs: expected names of a layer and of the BatchNorm or other norm behind it, got {pair!r}"
            )
        for name in pair:
            if not isinstance(name, str) or name not in named or not name:
                raise ValueError(f"pairs: expected names of modules of the model, got {name!r}")
        found.append(Pair(*pair, *(named[name] for name in pair)))
    for module, count in Counter(module for pair in found for module in (pair.layer, pair.norm)).items():
        if count > 1:
            names = " = ".join(repr(name) for name, each in named.items() if each is module)
            raise ValueError(f"pairs: expected each module in one of them, got {names} in {count}")
    return found
