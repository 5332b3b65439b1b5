"""Families of normalization layers: which member replaces which, and with what group size."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normkernels import layers
from normkernels._checks import check_integer
from normkernels.layers import sync

# Members in the order of their ranks; a layer that synchronizes takes all ranks.
FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "BatchNorm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "IterNorm": (layers.IterNorm1d, layers.IterNorm2d, layers.IterNorm3d),
    "DBN": (layers.DBN1d, layers.DBN2d, layers.DBN3d),
    "POPNorm": (layers.POPNorm1d, layers.POPNorm2d, layers.POPNorm3d),
    "SyncBatchNorm": (nn.SyncBatchNorm,),
    "SyncIterNorm": (layers.SyncIterNorm,),
    "SyncDBN": (layers.SyncDBN,),
    "ConvNorm": (layers.ConvNorm1d, layers.ConvNorm2d),
}
# Family -> the one that synchronizes it.
SYNCHRONIZED = {"BatchNorm": "SyncBatchNorm"} | {
    family: synchronized.__name__
    for kind, synchronized in sync.SYNCHRONIZED.items()
    for family, members in FAMILIES.items()
    if kind in members and kind is not synchronized
}
WHITENING = ("IterNorm", "DBN", "SyncIterNorm", "SyncDBN")
NOT_OPTIONS = {"num_features", "group_size", "device", "dtype"}  # these are given otherwise than as options


def family_name(norm: object) -> str:
    """Return the name of the family of a layer class, or of the family with this name."""
    expected = f"a layer class of this package, or one of {', '.join(map(repr, FAMILIES))}"
    if not isinstance(norm, str | type):
        raise TypeError(f"norm: expected {expected}, got {type(norm).__name__}")
    for name, members in FAMILIES.items():
        if norm == name or norm in members:
            return name
    raise ValueError(f"norm: expected {expected}, got {norm!r}")


def member(family: str, rank: int) -> type[nn.Module]:
    members = FAMILIES[family]
    return members[0] if len(members) == 1 else members[rank - 1]


def parameters(layer: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a layer's constructor, and of the constructors that it hands keywords on to."""
    found: dict[str, inspect.Parameter] = {}
    for kind in layer.__mro__:
        if "__init__" in vars(kind):
            own = dict(inspect.signature(vars(kind)["__init__"]).parameters)
            found = {**own, **found}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
                break
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: found[name] for name in found if name != "self" and found[name].kind not in variable}


def check_options(layer: type[nn.Module], options: Mapping[str, object], fixed: set[str] = NOT_OPTIONS) -> None:
    accepted = [name for name in parameters(layer) if name not in fixed]
    for name in options:
        if name not in accepted:
            raise TypeError(f"options: expected some of {', '.join(accepted)} of {layer.__name__}, got {name!r}")


def asked_group_size(layer: type[nn.Module], group_size: int | None) -> int | None:
    """Return the group size that is asked for, by default the layer's own; None for layers without groups."""
    parameter = parameters(layer).get("group_size")
    if parameter is not None:
        return parameter.default if group_size is None else check_integer("group_size", group_size, minimum=1)
    if group_size is not None:
        family = family_name(layer)
        raise ValueError(f"group_size: expected None for {family}, which has no groups, got {group_size!r}")
    return None


def largest_divisor(channels: int, asked: int) -> int:
    """Return the largest divisor of the channels that is at most ``asked``."""
    return max(d for d in range(1, min(channels, asked) + 1) if channels % d == 0)


def smaller_groups(asked: int, named: Mapping[int, list[str]]) -> str | None:
    """Return a message about numbers of channels that the size asked for does not divide, None if there are none.

    named: the numbers of channels, with the names of the layers that have them.
    """
    parts = []
    for channels, names in named.items():
        size = largest_divisor(channels, asked)
        if size != min(asked, channels):
            where = f" in {', '.join(map(repr, names))}" if names else ""
            parts.append(f"{channels} channels: {size}{where}")
    return f"group_size {asked} does not divide {'; '.join(parts)}" if parts else None


def norm_layer(
    norm: type[nn.Module] | str, rank: int = 2, group_size: int | None = None, **options: Any
) -> Callable[..., nn.Module]:
    """Return a function for the argument ``norm_layer`` of timm's and torchvision's networks: ``norm_layer(channels)``.

    Args:
        norm: the layer's family, as in :func:`normkernels.convert.replace`.
        rank: 1, 2 or 3, of ``IterNorm1d`` and so on; layers that synchronize take all.
        group_size: channels whitened together. A layer has the largest divisor of its channels that is not above; None
            for the family's default.
        options: for the constructor, such as ``eps`` or ``num_iterations``.

    Returns:
        A ``functools.partial`` that makes a layer of ``(num_features, **keywords)``; keywords such as eps, momentum,
        affine, device, dtype and group_size override what is given here. It can be copied and pickled. It warns once
        for each number of channels that ``group_size`` does not divide. timm's networks whose layers are a norm and an
        activation in one (``get_norm_act_layer``) refuse it.

    Raises:
        TypeError, ValueError: the family, rank, group size or an option is none there is, or is of another kind.
    """
    family = family_name(norm)
    if family == "ConvNorm":
        raise ValueError("norm: expected one that normalizes activations, got ConvNorm, which is a convolution")
    if check_integer("rank", rank, minimum=1) > 3:
        raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
    layer = member(family, rank)
    check_options(layer, options)
    layer(1, device="meta", **options)  # raises now if an option is wrong
    return functools.partial(_Factory(layer, asked_group_size(layer, group_size)), **options)


@dataclass(frozen=True, eq=False)
class _Factory:
    """Makes layers. It is no function, because timm takes functions for layers with an activation and adds none then.

    The partial around it holds only the options, by keyword: timm takes a partial apart and puts it together again.
    """

    layer: type[nn.Module]
    asked: int | None
    warned: set[str] = field(default_factory=set, repr=False)

    @property
    def __name__(self) -> str:
        return self.layer.__name__

    def __call__(self, num_features: int, *, group_size: int | None = None, **keywords: Any) -> nn.Module:
        num_features = check_integer("num_features", num_features, minimum=1)
        asked = self.asked if group_size is None else asked_group_size(self.layer, group_size)
        if asked is None:
            return self.layer(num_features, **keywords)
        message = smaller_groups(asked, {num_features: []})
        if message is not None and message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)
        return self.layer(num_features, group_size=largest_divisor(num_features, asked), **keywords)
