"""Merge a normalization in evaluation, which is an affine map, into the layer in front of it or behind it.

Here a layer and a norm are given; :mod:`normkernels.convert.fold` finds which ones belong together.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normkernels._torch import BatchNormBase, TransposedConvolutionBase
from normkernels.layers import POPNorm1d, POPNorm2d, POPNorm3d
from normkernels.layers.conv_norm import ConvNorm1d, ConvNorm2d
from normkernels.layers.pop_norm import _POPNorm
from normkernels.layers.whitening import _Whitening
from normkernels.primitives.pop_norm.eager import factors

Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The number of dimensions of a layer's output and of a norm's input, the batch among them.
LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    **{nn.Conv1d: 3, nn.ConvTranspose1d: 3, ConvNorm1d: 3},
    **{nn.Conv2d: 4, nn.ConvTranspose2d: 4, ConvNorm2d: 4},
    **{nn.Conv3d: 5, nn.ConvTranspose3d: 5},
}
BATCH_NORM_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
FOLDABLE = (BatchNormBase, _Whitening, _POPNorm)
# The layers that a norm in front can be merged into, with the POP-Norm for their input.
POP_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: POPNorm1d,
    nn.Conv1d: POPNorm1d,
    nn.Conv2d: POPNorm2d,
    nn.Conv3d: POPNorm3d,
}
# A subclass that overrides only HARMLESS computes the same as its base. One that overrides CALLED, or other methods or
# constants of its base, may compute something else.
HARMLESS = {"__init__", "__repr__", "__setstate__", "extra_repr", "reset_parameters"}
CALLED = {"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "weight", "bias"}


class MisalignedError(ValueError):
    """A whitening group reaches across groups of a convolution."""


def kind(layer: nn.Module) -> type[nn.Module] | None:
    """Return which of LAYERS a layer computes: its class, or the base from which it inherits all that its calls run."""
    for base in type(layer).__mro__:
        if base in LAYERS:
            own = {name for each in base.__mro__ if each not in (nn.Module, object) for name in vars(each)}
            run = {name for name in own if callable(getattr(base, name)) and name not in HARMLESS} | CALLED
            run |= set(getattr(base, "__constants__", ()))
            same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in run)
            return base if same else None
    return None


def rank_of(layer: nn.Module) -> int:
    """Return the number of dimensions of a layer's output."""
    base = kind(layer)
    assert base is not None, layer
    return LAYERS[base]


def ranks(norm: Any) -> tuple[int, ...]:
    """Return the numbers of dimensions that a norm's input may have."""
    return norm._ranks if hasattr(norm, "_ranks") else BATCH_NORM_RANKS[type(norm)]


def evaluated(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (G, d, d), mean and beta (C,), in the norm's type: in evaluation it is y = A (x - mean) + beta."""
    mean, weight, beta = norm.running_mean, norm.weight, norm.bias
    var: Any = getattr(norm, "running_var", None)
    if isinstance(norm, _POPNorm):
        a, _, beta = factors(mean, var, weight, beta, norm.kappa, norm.eps, norm.center, norm.scale)
        return a.view(-1, 1, 1), mean if norm.center else torch.zeros_like(mean), a * beta
    W = norm.running_whitening if var is None else (var + norm.eps).rsqrt().view(-1, 1, 1)
    A = W if weight is None else weight.view(*W.shape[:2], 1) * W
    return A, mean, torch.zeros_like(mean) if beta is None else beta


@torch.no_grad()
def fold_behind(layer: Any, norm: Any) -> Any:
    r"""Return one layer for ``norm(layer(x))`` in evaluation.

    .. math:: W' = A W, \qquad b' = A (b - \mu) + \beta

    A mixes the output channels of a group, all of which must read the same input channels.

    Args:
        layer: one of LAYERS. A ConvNorm's output does not scale with its weight: there A, which must be diagonal, goes
            into its ``affine_weight``, a convolution with a group for each channel.
        norm: one of FOLDABLE in evaluation, with running statistics.

    Returns:
        A copy of ``layer`` with another weight, and with a bias.

    Raises:
        ValueError: dimensions or channels do not fit, groups are misaligned, or a ConvNorm has no ``affine_weight``.
    """
    linear = isinstance(layer, nn.Linear)
    outputs = layer.out_features if linear else layer.out_channels
    _check_fits(norm, layer, outputs, "behind")
    A, mean, beta = evaluated(norm)
    name, groups = "weight", 1 if linear else layer.groups
    if isinstance(layer, ConvNorm1d | ConvNorm2d):
        if layer.affine_weight is None:
            raise ValueError(f"expected a {type(layer).__name__} with affine=True, which can take a scale, got {layer}")
        name, groups = "affine_weight", outputs
    A = _aligned(A, outputs // groups, groups, "output")
    folded = copy.deepcopy(layer)
    W = old = getattr(layer, name)
    transposed = isinstance(layer, TransposedConvolutionBase)
    if transposed:  # (I, O / groups, *): the output channels go to the front, as in other layers
        W = W.unflatten(0, (groups, -1)).transpose(1, 2)
    mixed = (A @ W.reshape(*A.shape[:2], -1)).view(W.shape)
    if transposed:
        mixed = mixed.transpose(1, 2).flatten(0, 1)
    b = -mean if layer.bias is None else layer.bias - mean
    setattr(folded, name, nn.Parameter(mixed, old.requires_grad))
    trains = (old if layer.bias is None else layer.bias).requires_grad
    folded.bias = nn.Parameter((A @ b.view(*A.shape[:2], 1)).flatten() + beta, trains)
    return folded


@torch.no_grad()
def fold_in_front(layer: Any, norm: Any) -> Any:
    r"""Return one layer for ``layer(norm(x))`` in evaluation.

    .. math:: W' = W A, \qquad b' = b + \sum W c, \qquad c = \beta - A \mu

    Where a convolution pads the norm's output with zeros, these are no values of x: if c is not 0, norm and convolution
    are then not one convolution. Other padding modes repeat values of the image, so they are exact.

    Args:
        layer: nn.Linear or nn.Conv1d/2d/3d.
        norm: one of FOLDABLE in evaluation, with running statistics.

    Returns:
        A copy of ``layer`` with another weight; it has a bias where b' needs one.

    Raises:
        ValueError: it is another kind of layer, dimensions or channels do not fit, groups are misaligned, or it pads
            with zeros and c is not 0.
    """
    if kind(layer) not in POP_NORM_OF:
        raise ValueError(f"expected Linear or Conv1d/2d/3d behind a norm, got {type(layer).__name__}")
    linear = isinstance(layer, nn.Linear)
    inputs, groups = (layer.in_features, 1) if linear else (layer.in_channels, layer.groups)
    _check_fits(norm, layer, inputs, "in front of")
    A, mean, beta = evaluated(norm)
    c = beta - (A @ mean.view(*A.shape[:2], 1)).flatten()
    if c.any() and _pads_with_zeros(layer):
        raise ValueError(f"expected no zero padding, which the normalization would change at the borders, got {layer}")
    A = _aligned(A, inputs // groups, groups, "input")
    folded = copy.deepcopy(layer)
    # (group, output, block of A in the group, row of A, position)
    W = layer.weight.view(groups, -1, len(A) // groups, A.shape[1], layer.weight[0, 0].numel())
    mixed = torch.einsum("gobik,gbij->gobjk", W, A.view(groups, -1, *A.shape[1:]))
    folded.weight = nn.Parameter(mixed.reshape(layer.weight.shape), layer.weight.requires_grad)
    if c.any():
        b = torch.einsum("gobik,gbi->go", W, c.view(groups, -1, A.shape[1])).flatten()
        trains = (layer.weight if layer.bias is None else layer.bias).requires_grad
        folded.bias = nn.Parameter(b if layer.bias is None else layer.bias + b, trains)
    return folded


def _check_fits(norm: Any, layer: nn.Module, channels: int, place: str) -> None:
    rank = rank_of(layer)
    if rank not in ranks(norm):
        raise ValueError(f"expected a norm for {rank}D input {place} {type(layer).__name__}, got {type(norm).__name__}")
    if norm.num_features != channels:
        raise ValueError(f"expected {channels} features {place} {type(layer).__name__}, got {norm.num_features}")


def _aligned(A: Tensor, each: int, groups: int, side: str) -> Tensor:
    """Return A with groups that lie inside the convolution's groups of ``each`` channels, or raise MisalignedError.

    A diagonal matrix can always be split into groups of one channel.
    """
    d = A.shape[-1]
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    if each % d == 0:
        return A
    if bool((A - torch.diag_embed(diagonal)).any()):
        raise MisalignedError(
            f"expected whitening groups that divide the {each} {side} channels in each of the convolution's {groups} "
            f"groups, got misaligned groups of {d}"
        )
    return diagonal.reshape(-1, 1, 1)


@torch.no_grad()
def fold_pop_norm(norm: _POPNorm, layer: Layer) -> Layer:
    r"""Return one layer for ``layer(norm(x))`` in evaluation, so that the norm costs nothing.

    .. math:: W' = W \mathrm{diag}(a), \qquad b' = b + \sum W c, \qquad y = a x + c

    where y is POP-Norm's output for x, channel by channel (eq. 11 and 12 with the running statistics). Zeros that a
    convolution pads y with are no values of x: if c is not 0, the two layers are not one convolution and are refused.
    Other padding modes repeat values of the image, so they are exact; so is a norm with ``center=False``, where c = 0.

    Args:
        norm: POPNorm1d/2d/3d in evaluation mode, with running statistics.
        layer: nn.Linear (on (N, C)) or nn.Conv1d/2d/3d of the norm's rank and as many input channels.

    Returns:
        A copy of ``layer`` with other weights, computed in float64 and rounded once; it has a bias where b' needs one.

    Raises:
        TypeError: ``norm`` or ``layer`` is of another kind (a subclass of the layers may have another forward), or the
            layer's weight or bias is computed, as by parametrizations and pruning.
        ValueError: the norm is in training mode or has no running statistics, channels differ, or the layer pads with
            zeros and c is not 0.
    """
    if not isinstance(norm, _POPNorm):
        raise TypeError(f"norm: expected POPNorm1d, POPNorm2d or POPNorm3d, got {type(norm).__name__}")
    kinds = [kind for kind, pop in POP_NORM_OF.items() if isinstance(norm, pop)]
    if type(layer) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"layer: expected {expected} behind {type(norm).__name__}, got {type(layer).__name__}")
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise TypeError(f"layer: expected its weight and bias to be parameters, got computed ones in {layer}")
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected one in evaluation mode with running statistics, got one that uses the batch's")
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if channels != norm.num_features:
        raise ValueError(f"layer: expected {norm.num_features} input channels as in the norm, got {channels}")
    try:
        exact = fold_in_front(in_float64(layer), in_float64(norm))
    except ValueError as error:
        raise ValueError(f"layer: {error}") from error
    return rounded(layer, exact)


def copied(model: nn.Module, places: dict[int, Any]) -> nn.Module:
    """Return a deep copy with the values of ``places`` instead of the objects whose ids are its keys.

    Two kinds of attributes cannot be deep-copied: process groups stay the same objects, and results of autograd, such
    as the weights that torch.nn.utils.weight_norm and prune compute, are cloned without their graph.
    """
    memo: dict[int, Any] = {}
    for key, value in (item for m in model.modules() for item in (*vars(m).items(), *m._buffers.items())):
        if key == "process_group":
            memo[id(value)] = value
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for each in held:
            if isinstance(each, torch.Tensor) and not each.is_leaf:
                memo[id(each)] = each.detach().clone()
    return copy.deepcopy(model, memo | places)


def in_float64(module: Any) -> Any:
    """Return a float64 copy on the CPU, because not every device has float64."""
    return copied(module, {}).cpu().double()


def rounded(layer: Any, exact: Any) -> Any:
    """Return a copy of the layer with the exact values, rounded to its own type, in its layout and on its device."""
    folded = copy.deepcopy(layer)
    if hasattr(exact, "groups"):
        folded.groups = exact.groups
    for name, value in exact.named_parameters():
        like = getattr(layer, name)
        resized = like is None or like.shape != value.shape
        target = layer.weight.new_empty(value.shape) if resized else torch.empty_like(like)
        setattr(folded, name, nn.Parameter(target.copy_(value.detach()), value.requires_grad))
    return folded


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(k > 1 for k in layer.kernel_size)
    return any(layer.padding)
