"""Stand-ins for values while a network is traced, and the recording of torch's functions that get one.

torch's C++ code reads the memory of every object that ``isinstance`` calls a tensor. So nothing here only pretends to
be a tensor: the stand-in for a tensor is a tensor, without storage, and every other value has a proxy that is none.
Neither has a value, and reading it raises an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any, NoReturn

import torch
from torch.fx import Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute, TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from normkernels._torch import ScriptMethod, without_storage

VIEWS = {"T", "H", "mT", "mH", "real", "imag", "data"}  # attributes that are tensors
NUMBERS = {
    "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "item", "tolist",
    "data_ptr", "type", "get_device", "is_contiguous", "is_floating_point", "is_complex", "has_names",
}  # fmt: skip
INFOS = {"finfo", "iinfo"}  # classes of torch that never ask a mode
ON_NUMBERS = {"_operator", "math", "builtins"}  # modules whose functions return a tensor only if they get one


def _unknown(self: Any, *_: Any) -> NoReturn:
    raise TraceError(f"expected no use of the value of {self.node}, which is not known while the network is traced")


class _Attribute(Attribute):
    """A method that may be called, or a value that is no tensor."""

    __hash__ = _unknown  # a lookup with it as key would silently fail


class ValueProxy(Proxy):
    """Stand-in for a value that is no tensor: a size, a shape, a type, a device, a comparison of them."""

    __hash__ = __index__ = __int__ = __float__ = _unknown

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class TensorProxy(Proxy, torch.Tensor):  # type: ignore[misc]
    """Stand-in for a tensor, which is a tensor to Python and to C++, and records what is done with it."""

    _is_param = _is_buffer = False  # no nn.Parameter and no nn.Buffer
    __hash__, __format__ = object.__hash__, object.__format__
    __index__ = __int__ = __float__ = __complex__ = __contains__ = __array__ = __reduce_ex__ = _unknown

    def __new__(cls, node: Node, tracer: Any) -> TensorProxy:
        return without_storage(cls)

    def __init__(self, node: Node, tracer: Any) -> None:
        Proxy.__init__(self, node, tracer)

    def __getattribute__(self, name: str) -> Any:
        """Return a proxy's own attributes, or new nodes, instead of the attributes of torch.Tensor."""
        if name in VIEWS:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        own = name.startswith("__") or name in vars(TensorProxy) or name in vars(Proxy)
        if own or name in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)
        return _Attribute(self, name)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise TraceError(f"expected a call that torch.fx records, got {func} of a tensor that has no values yet")


def stand_in(node: Node, tracer: Any) -> Proxy:
    """Return what stands for the value of a node: a tensor, unless it is known to be something else."""
    node.meta["tensor"] = _is_tensor(node)
    return (TensorProxy if node.meta["tensor"] else ValueProxy)(node, tracer)


def _is_tensor(node: Node) -> bool:
    if node.op == "call_method":
        return node.target not in NUMBERS
    if node.target is getattr:
        return node.args[1] in VIEWS
    if node.op == "call_function" and getattr(node.target, "__module__", None) in ON_NUMBERS:
        return any(each.meta["tensor"] for each in node.all_input_nodes)
    return True


def _first_proxy(*arguments: Any) -> Proxy | None:
    found: list[Proxy] = []
    map_aggregate(arguments, lambda each: found.append(each) if isinstance(each, Proxy) else None)
    return found[0] if found else None


class _Recorder(TorchFunctionMode):
    """Mode that records every call of torch's functions with a proxy anywhere in the arguments: ``mask[:, :size]``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        proxy = _first_proxy(args, kwargs)
        if proxy is None:
            return func(*args, **kwargs)
        if isinstance(func, ScriptMethod):
            return proxy.tracer.create_proxy("call_method", func.name, (func.owner, *args), kwargs)
        if is_tensor_method_or_property(func):
            return proxy.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return proxy.tracer.create_proxy("call_function", func, args, kwargs)


@functools.cache
def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = _first_proxy(args, kwargs)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return call


@contextmanager
def recording() -> Iterator[None]:
    """Record the calls of torch's functions that get a proxy, for the time of a trace.

    Functions that are written in C++ read their arguments before they ask a mode, refuse some proxies, and take others
    for something else: ``torch.zeros(size, 4)`` for a shape, ``torch.iinfo(dtype)`` for the type uint8. So they are
    replaced in torch, for all threads, as torch.fx replaces methods of nn.Module.
    """
    functions = {
        name: each for name, each in vars(torch).items() if isinstance(each, BuiltinFunctionType) or name in INFOS
    }
    with _Recorder():
        try:
            vars(torch).update({name: _recorded(function) for name, function in functions.items()})
            yield
        finally:
            vars(torch).update(functions)
