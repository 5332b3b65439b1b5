"""Make an inference copy of a network, with its normalizations merged into the layers beside them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable

from torch import nn

from normkernels._checks import check_choice, check_flag
from normkernels.convert._affine import FOLDABLE, LAYERS, copied, in_float64, kind
from normkernels.convert._examples import Example
from normkernels.convert._frozen import is_frozen
from normkernels.convert._grouped import GROUPED
from normkernels.convert._merging import Plan
from normkernels.convert._network import Network
from normkernels.convert._pairs import named_pairs

logger = logging.getLogger("normkernels.convert")

NAME = re.compile(r"'[^'\n]*'")  # a module's name in a reason


def fold(
    model: nn.Module,
    strict: bool = True,
    *,
    example_inputs: object = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    grouped: str = "refuse",
) -> nn.Module:
    r"""Return a copy of a network for inference whose normalizations cost nothing: they are merged into other layers.

    .. math:: A (W x + b - \mu) + \beta = W' x + b', \qquad W' = A W, \qquad b' = A (b - \mu) + \beta

    with A = diag(gamma) W_running, block diagonal in the whitening groups (IterNorm, section 3.3), for BatchNorm
    diag(gamma / sqrt(var + eps)). It is computed in float64 and rounded once, to the layer's own type.

    BatchNorm1d/2d/3d, SyncBatchNorm, this package's whitening layers, POPNorm, and modules that are built like
    FrozenBatchNorm2d are merged into the Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d or ConvNorm1d/2d whose output they
    normalize (into a ConvNorm only if A is diagonal, and with ``affine=True``). Identity, Dropout and merged norms may
    be in between. A norm that has no such layer is merged into the Linear or Conv1d/2d/3d that reads its output, unless
    zero padding would count as values of that. ``nn.Identity`` takes the norm's place; all other modules, names and
    types stay. A layer that had no bias gets one. Norms are merged into a layer of a subclass only if it inherits all
    that a call runs.

    torch.fx finds which norm goes where, on every way through a forward that its optional arguments and conditions on
    shapes decide on: a norm is merged if that is exact on all of them. A module that cannot be traced, or that has
    hooks, is a black box to the modules around it, and is looked into by itself. It is taken to call its children as a
    whole, except for Sequentials: it may call their modules one by one, unless it hands on all that it is given, as
    AveragedModel does. A graph has one way through code that depends on attributes of the model: fold again where they
    change. Parameters that are read by ``parameters()`` or ``state_dict()`` are not seen.

    A norm that takes input of several ranks, as BatchNorm1d does, normalizes the second dimension. Behind a Linear on
    (N, L, C), or a Conv1d on (C, L), that is not the dimension of the features. Where ``example_inputs`` do not show
    the rank, a hook on the Identity in the norm's place raises a ValueError for any input but (N, C) behind a Linear,
    and (N, C, L) behind a Conv1d.

    A ConvNorm layer itself stays: for planes of one size it is a convolution, but with a kernel as large as the plane.

    Args:
        model: a network in evaluation mode. It stays as it is.
        strict: whether it is an error if there is a norm that cannot be folded exactly, or none at all. If not, norms
            stay, with one warning that groups them by the reasons.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments that the model takes. A copy of it
            runs on them in float64 on the CPU, and so does one with what is merged, before that is rounded; where any
            tensor or number in their outputs differs by more than 1e-9 of the largest, fold raises. They also show the
            ranks of what norms take.
        pairs: names of layers and of the norm behind each, for what torch.fx cannot trace: ``[("conv", "bn"), ...]``.
            They are folded besides all that is found. Where the calls cannot be seen a pair is believed; give
            ``example_inputs`` as well, which try it.
        grouped: what becomes of a whitening norm behind a convolution whose groups do not consist of whole whitening
            groups: "refuse"; "append", a 1 x 1 convolution with a group for each whitening group in the norm's place;
            or "widen", wider groups in the convolution, with zeros in their kernels. With d channels in a whitening
            group and c in a convolution's, "append" adds d multiply-adds for each output value and "widen"
            lcm(c, d) / c - 1 times the convolution's own: for depthwise convolutions the first is cheaper, for groups
            nearly as wide as d the second, which adds no layer. The logger ``normkernels.convert`` says at level INFO
            what each takes.

    Returns:
        The copy, equal but for rounding.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the model or one of its norms is in training mode; ``pairs`` name what is not there, not of these
            kinds, in more than one of them or not called one behind the other; the model does not take
            ``example_inputs``, or they show a difference; or, if strict, there is no norm, or one cannot be folded: it
            has no running statistics or they are not finite; something else is between it and the layer; the layer's
            output is used elsewhere as well; one of the two is called several times, is of a subclass that computes
            something else, has hooks, or its parameters are read elsewhere; the layer's weight is computed, as by
            parametrizations and pruning; channels or ranks do not fit, or a convolution's groups do not consist of
            whole whitening groups; the merged weights overflow the layer's type; or no call of it was found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    check_flag("strict", strict)
    check_choice("grouped", grouped, GROUPED)
    norms: dict[nn.Module, str] = {
        module: name or "model"
        for name, module in model.named_modules()
        if isinstance(module, FOLDABLE) or is_frozen(module)
    }
    for module, name in ((model, "model"), *norms.items()):
        if module.training:
            raise ValueError(f"{name!r}: expected evaluation mode, as after model.eval(), got training mode")
    asked = _layers_of_pairs(model, norms, pairs)
    example = None if example_inputs is None else Example(model, example_inputs, norms)
    plan = Plan(Network(model), {} if example is None else example.ranks, grouped)
    plan.fill(norms, asked)
    if plan.reasons or not norms:
        got = _by_reason(plan.reasons, norms) or " none"
        if strict:
            expected = "all its norms to be foldable" if norms else "BatchNorm, IterNorm, DBN or POPNorm layers"
            raise ValueError(f"model: expected {expected}, got{got}")
        stay = "norms that are not folded and stay as they are" if norms else "norms that could be folded"
        warnings.warn(f"{stay}:{got}", stacklevel=2)
    if example is not None:
        _compare(model, plan, norms, example)
    for line in plan.added:
        logger.info("%s", line)
    # Every reference to a module, also one in a plain list, refers in the copy to what has taken the module's place.
    return copied(model, plan.places())


def _by_reason(reasons: dict[nn.Module, str], names: dict[nn.Module, str]) -> str:
    """Return a text with each reason once, behind the norms that it holds for.

    Reasons that differ only in names of modules count as one, with all of these names.
    """
    grouped: dict[tuple[str, ...], tuple[list[str], list[list[str]]]] = {}
    for norm, name in names.items():
        if norm in reasons:
            named = NAME.findall(reasons[norm])
            norms, places = grouped.setdefault(tuple(NAME.split(reasons[norm])), ([], [[] for _ in named]))
            norms.append(f"{name!r} ({type(norm).__name__})")
            for place, each in zip(places, named, strict=True):
                place.append(each)
    lines = []
    for text, (norms, places) in grouped.items():
        said = [", ".join(dict.fromkeys(place)) for place in places]
        lines.append(f"\n  {', '.join(norms)}: " + "".join(map(str.__add__, text, [*said, ""])))
    return "".join(lines)


def _layers_of_pairs(
    model: nn.Module, norms: dict[nn.Module, str], pairs: Iterable[tuple[str, str]] | None
) -> dict[nn.Module, nn.Module]:
    """Return the layer in front of each norm of the pairs."""
    asked: dict[nn.Module, nn.Module] = {}
    for pair in named_pairs(model, () if pairs is None else pairs):
        if kind(pair.layer) is None:
            expected = ", ".join(each.__name__ for each in LAYERS)
            raise ValueError(f"{pair.layer_name!r}: expected one of {expected}, got {type(pair.layer).__name__}")
        if pair.norm not in norms:
            raise ValueError(
                f"{pair.norm_name!r}: expected BatchNorm, IterNorm, DBN, POPNorm or FrozenBatchNorm, "
                f"got {type(pair.norm).__name__}"
            )
        asked[pair.norm] = pair.layer
    return asked


def _compare(model: nn.Module, plan: Plan, names: dict[nn.Module, str], example: Example) -> None:
    """Compare in float64, and find out which norms are to blame for a difference by folding them layer by layer."""

    def difference(only: nn.Module | None) -> str | None:
        try:
            return example.difference(in_float64(copied(model, plan.places(only, exact=True))))
        except Exception as error:  # whatever the model's code raises
            return f"{type(error).__name__}: {error}"

    whole = difference(None)
    if whole is not None:
        wrong = {layer for layer in dict.fromkeys(plan.into.values()) if difference(layer) is not None}
        named = ", ".join(f"{names[norm]!r}" for norm, layer in plan.into.items() if layer in wrong or not wrong)
        raise ValueError(f"example_inputs: expected the same outputs without {named}, got {whole}")
