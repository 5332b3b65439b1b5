"""All ways through a forward: both outcomes of each decision on optional arguments and shapes of inputs."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg

from normkernels.convert._graph import Tracer

MOST = 32  # the most traces of one forward, and conditions in one of them
# Properties of a tensor that stay the same when a norm behind a layer is merged into it.
METHODS = ("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "__len__")
ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad")


class Way(NamedTuple):
    """One way through a forward.

    optional: the forward's arguments that may be left out.
    conditions: how many conditions came up.
    """

    graph: Graph
    optional: tuple[str, ...]
    conditions: int


class TooManyError(RuntimeError):
    """More ways than it would be sensible to trace, or a loop that nothing ends."""

    def __init__(self) -> None:
        super().__init__(f"expected at most {MOST} ways that arguments and shapes decide on, got more")


def ways(root: nn.Module, closed: Collection[nn.Module]) -> list[Way]:
    """Return each way through the forward of ``root``, as a graph. Errors of tracing are passed on.

    A way decides for every optional argument whether it is left out, and for every condition on such arguments and on
    shapes what it is. Ways on which the forward itself raises, as shape assertions do, compute nothing and are left
    out. Conditions on the values of tensors cannot be traced.
    """
    found: list[Way] = []
    refused: Exception | None = None
    waiting: list[dict[str, bool]] = [{}]
    for traces in range(MOST + 1):
        if not waiting:
            break
        if traces == MOST:
            raise TooManyError
        before = waiting.pop()
        tracer = _WayTracer(closed, before)
        try:
            graph = tracer.trace(root)
            found.append(Way(graph, tuple(tracer.optional), len(tracer.decisions)))
        except Exception as error:
            if not tracer.decisions or not _is_raised_by_model(error):
                raise
            refused = error
        decided = list(tracer.decisions.items())
        for i in range(len(before), len(decided)):
            key, decision = decided[i]
            waiting.append({**dict(decided[:i]), key: not decision})
    if not found and refused is not None:
        raise refused
    return found


def is_description(node: Node) -> bool:
    """Return whether a node is a tensor's shape, type or device, which say nothing about its values."""
    if node.op == "call_method":
        return node.target in METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in ATTRIBUTES


def readers(node: Node) -> Iterator[Node]:
    """Yield the users of a node's values."""
    return (user for user in node.users if not is_description(user))


def is_computed_from_descriptions(node: Node) -> bool:
    """Return whether a node reads no values of tensors, so that it may stand anywhere."""
    if is_description(node):
        return True
    computed = node.op in ("call_function", "call_method") and len(node.all_input_nodes) > 0
    return computed and all(map(is_computed_from_descriptions, node.all_input_nodes))


class _WayTracer(Tracer):
    """Tracer that decides conditions as it is told, and as true where it is told nothing.

    decisions: the decision for each condition, in the order in which they come up.
    """

    def __init__(self, closed: Collection[nn.Module], decisions: dict[str, bool]) -> None:
        super().__init__(closed)
        self.decisions = dict(decisions)
        self.optional: list[str] = []
        self._conditions = 0
        self._free: dict[Node, bool] = {}
        self._numbers: dict[str, int] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Bind parameters by their kinds. torch.fx would rewrite the code, which fails for a decorated forward."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        proxies = {
            each.name: self.create_proxy(
                "placeholder", each.name, () if each.default is each.empty else (each.default,), {}
            )
            for each in parameters
        }
        by_name = {each.name: proxies.pop(each.name) for each in parameters if each.kind is each.KEYWORD_ONLY}
        return functools.partial(root_fn, **by_name), [self.root, *proxies.values()]

    def create_proxy(self, kind: str, target: Any, args: Any, *rest: Any, **options: Any) -> Any:
        """Return a parameter's default where it is decided that the caller leaves it out, else a proxy."""
        if kind == "placeholder" and args:
            self.optional.append(target)
            if self.decisions.setdefault(_left_out(target), True):
                return args[0]
            args = ()
        return super().create_proxy(kind, target, args, *rest, **options)

    def to_bool(self, obj: Proxy) -> bool:
        if not self._is_free(obj.node):
            return super().to_bool(obj)
        self._conditions += 1
        if len(self.decisions) >= MOST or self._conditions > MOST**2:  # a loop that nothing would end
            raise TooManyError
        return self.decisions.setdefault(self._key(obj.node), True)

    def _is_free(self, node: Node) -> bool:
        """Return whether the caller decides a node's value, by arguments that may be left out and by shapes."""
        if node not in self._free:
            if node.op == "placeholder" or is_description(node):
                self._free[node] = node.target in self.optional or is_description(node)
            else:
                computed = node.op in ("call_function", "call_method") and len(node.all_input_nodes) > 0
                self._free[node] = computed and all(map(self._is_free, node.all_input_nodes))
        return self._free[node]

    def _key(self, node: Node) -> str:
        """Return a key that is the same for the same condition on the same tensors, until one of these changes."""
        if node.op == "placeholder" or not self._is_free(node):
            return f"{node.name} changed {sum(map(_changes, node.users))} times"
        said = f"{node.target}{map_arg((node.args, node.kwargs), self._key)}"
        return f"condition {self._numbers.setdefault(said, len(self._numbers))}"


def _changes(user: Node) -> bool:
    """Return whether a user may change the tensor that it reads, by its name: ``add_``, ``+=``, ``x[0] = y``."""
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = getattr(user.target, "__module__", None) == "_operator" and name.startswith(("i", "setitem"))
    return in_place or (user.op != "call_module" and name.endswith("_"))


def _left_out(argument: str) -> str:
    """Return the key, among decisions, of the condition that the caller leaves out this argument."""
    return f"{argument} is left out"


def _is_raised_by_model(error: Exception) -> bool:
    """Return whether an error comes from a raise in the model's own code, and not from what a proxy cannot do."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "normkernels"):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
