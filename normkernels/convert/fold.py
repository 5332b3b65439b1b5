"""An inference copy of a network, its normalizations merged into the layers beside them."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normkernels.convert._affine import (
    BATCH_NORM_RANKS,
    LAYERS,
    NORMS,
    copied,
    fold_behind,
    fold_in_front,
    in_float64,
    rounded,
)
from normkernels.convert._graph import AFFINE_LAYERS, CALL_HOOKS, Tracer
from normkernels.ops._checks import check_flag

PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def fold(model: nn.Module, *, strict: bool = True) -> nn.Module:
    r"""A copy of a network for inference, in which normalizations cost nothing: they are merged into other layers.

    .. math:: A (W x + b - \mu) + \beta = W' x + b', \qquad W' = A W, \qquad b' = A (b - \mu) + \beta

    with A = diag(gamma) W_running, block diagonal in the whitening groups (IterNorm, section 3.3), for BatchNorm
    diag(gamma / sqrt(var + eps)). It is computed in float64 and rounded once, to the layer's own type.

    Merged are BatchNorm1d/2d/3d, SyncBatchNorm, this package's whitening layers, and POPNorm, into the Linear,
    Conv1d/2d/3d, ConvTranspose1d/2d/3d or ConvNorm1d/2d (there only if A is diagonal, and with ``affine=True``) whose
    output they normalize, Identity, Dropout and merged norms in between not counted; a norm that has no such layer into
    the Linear or Conv1d/2d/3d that reads its output, unless zero padding would count as values of it. ``nn.Identity``
    takes the norm's place, all other modules, names and types stay. A layer that had no bias gets one.

    What goes where is found with torch.fx. A module that it cannot trace, or that has hooks, is a black box to what is
    around it, and is looked into by itself; it is taken to call its children as a whole, but for Sequentials, which it
    may go through. A graph has one way through what depends on attributes of the model: fold again where they change. A
    Linear is taken to work on (N, C), a Conv1d on (N, C, L): a norm behind a Linear on (N, L, C) has L features, for
    L = C nothing tells it apart. Parameters that are read by ``parameters()`` or ``state_dict()`` are not seen.

    A ConvNorm layer itself stays: for planes of one size it is a convolution, but with a kernel as large as the plane.

    Args:
        model: a network in evaluation mode. It stays as it is.
        strict: whether it is an error if there is a norm that cannot be folded exactly. If not it stays, with one
            warning that names all of them with the reasons.

    Returns:
        The copy, equal but for rounding.

    Raises:
        TypeError: ``model`` is no module, or ``strict`` no flag.
        ValueError: the model or one of its norms is in training mode; there is nothing that can be folded; or, if
            strict, a norm cannot be: it has no running statistics or they are not finite; something else is between
            it and the layer; the layer's output is used elsewhere as well; one of the two is called several times, is
            of a subclass, has hooks, or its parameters are read elsewhere; the layer's weight is computed, as by
            parametrizations and pruning; channels do not fit, or a convolution's groups do not consist of whole
            whitening groups; the merged weights overflow the layer's type; or no call of it was found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    check_flag("strict", strict)
    norms: dict[nn.Module, str] = {
        module: name or "model" for name, module in model.named_modules() if isinstance(module, NORMS)
    }
    if not norms:
        raise ValueError("model: expected BatchNorm, IterNorm, DBN or POPNorm layers, got none")
    for module, name in ((model, "model"), *norms.items()):
        if module.training:
            raise ValueError(f"{name!r}: expected evaluation mode, as after model.eval(), got training mode")
    network = _Network(model)
    merged, reasons = _merge(network, norms)
    kept = "".join(
        f"\n  {name!r} ({type(norm).__name__}): {reasons[norm]}" for norm, name in norms.items() if norm in reasons
    )
    if kept and (strict or len(reasons) == len(norms)):
        raise ValueError(f"model: expected {'all' if strict else 'some of'} its norms to be foldable, got{kept}")
    if kept:
        warnings.warn(f"norms that are not folded and stay as they are:{kept}", stacklevel=2)
    # Whoever refers to a module, in a list of its own as well, refers in the copy to what has taken its place.
    places = {id(layer): rounded(layer, exact) for layer, exact in merged.items()}
    places |= {id(norm): nn.Identity().eval() for norm in norms if norm not in reasons}
    return copied(model, places)


def _merge(network: _Network, norms: dict[nn.Module, str]) -> tuple[dict[nn.Module, Any], dict[nn.Module, str]]:
    """The layers that change, each with what becomes of it in float64, and why norms stay that do.

    In the order of the calls: a norm that is folded lets another one behind it see the layer.
    """
    merged: dict[nn.Module, Any] = {}
    reasons: dict[nn.Module, str] = {}
    passed: set[nn.Module] = set()
    for call, norm in network.calls_of(norms):
        try:
            _check_norm(norm, network)
            layer, folded = _folded(network, call, norm, merged, passed)
            _check_range(folded, layer)
        except ValueError as reason:
            reasons[norm] = str(reason)
        else:
            merged[layer] = folded
            passed.add(norm)
    for norm in norms.keys() - passed - reasons.keys():
        reasons[norm] = network.why_not_called(norm)
    return merged, reasons


def _folded(
    network: _Network, call: Node, norm: nn.Module, merged: dict[nn.Module, Any], passed: set[nn.Module]
) -> tuple[nn.Module, Any]:
    """The layer beside a norm, and what becomes of it in float64; ValueError says why there is none."""
    exact = in_float64(norm)
    try:
        layer = network.neighbor(call, passed)
        return layer, fold_behind(merged.get(layer) or in_float64(layer), exact)
    except ValueError as behind:
        try:
            layer = network.neighbor(call, passed, forward=True)
            return layer, fold_in_front(in_float64(layer), exact)  # what is behind the layer comes later
        except ValueError as in_front:
            raise ValueError(f"{behind}; and to be folded into the next layer, {in_front}") from None


class _Network:
    """Who calls what, as graphs: the model's own, and those of the modules that are closed to it."""

    def __init__(self, model: nn.Module) -> None:
        # What forward does to modules while it is traced, as in `self.features = x`, is done to a copy.
        traced = copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        self.origin = {module: model.get_submodule(name) for name, module in traced.named_modules()}
        self.names = {module: name for name, module in model.named_modules()}
        self.closed = {module for module in traced.modules() if _hooks(module)}
        self.errors: dict[nn.Module, str] = {}
        self.module: dict[Node, nn.Module] = {}
        self.nodes: list[Node] = []
        self.read: set[int] = set()  # tensors, by their ids: with weights tied it has the name of another module
        self.unseen: list[nn.Module] = []  # called, if at all, where it cannot be traced
        self._look_into([traced])
        self.calls = Counter([*self.module.values(), *self.unseen])

    def _look_into(self, modules: Iterable[nn.Module], seen: set[nn.Module] | None = None) -> None:
        seen = set() if seen is None else seen
        for root in modules:
            if root in seen or not root._modules:
                continue
            seen.add(root)
            graph = None if self.origin[root] in self.errors else self._trace(root)
            if graph is None:
                for child in _children(root):
                    if not child._modules:
                        self.unseen.append(self.origin[child])
                    elif type(child).forward is nn.Sequential.forward and "forward" not in vars(child):
                        self.errors[self.origin[child]] = (
                            f"one whose modules {self.names[self.origin[root]] or 'model'!r}, which it cannot trace, "
                            "may call one by one; if it does not, fold it by itself"
                        )
                self._look_into(_children(root), seen)
                continue
            called = []
            for node in graph.nodes:
                self.nodes.append(node)
                if node.op == "call_module":
                    called.append(root.get_submodule(str(node.target)))
                    self.module[node] = self.origin[called[-1]]
                elif node.op == "get_attr":
                    self.read.add(id(attrgetter(str(node.target))(root)))
            self._look_into(called, seen)

    def _trace(self, root: nn.Module) -> Graph | None:
        """None if it cannot be traced, not even with those of its children closed that cannot."""
        while True:
            try:
                if "forward" in vars(root):  # the tracer takes the class's
                    raise TypeError("its forward is not that of its class")
                return self._graph(root)
            except Exception as error:  # whatever the model's code raises on a proxy
                before = len(self.closed)
                for child in _children(root):
                    if not Tracer(self.closed).is_leaf_module(child, ""):
                        self._trace(child)
                if len(self.closed) == before:
                    self.closed.add(root)
                    self.errors[self.origin[root]] = f"{type(error).__name__}: {error}"
                    return None

    def _graph(self, root: nn.Module) -> Graph:
        """Optional arguments are traced as if they were given; that must make no difference."""
        graph = Tracer(self.closed).trace(root)
        parameters = inspect.signature(type(root).forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        if defaults and _calls(graph, defaults) != _calls(Tracer(self.closed).trace(root, concrete_args=defaults), {}):
            raise TypeError(f"its forward depends on {', '.join(defaults)}, which may be left out")
        return graph

    def calls_of(self, norms: Iterable[nn.Module]) -> Iterator[tuple[Node, nn.Module]]:
        """The first call of each that is called, in order."""
        waiting = set(norms)
        for node in self.nodes:
            norm = self.module.get(node)
            if norm in waiting:
                waiting.remove(norm)
                yield node, norm

    def neighbor(self, call: Node, passed: set[nn.Module], forward: bool = False) -> nn.Module:
        """The layer from which a norm has its input, or, forward, the one to which its output goes."""
        node = call
        while True:
            if forward:
                self._check_alone(node)
                user = next(iter(node.users))
                if node.next is not user:  # the norm's input, which the layer is to read then, may change in place
                    raise ValueError(f"expected nothing between it and its user, got {self._described(node.next)}")
                node = user
            else:
                node = node.all_input_nodes[0]
            module = self.module.get(node)
            if not (isinstance(module, AFFINE_LAYERS) or module in passed or _passes(module)):
                where = "behind" if forward else "in front of"
                raise ValueError(f"expected a convolution or linear layer {where} it, got {self._described(node)}")
            if not forward:
                self._check_alone(node)
            if isinstance(module, AFFINE_LAYERS):
                _check_layer(module, self)
                return module

    def _check_alone(self, node: Node) -> None:
        if len(node.users) != 1:
            users = ", ".join(self._described(user) for user in node.users) or "nobody"
            raise ValueError(f"expected one user of the output of {self._described(node)}, got {users}")

    def _described(self, node: Node) -> str:
        module = self.module.get(node)
        if module is not None:
            return f"{self.names[module]!r} ({type(module).__name__})"
        if node.op in ("placeholder", "output"):
            return f"the {'input' if node.op == 'placeholder' else 'output'} of the traced module"
        return getattr(node.target, "__name__", str(node.target))

    def why_not_called(self, norm: nn.Module) -> str:
        """The innermost module that cannot be traced has it."""
        around = [(len(self.names[m]), m) for m in self.errors if any(inner is norm for inner in m.modules())]
        if not around:
            return "expected a call of it, found none in the traced forward"
        _, module = max(around, key=lambda each: each[0])
        name = self.names[module] or "model"
        return f"expected {name!r} to have a forward that torch.fx can trace, got {self.errors[module]}"


def _check_norm(norm: Any, network: _Network) -> None:
    if type(norm) not in BATCH_NORM_RANKS and not type(norm).__module__.startswith("normkernels."):
        raise ValueError(f"expected no subclass, which may compute something else, got {type(norm).__name__}")
    if norm.running_mean is None:
        raise ValueError("expected running statistics, got a norm that uses the batch's")
    _check_unchanged(norm, network)
    _check_finite(norm, "")


def _check_finite(module: nn.Module, of: str) -> None:
    for name, value in module.state_dict().items():
        if value.is_meta or not value.isfinite().all():
            got = "a meta tensor" if value.is_meta else f"{int((~value.isfinite()).sum())} that are not"
            raise ValueError(f"expected finite values in {name}{of}, got {got}")


def _check_layer(layer: nn.Module, network: _Network) -> None:
    name = repr(network.names[layer])
    for key in ("weight", "bias"):
        parameter = layer._parameters.get(key, layer)  # its place in the dict is empty where it is computed
        if parameter is not None and type(parameter) is not nn.Parameter:
            raise ValueError(
                f"expected the {key} of {name} to be a plain parameter, got a computed one or another type"
            )
    if type(layer) not in LAYERS:
        raise ValueError(
            f"expected no subclass in {name}, which may compute something else, got {type(layer).__name__}"
        )
    _check_unchanged(layer, network)
    _check_finite(layer, f" of {name}")


def _check_unchanged(module: nn.Module, network: _Network) -> None:
    """It does what its class says, at one place."""
    name = repr(network.names[module])
    if _hooks(module):
        raise ValueError(f"expected no hooks on {name}, got {', '.join(_hooks(module))}")
    if "forward" in vars(module):
        raise ValueError(f"expected the forward of its class in {name}, got another one")
    if network.calls[module] > 1:
        raise ValueError(f"expected one call of {name}, got {network.calls[module]}")
    if any(id(tensor) in network.read for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(f"expected no other use of the parameters of {name}, got one in the traced forward")


def _check_range(folded: Any, layer: Any) -> None:
    for name, exact in folded.named_parameters():
        dtype = layer.weight.dtype
        if not exact.to(dtype).isfinite().all():
            raise ValueError(f"expected a merged {name} within {dtype}, got up to {exact.abs().max():.3g}")


def _hooks(module: nn.Module) -> list[str]:
    return [hooks.strip("_").replace("_", " ") for hooks in CALL_HOOKS if getattr(module, hooks)]


def _passes(module: nn.Module | None) -> bool:
    """Whether its output is its input."""
    if module is None or type(module) not in PASSED or _hooks(module) or "forward" in vars(module):
        return False
    return type(module) is nn.Identity or not module.training


def _calls(graph: Graph, defaults: dict[str, Any]) -> list[Any]:
    """What is computed of what: equal for equal computations. Arguments of these names count as their values.

    But for what a trace with values adds: assertions that arguments have them.
    """
    asserted = [node for node in graph.nodes if getattr(node.target, "__name__", "").startswith("_assert")]
    checks = {*asserted, *(node for each in asserted for node in each.all_input_nodes)}
    values = {node: defaults.get(node.target, node.target) for node in graph.nodes if node.op == "placeholder"}
    calls: list[Any] = []
    for node in graph.nodes:
        if node not in values and node not in checks:
            values[node] = f"%{len(calls)}"
            calls.append((node.op, node.target, str(map_arg((node.args, node.kwargs), values.get))))
    return calls


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Those that can be called: lists and dicts of modules have no forward."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
            yield child
