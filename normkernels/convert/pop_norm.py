"""Conv-BN-act networks into POP-Conv-act (POP-Norm, Figure 1)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from normkernels.convert._graph import BATCH_NORMS, Tracer, swap
from normkernels.layers import POPNorm1d, POPNorm2d, POPNorm3d
from normkernels.ops._checks import check_flag

POP_NORM: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: POPNorm1d,
    nn.Conv1d: POPNorm1d,
    nn.Conv2d: POPNorm2d,
    nn.Conv3d: POPNorm3d,
}


def to_pop_norm(
    model: nn.Module,
    *,
    kappa: float = 4.0,
    center: bool = True,
    scale: bool = True,
    bias: bool = True,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> dict[str, str]:
    """Move the normalization from behind each convolution or linear layer to before it, in place (POP-Norm, Figure 1).

    Every layer ``conv`` whose output goes to a BatchNorm and nowhere else becomes ``Sequential(norm=POPNorm(...),
    layer=conv)`` under its old name, with the BatchNorm's eps and momentum; an ``nn.Identity`` takes the BatchNorm's
    place. The result is another function, for training from the start, with an optimizer made afterwards: the
    BatchNorm's parameters and statistics are dropped. A BatchNorm that does not follow such a layer, as in a
    pre-activation network, stays.

    Args:
        model: a network that ``torch.fx`` can trace, or any if ``pairs`` are given.
        kappa, center, scale: as in :class:`normkernels.POPNorm2d`.
        bias: give layers without a bias one (b of eq. 8), at zero: BatchNorm's beta has made it superfluous so far.
        pairs: names of layers and of the BatchNorm behind each, instead of tracing the model.

    Returns:
        {name of the new POPNorm: name of its convolution or linear layer}, in the order of the calls or of ``pairs``.

    Raises:
        TypeError, ValueError: no such pair is in the model, a name in ``pairs`` is unknown or is not of the right kind,
            a module is in more than one of them, or the norm is a SyncBatchNorm or another subclass, which does more
            than BatchNorm. The model is as it was.
        RuntimeError: torch.fx cannot trace the model, and ``pairs`` are not given.
    """
    check_flag("bias", bias)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    found = _traced_pairs(model) if pairs is None else list(pairs)
    if not found:
        raise ValueError(
            "model: expected a convolution or linear layer whose output goes to a BatchNorm and nowhere else, got none"
        )
    named = dict(model.named_modules(remove_duplicate=False))
    checked = [_checked(named, pair) for pair in found]
    for module, count in Counter(module for both in checked for module in both).items():
        if count > 1:
            names = " = ".join(repr(name) for name, each in named.items() if each is module)
            raise ValueError(f"pairs: expected each module in one of them, got {names} in {count}")
    norms = [
        POP_NORM[_kind(layer)](
            _channels(layer)[0], kappa, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
            center=center, scale=scale, device=layer.weight.device, dtype=layer.weight.dtype,
        )
        for layer, norm in checked
    ]  # fmt: skip
    for (layer, norm), pop in zip(checked, norms, strict=True):
        if bias and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(_channels(layer)[1]), layer.weight.requires_grad)
        both = nn.Sequential(OrderedDict(norm=pop, layer=layer)).train(layer.training)
        pop.train(norm.training)
        swap(model, layer, both)
        swap(model, norm, nn.Identity())
    return {f"{name}.norm": f"{name}.layer" for name, _ in found}


def _traced_pairs(model: nn.Module) -> list[tuple[str, str]]:
    try:
        nodes = list(Tracer().trace(model).nodes)
    except Exception as error:  # whatever the model's code raises on a proxy
        raise RuntimeError(
            f"model: expected one that torch.fx can trace, got {type(error).__name__}: {error}; "
            f'name the layers instead, as pairs=[("conv1", "bn1"), ...]'
        ) from error
    # A shared module has several names, and tracing finds it under the first.
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module":
            continue
        layer, norm = (model.get_submodule(str(each.target)) for each in (before, node))
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or _kind(layer) is None:
            continue
        alone = calls[node.target] == calls[before.target] == len(before.users) == 1
        if alone and norm.num_features == _channels(layer)[1]:  # a Linear on (N, L, C) is followed by one of L features
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _kind(layer: nn.Module) -> Any:
    """Which of POP_NORM's keys a layer is; subclasses as well, but no transposed convolutions."""
    return next((kind for kind in POP_NORM if isinstance(layer, kind)), None)


def _channels(layer: Any) -> tuple[int, int]:
    """In and out."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _checked(named: dict[str, Any], pair: Any) -> tuple[Any, Any]:
    """The modules of these names."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"pairs: expected names of a layer and of the BatchNorm behind it, got {pair!r}")
    for name in pair:
        if name not in named or not name:
            raise ValueError(f"pairs: expected names of modules of the model, got {name!r}")
    layer, norm = (named[name] for name in pair)
    if _kind(layer) is None:
        raise ValueError(f"{pair[0]!r}: expected Linear or Conv1d/2d/3d, got {type(layer).__name__}")
    if type(norm) not in BATCH_NORMS:  # a subclass may do more, and all of it would be lost
        raise ValueError(f"{pair[1]!r}: expected BatchNorm1d/2d/3d, got {type(norm).__name__}")
    _, channels = _channels(layer)
    if norm.num_features != channels:
        raise ValueError(f"{pair[1]!r}: expected {channels} features as {pair[0]!r} gives, got {norm.num_features}")
    return layer, norm
