"""Turn Conv-BN-act networks into POP-Conv-act networks (POP-Norm, Figure 1)."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from normkernels._checks import check_flag
from normkernels._torch import BatchNormBase
from normkernels.convert._affine import POP_NORM_OF
from normkernels.convert._graph import BATCH_NORMS, swap
from normkernels.convert._network import Network
from normkernels.convert._pairs import Pair, named_pairs
from normkernels.layers import POPNorm1d, POPNorm2d, POPNorm3d

BEFORE: dict[type[nn.Module], type[nn.Module]] = {
    **POP_NORM_OF,
    nn.ConvTranspose1d: POPNorm1d,
    nn.ConvTranspose2d: POPNorm2d,
    nn.ConvTranspose3d: POPNorm3d,
}


def to_pop_norm(
    model: nn.Module,
    *,
    kappa: float = 4.0,
    center: bool = True,
    scale: bool = True,
    bias: bool = True,
    pairs: Iterable[tuple[str, str]] | None = None,
    classifier: bool | str = False,
) -> dict[str, str]:
    """Move the normalization from behind each convolution or linear layer to before it, in place (POP-Norm, Figure 1).

    Every Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d whose output goes to a BatchNorm and nowhere else becomes
    ``Sequential(norm=POPNorm(...), layer=conv)`` under its old name, with the BatchNorm's eps and momentum; an
    ``nn.Identity`` takes the BatchNorm's place. The result is another function, for training from the start, with an
    optimizer made afterwards: the BatchNorm's parameters and statistics are dropped. A BatchNorm that does not follow
    such a layer, as in a pre-activation network, stays. Pairs are found as :func:`normkernels.convert.fold` finds them:
    Identity and Dropout in evaluation may be between, and a module that torch.fx cannot trace is looked into by itself.

    Args:
        model: a network; the BatchNorms of forwards that cannot be traced stay, which one warning says.
        kappa, center, scale: as in :class:`normkernels.POPNorm2d`.
        bias: give layers without a bias one (b of eq. 8), at zero: BatchNorm's beta has made it superfluous so far.
        pairs: names of layers and of the BatchNorm behind each, instead of finding them.
        classifier: whether the last linear layer gets a norm before it as well, with the options of the last
            BatchNorm; or the name of that linear layer. The last one is the only layer whose output comes to the
            model's without another linear layer or convolution in between; where the model cannot be traced, the only
            Linear that it has. The paper does not say whether it has a norm; kappa makes what it gives smaller, and so
            bounds the loss from below.

    Returns:
        {name of the new POPNorm: name of its convolution or linear layer}, in the order of the calls or of ``pairs``,
        the classifier last.

    Raises:
        TypeError, ValueError: no such pair is in the model, a name in ``pairs`` is unknown or is not of the right kind,
            a module is in more than one of them, the norm is a SyncBatchNorm or another subclass, which does more than
            BatchNorm, or there is no one last linear layer. The model is as it was.
        RuntimeError: torch.fx can trace no forward that has such a pair, and ``pairs`` are not given.
    """
    check_flag("bias", bias)
    if not isinstance(classifier, str):
        check_flag("classifier", classifier)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    needed = pairs is None or (classifier and not isinstance(classifier, str))
    network = Network(model) if needed else None
    found = named_pairs(model, _found_pairs(model, network) if pairs is None and network is not None else pairs or ())
    if not found:
        raise ValueError(
            "model: expected a convolution or linear layer whose output goes to a BatchNorm and nowhere else, got none"
        )
    for pair in found:
        _check(pair)
    before = [(pair.layer_name, pair.layer, pair.norm) for pair in found]
    if classifier:
        name, linear = _classifier(model, network, classifier)
        if all(linear is not layer for _, layer, _ in before):  # one with a BatchNorm behind has its norm already
            before.append((name, linear, found[-1].norm))
    norms = [
        BEFORE[_kind(layer)](
            _channels(layer)[0], kappa, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
            center=center, scale=scale, device=layer.weight.device, dtype=layer.weight.dtype,
        )
        for _, layer, norm in before
    ]  # fmt: skip
    for (_, layer, norm), pop in zip(before, norms, strict=True):
        if bias and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(_channels(layer)[1]), layer.weight.requires_grad)
        both = nn.Sequential(OrderedDict(norm=pop, layer=layer)).train(layer.training)
        pop.train(norm.training)
        swap(model, layer, both)
    for pair in found:
        swap(model, pair.norm, nn.Identity())
    return {f"{name}.norm": f"{name}.layer" for name, _, _ in before}


def _found_pairs(model: nn.Module, network: Network) -> list[tuple[str, str]]:
    pairs, unseen = [], {}
    norms = [module for module in model.modules() if isinstance(module, BatchNormBase)]
    for norm in network.called(norms):
        try:
            layer: Any = network.neighbor(norm)
        except ValueError:  # the norm stays
            continue
        alone = network.calls[norm] == network.calls[layer] == 1 and _kind(layer) is not None
        if alone and norm.num_features == _channels(layer)[1]:  # a norm behind a Linear on (N, L, C) has L features
            pairs.append((network.names[layer], network.names[norm]))
    for norm in norms:
        if not network.sees(norm) and network.calls[norm]:
            unseen[network.names[norm]] = network.why_not_called(norm)
    if unseen:
        reasons = "; ".join(dict.fromkeys(unseen.values()))
        if not pairs:
            raise RuntimeError(f"model: {reasons}")
        warnings.warn(f"BatchNorms that stay as they are: {', '.join(map(repr, unseen))}: {reasons}", stacklevel=3)
    return pairs


def _classifier(model: nn.Module, network: Network | None, asked: bool | str) -> tuple[str, nn.Linear]:
    """Return name and module of the last linear layer."""
    if isinstance(asked, str):
        name = asked
    else:
        assert network is not None
        last = network.last_layers()
        if last is None:
            last = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if len(last) != 1:
            got = ", ".join(f"{network.names[each]!r} ({type(each).__name__})" for each in last) or "none"
            raise ValueError(f"classifier: expected one last linear layer, or its name, got {got}")
        name = network.names[last[0]]
    linear = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(linear, nn.Linear):
        got = "no module of that name" if linear is None else type(linear).__name__
        raise ValueError(
            f"classifier: expected a last layer that is a Linear, or the name of one, got {got} for {name!r}"
        )
    return name, linear


def _kind(layer: nn.Module) -> Any:
    """Return which of BEFORE's keys a layer is an instance of, None if there is none."""
    return next((kind for kind in BEFORE if isinstance(layer, kind)), None)


def _channels(layer: Any) -> tuple[int, int]:
    """Return the numbers of input and output channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _check(pair: Pair) -> None:
    if _kind(pair.layer) is None:
        got = type(pair.layer).__name__
        raise ValueError(f"{pair.layer_name!r}: expected Linear or Conv1d/2d/3d or ConvTranspose1d/2d/3d, got {got}")
    if type(pair.norm) not in BATCH_NORMS:  # a subclass may do more, and all of it would be lost
        raise ValueError(f"{pair.norm_name!r}: expected BatchNorm1d/2d/3d, got {type(pair.norm).__name__}")
    _, channels = _channels(pair.layer)
    if pair.norm.num_features != channels:
        got = pair.norm.num_features
        raise ValueError(f"{pair.norm_name!r}: expected {channels} features as {pair.layer_name!r} gives, got {got}")
