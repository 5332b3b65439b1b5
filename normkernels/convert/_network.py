"""The calls in a network, and which layer stands beside a norm: fold and to_pop_norm ask for these."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from normkernels.convert._affine import copied
from normkernels.convert._frozen import is_frozen
from normkernels.convert._graph import AFFINE_LAYERS, CALL_HOOKS, WITHOUT_EFFECT, Tracer
from normkernels.convert._ways import TooManyError, Way, is_computed_from_descriptions, readers, ways


class Network:
    """The model's calls as graphs: those of its own forward, and of modules that the model's graph does not look into.

    A forward has a graph for each way through it, and what is said of a norm holds on all of them.

    names: the first name of each module.
    calls: how often a module is called, on the way that calls it most.
    read: ids of the tensors that a forward reads by itself; a tied one may have the name of another module there.
    errors: why modules cannot be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        # A copy is traced, because a forward may change its modules, as in `self.features = x`.
        traced = copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: Counter[nn.Module] = Counter()
        self.read: set[int] = set()
        self.errors: dict[nn.Module, str] = {}
        self._origin = {module: model.get_submodule(name) for name, module in traced.named_modules()}
        self._closed = {module for module in traced.modules() if hooks(module) or is_frozen(module)}
        self._module: dict[Node, nn.Module] = {}
        self._forwards: dict[nn.Module, list[Way]] = {}  # the ways through each module that is traced
        self._home: dict[nn.Module, list[Way]] = {}  # for each module, the ways through a forward that calls it
        self._model = model
        with torch.random.fork_rng(devices=[]):
            self._look_into([traced], set())

    def _look_into(self, modules: Iterable[nn.Module], seen: set[nn.Module]) -> None:
        for root in modules:
            if root in seen or not root._modules:
                continue
            seen.add(root)
            found = None if self._origin[root] in self.errors else self._trace(root)
            if found is None:
                self._look_past(root, seen)
                continue
            called: dict[nn.Module, None] = {}
            most: Counter[nn.Module] = Counter()
            for way in found:
                counted: Counter[nn.Module] = Counter()
                for node in way.graph.nodes:
                    if node.op == "call_module":
                        module = root.get_submodule(str(node.target))
                        self._module[node] = self._origin[module]
                        called[module] = None
                        counted[self._origin[module]] += 1
                    elif node.op == "get_attr":
                        self.read.add(id(attrgetter(str(node.target))(root)))
                most |= counted
            self.calls += most
            self._forwards[self._origin[root]] = found
            self._home |= dict.fromkeys(most, found)
            self._look_into(called, seen)

    def _look_past(self, root: nn.Module, seen: set[nn.Module]) -> None:
        """Look into the children of a module that cannot be traced: whether and where it calls them is not seen."""
        only = _hands_on(root)
        if only is not None:
            del self.errors[self._origin[root]]
        for child in _children(root):
            if not child._modules:
                self.calls[self._origin[child]] += 1
            elif child is not only and type(child).forward is nn.Sequential.forward and "forward" not in vars(child):
                self.errors[self._origin[child]] = (
                    f"one whose modules {self.names[self._origin[root]] or 'model'!r}, which it cannot trace, "
                    "may call one by one; if it does not, fold it by itself"
                )
        self._look_into(_children(root), seen)

    def _trace(self, root: nn.Module) -> list[Way] | None:
        """Return the ways through a module, or None if it cannot be traced.

        It is tried again with those of its children closed that cannot be traced and, where there are too many ways,
        with those closed that have more than one way.
        """
        while True:
            try:
                if "forward" in vars(root):  # the tracer would take the class's forward
                    raise TypeError("its forward is not that of its class")
                return ways(root, self._closed)
            except Exception as error:  # whatever the model's code raises on a proxy
                before = len(self._closed)
                for child in _children(root):
                    if not Tracer(self._closed).is_leaf_module(child, ""):
                        inner = self._trace(child)
                        if isinstance(error, TooManyError) and any(way.conditions for way in inner or ()):
                            self._closed.add(child)
                if len(self._closed) == before:
                    self._closed.add(root)
                    self.errors[self._origin[root]] = f"{type(error).__name__}: {error}"
                    return None

    def called(self, kinds: Collection[nn.Module]) -> Iterator[nn.Module]:
        """Yield those of these modules whose calls are seen, in the order of their first calls."""
        nodes = (node for each in self._forwards.values() for way in each for node in way.graph.nodes)
        yield from dict.fromkeys(self._module[node] for node in nodes if self._module.get(node) in kinds)

    def last_layers(self) -> list[nn.Module] | None:
        """Return the layers whose outputs come to the model's output without another layer in between, on any way.

        Modules that are not looked into, but have layers, are among them. None if the model's own forward cannot be
        traced.
        """
        if self._model not in self._forwards:
            return None
        found: dict[nn.Module, None] = {}
        for way in self._forwards[self._model]:
            waiting, seen = [node for node in way.graph.nodes if node.op == "output"], set[Node]()
            while waiting:
                node = waiting.pop()
                module = self._module.get(node)
                if module is not None and any(isinstance(each, AFFINE_LAYERS) for each in module.modules()):
                    found[module] = None
                elif node not in seen:
                    seen.add(node)
                    waiting += node.all_input_nodes
        return list(found)

    def sees(self, module: nn.Module) -> bool:
        """Return whether a forward that can be traced calls the module."""
        return module in self._home

    def neighbor(
        self,
        norm: nn.Module,
        passed: Collection[nn.Module] = (),
        layers: Collection[nn.Module] = (),
        forward: bool = False,
    ) -> nn.Module:
        """Return the layer from which a norm has its input or, if ``forward``, the one to which its output goes.

        Args:
            norm: one that is called.
            passed: modules that may be between, as Identity and Dropout in evaluation.
            layers: modules that count as layers besides convolutions and linear layers.

        Raises:
            ValueError: there is none, or none on some of the ways that call the norm or the layer.
        """
        home = self._home[norm]
        found: dict[nn.Module, None] = {}
        refused: list[str] = []
        for way in home:
            for call in self._calls_of(norm, way.graph):
                try:
                    found[self._beside(call, passed, layers, forward)] = None
                except ValueError as reason:
                    refused.append(str(reason))
        if not refused:
            layer, *others = found
            if others:
                got = " and ".join(repr(self.names[module]) for module in found)
                refused.append(f"expected one layer beside it on every way through the forward, got {got}")
            elif any(bool(self._calls_of(layer, w.graph)) != bool(self._calls_of(norm, w.graph)) for w in home):
                refused.append(
                    f"expected calls of it and {self.names[layer]!r} alike on every way through the forward, "
                    "got one of them alone"
                )
            else:
                return layer
        optional = ", ".join(home[0].optional)
        depends = f" (its forward depends on {optional}, which may be left out)" if found and optional else ""
        raise ValueError(refused[0] + depends)

    def _calls_of(self, module: nn.Module, graph: Graph) -> list[Node]:
        return [node for node in graph.nodes if self._module.get(node) is module]

    def _beside(
        self, node: Node, passed: Collection[nn.Module], layers: Collection[nn.Module], forward: bool
    ) -> nn.Module:
        """Return the layer beside one call of a norm, on one way."""
        while True:
            if forward:
                user = self._reader(node)
                between = node.next  # it may change the norm's input in place, which the layer would read after folding
                while between is not user and is_computed_from_descriptions(between):
                    between = between.next
                if between is not user:
                    raise ValueError(f"expected nothing between it and its user, got {self._described(between)}")
                node = user
            else:
                if len(node.all_input_nodes) != 1:
                    got = len(node.all_input_nodes)
                    raise ValueError(f"expected one input of {self._described(node)}, got {got}")
                node = node.all_input_nodes[0]
            module = self._module.get(node)
            is_layer = isinstance(module, AFFINE_LAYERS) or module in layers
            if not (is_layer or module in passed or _passes(module)):
                where = "behind" if forward else "in front of"
                raise ValueError(f"expected a convolution or linear layer {where} it, got {self._described(node)}")
            if not forward:
                self._reader(node)
            if module is not None and is_layer:
                return module

    def _reader(self, node: Node) -> Node:
        found = list(readers(node))
        if len(found) != 1:
            users = ", ".join(self._described(user) for user in found) or "nobody"
            raise ValueError(f"expected one user of the output of {self._described(node)}, got {users}")
        return found[0]

    def _described(self, node: Node) -> str:
        module = self._module.get(node)
        if module is not None:
            return f"{self.names[module]!r} ({type(module).__name__})"
        if node.op in ("placeholder", "output"):
            return f"the {'input' if node.op == 'placeholder' else 'output'} of the traced module"
        return getattr(node.target, "__name__", str(node.target))

    def why_not_called(self, norm: nn.Module) -> str:
        """Return why no call of a norm is seen: the error of the innermost module around it that cannot be traced."""
        around = [(len(self.names[m]), m) for m in self.errors if any(inner is norm for inner in m.modules())]
        if not around:
            return "expected a call of it, found none in the traced forward"
        _, module = max(around, key=lambda each: each[0])
        name = self.names[module] or "model"
        return (
            f"expected {name!r} to have a forward that torch.fx can trace, got {self.errors[module]}; "
            'name the layers instead, as pairs=[("conv1", "bn1"), ...]'
        )


def hooks(module: nn.Module) -> list[str]:
    """Return the kinds of hooks that a module's calls run."""
    return [kind.strip("_").replace("_", " ") for kind in CALL_HOOKS if getattr(module, kind)]


def _passes(module: nn.Module | None) -> bool:
    """Return whether a module's output is its input."""
    if module is None or type(module) not in WITHOUT_EFFECT or hooks(module) or "forward" in vars(module):
        return False
    return type(module) is nn.Identity or not module.training


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that can be called: lists and dicts of modules have no forward."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
            yield child


class _Recorder(nn.Module):
    """Module that records what it is called with, and returns a new object for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs, object()))
        return self.calls[-1][-1]


def _hands_on(root: nn.Module) -> nn.Module | None:
    """Return the child to which forward hands on all that it is given, and whose output it returns, if there is one.

    The forward is called with objects that it can only hand on. AveragedModel and other wrappers, whose arguments
    torch.fx cannot trace, do hand them on.
    """
    taken: set[nn.Module] = set()
    one, two, option = object(), object(), {"option": object()}
    for args, kwargs in (((one,), {}), ((torch.empty(0),), {}), ((one,), option), ((one, two), option)):
        try:
            inspect.signature(type(root).forward).bind(root, *args, **kwargs)
        except TypeError:  # it cannot be called with these
            continue
        shell = type(root).__new__(type(root))
        recorders = {name: _Recorder() for name in root._modules}
        shell.__dict__.update(vars(root), _modules=recorders)
        try:
            result = type(root).forward(shell, *args, **kwargs)
        except Exception:  # whatever the model's code raises on an object
            return None
        calls = [(name, call) for name, each in recorders.items() for call in each.calls]
        if len(calls) != 1:
            return None
        name, (handed, options, returned) = calls[0]
        if [*map(id, handed)] != [*map(id, args)] or options != kwargs or returned is not result:
            return None
        taken.add(root.get_submodule(name))
    return taken.pop() if len(taken) == 1 else None
