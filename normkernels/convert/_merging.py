"""The plan of fold: which norm it merges into which layer, or why it does not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from normkernels.convert._affine import (
    BATCH_NORM_RANKS,
    MisalignedError,
    fold_behind,
    fold_in_front,
    in_float64,
    kind,
    rank_of,
    ranks,
    rounded,
)
from normkernels.convert._frozen import as_batch_norm, is_frozen
from normkernels.convert._grouped import appended, costs, widened
from normkernels.convert._network import Network, hooks
from normkernels.layers.conv_norm import ConvNorm1d, ConvNorm2d

# Methods that a call runs; an instance may have its own in place of its class's.
RUN = {"forward", "_conv_forward", "_output_padding", "_check_input_dim", "_call_impl", "_wrapped_call_impl"}


class Plan:
    """The modules that change, and the norms that stay.

    merged: the float64 module that takes a module's place. In the place of a norm, it is a 1 x 1 convolution.
    into: the layer that a norm is merged into.
    reasons: why norms stay.
    added: a line for each convolution that gets other groups, with what they cost.
    """

    def __init__(self, network: Network, observed: Mapping[nn.Module, int], grouped: str) -> None:
        self.merged: dict[nn.Module, Any] = {}
        self.into: dict[nn.Module, nn.Module] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.added: list[str] = []
        self._network = network
        self._observed = observed
        self._grouped = grouped
        self._like: dict[nn.Module, Any] = {}  # appended convolutions in the type and on the device that they get
        self._guarded: dict[nn.Module, int] = {}  # the rank that a norm is folded for, where no example has shown it

    def fill(self, norms: Collection[nn.Module], asked: Mapping[nn.Module, nn.Module]) -> None:
        """Merge what can be merged, in the order of the calls, so that behind a merged norm the next sees the layer.

        Args:
            norms: all of the model.
            asked: the layer in front of some of them, as the caller says.

        Raises:
            ValueError: what is asked for is not exact, as far as that can be known.
        """
        names = self._network.names
        for norm in dict.fromkeys([*self._network.called(norms), *asked, *norms]):
            try:
                self._merge(norm, asked.get(norm))
            except ValueError as reason:
                if norm in asked:
                    both = f"{names[asked[norm]]!r}, {names[norm]!r}"
                    raise ValueError(f"pairs: expected a layer and the norm behind it, got {both}: {reason}") from None
                self.reasons[norm] = str(reason)

    def places(self, only: nn.Module | None = None, exact: bool = False) -> dict[int, Any]:
        """Return {id of a module: the module that takes its place}.

        Args:
            only: the only layer whose norms are merged, or None for all layers.
            exact: whether the new modules are in float64, on the CPU, and not in the types of the old ones.
        """
        chosen = {norm: layer for norm, layer in self.into.items() if only is None or layer is only}
        found: dict[nn.Module, Any] = {norm: nn.Identity().eval() for norm in chosen}
        for place in {*chosen.values()}:
            new = self.merged[place]
            found[place] = new if exact else rounded(self._like.get(place, place), new)
        for norm in chosen.keys() & self._guarded.keys():
            guard = functools.partial(_check_rank, self._network.names[norm], type(norm).__name__, self._guarded[norm])
            found[norm].register_forward_pre_hook(guard, with_kwargs=True)
        return {id(module): new for module, new in found.items()}

    def _merge(self, norm: Any, asked: nn.Module | None) -> None:
        network = self._network
        if not network.sees(norm) and (asked is None or not network.calls[norm]):
            raise ValueError(network.why_not_called(norm))
        self._check_norm(norm)
        exact = as_batch_norm(in_float64(norm)) if is_frozen(norm) else in_float64(norm)
        layer, new, added = self._with_layer(norm, exact, asked)
        rank, observed = rank_of(new), self._observed.get(norm)
        if observed not in (None, rank):
            got = f"{observed}D input in example_inputs, of which {type(norm).__name__} normalizes the second dimension"
            raise ValueError(f"expected {rank}D input beside {type(new).__name__}, got {got}")
        dtype = self._like.get(layer, layer).weight.dtype
        for name, value in new.named_parameters():
            if not value.to(dtype).isfinite().all():
                raise ValueError(f"expected a merged {name} within {dtype}, got up to {value.abs().max():.3g}")
        self.merged[layer], self.into[norm] = new, layer
        self.added += added
        # A Linear takes input of any rank, a convolution one without a batch; for these the norm's channels are in
        # another dimension.
        others = {*ranks(exact)} - {rank} if isinstance(new, nn.Linear) else {*ranks(exact)} & {rank - 1}
        if observed is None and others:
            self._guarded[norm] = rank

    def _with_layer(self, norm: nn.Module, exact: Any, asked: nn.Module | None) -> tuple[nn.Module, Any, list[str]]:
        """Return the module that a norm is merged into, what becomes of it and what that costs, or raise the reason."""
        try:
            before = self._neighbor(norm, asked)
            return before, fold_behind(self._current(before), exact), []
        except ValueError as error:
            behind, reason = error, str(error)
        if asked is None:
            try:
                after = self._neighbor(norm, forward=True)
                return after, fold_in_front(self._current(after), exact), []
            except ValueError as error:
                reason += "" if str(error) == reason else f"; and to be folded into the next layer, {error}"
        if not isinstance(behind, MisalignedError):
            raise ValueError(reason)
        return self._with_other_groups(norm, exact, before, reason)

    def _with_other_groups(
        self, norm: nn.Module, exact: Any, layer: nn.Module, reason: str
    ) -> tuple[nn.Module, Any, list[str]]:
        """Do what ``_with_layer`` does, for whitening groups that reach across groups of a convolution."""
        if self._grouped == "refuse":
            raise ValueError(f'{reason}; grouped="append" or "widen" folds it at a cost')
        current, d = self._current(layer), exact.group_size
        if self._grouped == "widen":
            if isinstance(current, ConvNorm1d | ConvNorm2d):
                raise ValueError(f'{reason}; grouped="append" folds it at a cost')
            place, new = layer, fold_behind(widened(current, d), exact)
        else:
            like: Any = self._like.get(layer, layer)
            place, new = norm, appended(exact, rank_of(current)).requires_grad_(like.weight.requires_grad)
            self._like[norm] = copy.deepcopy(new).to(like.weight)
        names = self._network.names
        takes = ", ".join(f"{way} {more:,}" for way, more in costs(current, d).items())
        added = (
            f"{names[norm]} ({type(norm).__name__} with groups of {d}) behind {names[layer]} ({current}): "
            f"{self._grouped}; multiply-adds more for each position, which are as many weights: {takes}"
        )
        return place, new, [added]

    def _current(self, layer: nn.Module) -> Any:
        return self.merged.get(layer) or in_float64(layer)

    def _neighbor(self, norm: nn.Module, asked: nn.Module | None = None, forward: bool = False) -> nn.Module:
        network = self._network
        appended = {each for each, layer in self.into.items() if each is layer}
        if network.sees(norm):
            layer = network.neighbor(norm, self.into.keys() - appended, appended, forward)
            if asked not in (None, layer):
                raise ValueError(f"expected calls one behind the other, got {network.names[layer]!r} in front of it")
        else:
            assert asked is not None
            layer = asked
            if network.sees(layer) or not network.calls[layer]:
                got = "one in another forward" if network.sees(layer) else "none"
                raise ValueError(f"expected a call of {network.names[layer]!r} in front of it, got {got}")
        if layer not in appended:
            self._check_layer(layer)
        return layer

    def _check_norm(self, norm: Any) -> None:
        known = type(norm) in BATCH_NORM_RANKS or type(norm).__module__.startswith("normkernels.") or is_frozen(norm)
        if not known:
            raise ValueError(f"expected no subclass, which may compute something else, got {type(norm).__name__}")
        if norm.running_mean is None:
            raise ValueError("expected running statistics, got a norm that uses the batch's")
        self._check_unchanged(norm)
        _check_finite(norm, "")

    def _check_layer(self, layer: nn.Module) -> None:
        name = repr(self._network.names[layer])
        for key in ("weight", "bias"):
            parameter = layer._parameters.get(key, layer)  # a computed one is not in the dict
            if parameter is not None and type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"expected the {key} of {name} to be a plain parameter, got a computed one or another type"
                )
        if kind(layer) is None:
            raise ValueError(
                f"expected no subclass in {name}, which may compute something else, got {type(layer).__name__}"
            )
        self._check_unchanged(layer)
        _check_finite(layer, f" of {name}")

    def _check_unchanged(self, module: nn.Module) -> None:
        """Raise unless the module does what its class says, and is used at one place only."""
        network = self._network
        name = repr(network.names[module])
        if hooks(module):
            raise ValueError(f"expected no hooks on {name}, got {', '.join(hooks(module))}")
        if not RUN.isdisjoint(vars(module)):
            raise ValueError(f"expected the forward of its class in {name}, got another one")
        if network.calls[module] > 1:
            raise ValueError(f"expected one call of {name}, got {network.calls[module]}")
        if any(id(tensor) in network.read for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"expected no other use of the parameters of {name}, got one in the traced forward")


def _check_finite(module: nn.Module, of: str) -> None:
    for name, value in module.state_dict().items():
        if value.is_meta or not value.isfinite().all():
            got = "a meta tensor" if value.is_meta else f"{int((~value.isfinite()).sum())} that are not"
            raise ValueError(f"expected finite values in {name}{of}, got {got}")


def _check_rank(
    name: str, kind: str, rank: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse input of a rank for which the norm that was in this place normalized another dimension."""
    x = [*args, *kwargs.values()][0]
    if x.dim() != rank:
        raise ValueError(
            f"{name!r}: expected {rank}D input, for which its {kind} was folded, got {tuple(x.shape)}; fold it with "
            "example_inputs of this rank"
        )
