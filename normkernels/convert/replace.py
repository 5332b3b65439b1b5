"""Put layers in the place of others: BatchNorm becomes IterNorm, DBN or POP-Norm, or back; convolutions ConvNorm."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from normkernels._checks import check_choice, check_flag
from normkernels._torch import BatchNormBase, ConvolutionBase
from normkernels.convert._families import (
    FAMILIES,
    NOT_OPTIONS,
    SYNCHRONIZED,
    WHITENING,
    asked_group_size,
    check_options,
    family_name,
    largest_divisor,
    member,
    parameters,
    smaller_groups,
)
from normkernels.convert._features import features_linear
from normkernels.convert._graph import CALL_HOOKS, swap
from normkernels.eager.devices import in_float64
from normkernels.layers._base import BatchStatisticsLayer

logger = logging.getLogger("normkernels.convert")

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d)
REPLACEABLE = tuple(layer for name, members in FAMILIES.items() if name != "ConvNorm" for layer in members)
WHERE = {"all": slice(None), "first": slice(1)}
STATE = {"weight", "bias", "running_mean", "running_var", "running_whitening", "num_batches_tracked"}
# Wrappers go on with the parameters and buffers that there were when they were made. They are known by name, because a
# torch that is built without torch.distributed has none of them.
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
HOOKS = (
    *CALL_HOOKS, "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class _Replacement(NamedTuple):
    name: str
    old: nn.Module
    new: nn.Module
    layer: Any  # new, or the new layer in it


def replace(
    model: nn.Module,
    norm: type[nn.Module] | str,
    where: str | Callable[[str, nn.Module], bool] = "all",
    *,
    group_size: int | None = None,
    decorrelate_features: bool | str = False,
    **options: Any,
) -> nn.Module:
    r"""Replace BatchNorm by IterNorm, DBN or POP-Norm, or back, or convolutions by ConvNorm, in place.

    A new layer has the old one's name (all of them, where a module has several) and its gamma and beta. These are the
    same Parameters, so that an optimizer goes on with them. It also has the old one's eps, momentum, affine,
    track_running_stats, device, dtype, training mode and running statistics. The running variance becomes a diagonal
    whitening matrix,

    .. math:: W = \mathrm{diag}\big((\sigma^2 + \epsilon)^{-1/2}\big)

    with which evaluation is the same function as before, until training moves W. The eps stays the same, too: a DBN
    that replaces a BatchNorm has the BatchNorm's, unless ``options`` give another. A checkpoint of the network as it
    was loads with the same result. POP-Norm, which takes mean and variance as they are, and ConvNorm, which takes
    weight and bias, are other functions from the start; :func:`normkernels.convert.to_pop_norm` makes the paper's
    POP-Norm networks, with the norm before the convolution.

    Args:
        model: any module. Convert it before DistributedDataParallel and fully_shard, and before an optimizer is made
            if the new layers have parameters of their own (ConvNorm's affine_weight, the norm before the linear layer).
        norm: a layer class, standing for its family whatever its rank (``IterNorm2d`` turns BatchNorm1d into
            IterNorm1d), or the family's name: "IterNorm", "DBN", "POPNorm", "BatchNorm", "SyncIterNorm", "SyncDBN",
            "SyncBatchNorm", or "ConvNorm", for Conv1d and Conv2d. A layer that synchronizes becomes the one of the
            family that does, with its process_group. Layers that are of the family stay as they are.
        where: "all", "first" in the order of ``named_modules`` (the paper's IterNorm-L1), or a function that is asked
            once for each layer, with its first name and the layer.
        group_size: channels whitened together. A layer has the largest divisor of its channels that is not above, and
            one warning says where that is less than was asked for. None for the family's default, or for what the old
            layer had.
        decorrelate_features: whether a 1d layer of the same family, with the options of the last one replaced and a
            gamma and beta of its own, also goes between the last average pooling and the last linear layer (section
            5.3, "DF"); or the name of that linear layer, for models that torch.fx cannot trace. ``fc`` becomes
            ``Sequential(norm=IterNorm1d(...), layer=fc)``: its parameters are then ``fc.layer.weight`` and
            ``fc.layer.bias``.
        options: for the constructor, as ``num_iterations``, ``scaling``, ``kappa``, ``detach_spectrum``; they override
            what is kept, as ``eps`` and ``momentum``. ``affine=False``, ``center=False`` and ``scale=False`` drop what
            they name.

    IterNorm, DBN and POP-Norm of a half type keep float32 statistics; a BatchNorm of a half type keeps them in that
    type, to which they are rounded.

    Returns:
        ``model``, or the new layer where the model itself is the layer. The logger ``normkernels.convert`` says at
        level INFO what became what.

    Raises:
        TypeError, ValueError: there is nothing to replace; an argument or option is none that there is; or a layer,
            which is named, cannot be replaced without a loss: it is of a subclass (also by a parametrization, or lazy),
            it has hooks, parts or public attributes of its own, it synchronizes and the family does not, its whitening
            matrices have entries other than zero that the new layer has no place for (BatchNorm: all off the diagonal),
            its statistics are not finite in the new layer's type, or a module of the model holds it otherwise than as a
            submodule, as in a list of its own (in its attributes, lists and dicts in them, and those in these; what
            closures and other objects hold is not seen, and goes on with the old layer). The model is as it was.
        RuntimeError: torch.fx cannot trace the model for ``decorrelate_features=True``.

    Source: Huang et al., 2019 (IterNorm), section 5.3; Liu et al., 2021 (ConvNorm), section 3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        for kind in WRAPPERS & {base.__name__ for base in type(module).__mro__}:
            raise ValueError(
                f"{name or 'model'!r}: expected a model that is wrapped afterwards, got one inside of {kind}"
            )
    if not isinstance(decorrelate_features, str):
        check_flag("decorrelate_features", decorrelate_features)
    family = family_name(norm)
    asked = asked_group_size(member(family, 1), group_size)
    planned = []
    for name, old in _chosen(model, family, where):
        with _named(name):
            new = _conv_norm(old, options) if family == "ConvNorm" else _norm(old, family, group_size, options)
        planned.append(_Replacement(name, old, new, new))
    if isinstance(decorrelate_features, str) or decorrelate_features:
        planned.append(_decorrelated(model, family, decorrelate_features, planned[-1].new, group_size, options))
    _check_references(model, planned)
    smaller: dict[int, list[str]] = {}
    for name, old, _, layer in planned:
        if asked is not None and not (group_size is None and hasattr(old, "group_size")):
            smaller.setdefault(layer.num_features, []).append(name or "model")
    message = None if asked is None else smaller_groups(asked, smaller)
    if message is not None:
        warnings.warn(message, stacklevel=2)  # before the first change: warnings may be errors
    for name, old, new, _ in planned:
        logger.info("%s: %s -> %s", name or "model", _described(old), _described(new))
        if old is model:
            return new
        swap(model, old, new)
    return model


def _chosen(model: nn.Module, family: str, where: Any) -> list[tuple[str, nn.Module]]:
    """Return the layers to be replaced, each with its first name."""
    kinds = CONVOLUTIONS if family == "ConvNorm" else (BatchNormBase, BatchStatisticsLayer)
    synchronized = FAMILIES.get(SYNCHRONIZED.get(family, ""), ())
    done = FAMILIES[family] + synchronized
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, done)]
    if not found:
        already = [m for m in model.modules() if isinstance(m, done)]
        if already:
            got = ", ".join(sorted({type(m).__name__ for m in already}))
            message = f"model: expected layers of another family to make {family} of, got {got}, of that family already"
            if any(isinstance(m, synchronized) for m in already):
                message += "; of those that synchronize the only way back is a new network that loads the state_dict"
            raise ValueError(message)
        expected = "Conv1d or Conv2d" if family == "ConvNorm" else "BatchNorm or another normalization of batches"
        got = ", ".join(sorted({type(m).__name__ for m in model.modules() if not m._modules}))
        raise ValueError(f"model: expected {expected} to make {family} of, got layers of the kinds {got}")
    if isinstance(where, str):
        check_choice("where", where, tuple(WHERE))
        return found[WHERE[where]]
    if not callable(where):
        raise TypeError(f'where: expected "all", "first" or a function of name and module, got {where!r}')
    chosen = []
    for name, module in found:
        answer = where(name, module)
        if not isinstance(answer, bool):
            raise TypeError(f"where: expected True or False for {name!r}, got {answer!r}")
        if answer:
            chosen.append((name, module))
    if not chosen:
        raise ValueError(f"where: expected True for some of {', '.join(repr(name) for name, _ in found)}, got none")
    return chosen


def _check_references(model: nn.Module, planned: Sequence[_Replacement]) -> None:
    """Raise if anything that can be seen would go on with an old layer."""
    names = {id(old): name or "model" for name, old, _, _ in planned}
    for holder, module in model.named_modules():
        for attribute, value in vars(module).items():
            held = [] if attribute == "_modules" else [names[id(part)] for part in _parts(value) if id(part) in names]
            if held:
                raise ValueError(
                    f"{holder or 'model'!r}: expected {held[0]!r} as a submodule alone, got it in {attribute!r}, too, "
                    f"which would keep the old layer; use nn.ModuleList or nn.ModuleDict"
                )


def _parts(value: object, depth: int = 2) -> Iterator[object]:
    """Yield the value and, if it is a collection, the values in it and in collections in it."""
    yield value
    if depth and isinstance(value, list | tuple | set | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part, depth - 1)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Make errors say which module they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or 'model'!r}: {error}") from error


def _check_plain(old: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raise unless the new layer takes over everything that this one has."""
    kind = type(old).__name__
    if isinstance(old, LazyModuleMixin) and old.has_uninitialized_params():
        raise ValueError(f"expected a layer with parameters, got {kind} before its first batch")
    leave = "which would be lost; leave it out by a function as where"
    if type(old) not in kinds:
        raise ValueError(f"expected a class of torch or normkernels itself, got {kind}, which may do more, {leave}")
    extra = [name.strip("_").replace("_", " ") for name in HOOKS if getattr(old, name)]
    required = [p.default is p.empty for p in parameters(type(old)).values()]
    fresh = type(old)(*[1] * sum(required), device="meta")
    # Private attributes do not count: libraries mark layers with them, as transformers does after initialization.
    attributes = {name for name in vars(old).keys() - vars(fresh).keys() if not name.startswith("_")}
    extra += sorted({*old._parameters, *old._buffers, *old._modules} - STATE | attributes)
    if extra:
        raise ValueError(f"expected a plain {kind}, got one with {', '.join(extra)} of its own, {leave}")


def _norm(old: Any, family: str, group_size: int | None, options: dict[str, Any]) -> nn.Module:
    _check_plain(old, REPLACEABLE)
    source = family_name(type(old))
    if source in SYNCHRONIZED.values():
        family = SYNCHRONIZED.get(family, family)
        if family not in SYNCHRONIZED.values():
            raise ValueError(f"expected a family that synchronizes in place of {source}, got {family}, which does not")
    layer = member(family, FAMILIES[source].index(type(old)) + 1)
    like = [value for value in (old.weight, old.bias, old.running_mean) if value is not None]
    asked = asked_group_size(layer, group_size)
    if asked is not None and group_size is None:
        asked = getattr(old, "group_size", asked)
    new: Any = _made(layer, old, old.num_features, asked, options, like[0] if like else None)
    if old.weight is not None or old.bias is not None:
        for name in ("weight", "bias"):
            if getattr(new, name) is not None:
                setattr(new, name, getattr(old, name))
    if old.running_mean is not None and new.running_mean is not None:
        new.load_state_dict(_statistics(old, new), strict=False)
        new.track_running_stats = options.get("track_running_stats", old.track_running_stats)  # False freezes them
        for name, value in new.named_buffers():
            if not value.is_meta and not value.isfinite().all():
                raise ValueError(f"expected {name} that is finite in {value.dtype}, got {value.abs().max():.3g}")
    return new.train(old.training)


def _made(
    layer: type[nn.Module], old: Any, channels: int, asked: int | None, options: dict[str, Any], like: Tensor | None
) -> nn.Module:
    """Make a new layer with the options that the old one has as well, on the device and in the type of a tensor."""
    check_options(layer, options)
    names = [name for name in parameters(layer) if name not in NOT_OPTIONS and name != "bias"]
    arguments = {name: getattr(old, name) for name in names if hasattr(old, name)}
    # The tensors count, not the flags: statistics may have been removed by hand.
    arguments["affine"] = old.weight is not None or old.bias is not None
    arguments["track_running_stats"] = old.running_mean is not None
    arguments.update(options)
    if asked is not None:
        arguments["group_size"] = largest_divisor(channels, asked)
    if like is not None:
        arguments.update(device=like.device, dtype=like.dtype)
    return layer(channels, **arguments)


def _statistics(old: Any, new: Any) -> dict[str, Tensor]:
    """Return running statistics for the new layer to load; it can itself read a variance."""
    state = {name: value for name, value in old._buffers.items() if value is not None}
    W = state.pop("running_whitening", None)
    if W is None:
        return state
    size = getattr(new, "group_size", 1)
    blocks = _regrouped(W, size)
    if hasattr(new, "group_size"):
        return {**state, "running_whitening": blocks}
    precision = in_float64(blocks).flatten().square()
    variance = 1 / precision - old.eps
    # W was rounded, so that a variance of 0 may come out negative.
    bound = 4 * torch.finfo(W.dtype).eps / precision
    if not W.is_meta and not ((blocks > 0).all() and (variance >= -bound).all()):
        raise ValueError(
            f"expected running_whitening (variance + eps)^(-1/2) of a variance of at least 0 with eps={old.eps}, "
            f"got entries from {blocks.min():.3g} to {blocks.max():.3g}"
        )
    return {**state, "running_var": variance.clamp(min=0)}


def _regrouped(W: Tensor, size: int) -> Tensor:
    """Return the same matrix (G, d, d), in diagonal blocks of another size."""
    if W.shape[1] == size:
        return W
    dense = torch.block_diag(*W)
    groups = len(dense) // size
    blocks = dense.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).movedim(2, 0)
    lost = dense - torch.block_diag(*blocks)
    if not W.is_meta and not (lost == 0).all():
        raise ValueError(
            f"expected running_whitening with no entries outside of blocks of {size} channels, "
            f"got some of up to {lost.abs().max():.3g}"
        )
    return blocks


def _conv_norm(old: Any, options: dict[str, Any]) -> nn.Module:
    _check_plain(old, CONVOLUTIONS)
    layer = member("ConvNorm", CONVOLUTIONS.index(type(old)) + 1)
    own = [name for name in parameters(type(old)) if hasattr(old, name)]
    check_options(layer, options, fixed={*own, "device", "dtype"})
    arguments = {**{name: getattr(old, name) for name in own}, "bias": old.bias is not None, **options}
    # On another device the constructor would draw a random weight, for nothing, and change the generator's state.
    new: Any = layer(**arguments, device="meta", dtype=old.weight.dtype)
    new.weight, new.bias = old.weight, old.bias
    if new.affine_weight is not None:
        new.affine_weight = nn.Parameter(new._identity(old.weight.detach()))
    return new.train(old.training)


def _decorrelated(
    model: nn.Module, family: str, name: bool | str, last: nn.Module, group_size: int | None, options: dict[str, Any]
) -> _Replacement:
    """Return the replacement for the paper's DF: a norm before the linear layer of this name."""
    if family not in WHITENING:
        raise ValueError(f"decorrelate_features: expected {', '.join(WHITENING)} to decorrelate with, got {family}")
    if not isinstance(name, str):
        name = features_linear(model)
    linear = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(linear, nn.Linear):
        got = "no module of that name" if linear is None else type(linear).__name__
        raise ValueError(f"decorrelate_features: expected the name of a Linear, got {got} for {name!r}")
    with _named(name):
        layer = member(family_name(type(last)), 1)
        asked = asked_group_size(layer, group_size)
        norm = _made(layer, last, linear.in_features, asked, options, linear.weight)
    both = nn.Sequential(OrderedDict(norm=norm, layer=linear)).train(linear.training)
    return _Replacement(name, linear, both, norm)


def _described(layer: Any) -> str:
    if isinstance(layer, nn.Sequential):
        return ", ".join(map(_described, layer))
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    if isinstance(layer, ConvolutionBase):
        return f"{type(layer).__name__}({layer.in_channels}, {layer.out_channels})"
    groups = f", group_size={layer.group_size}" if hasattr(layer, "group_size") else ""
    return f"{type(layer).__name__}({layer.num_features}{groups})"
