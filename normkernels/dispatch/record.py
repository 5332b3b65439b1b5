"""Records of ops: everything that is known of an op is said once, and the package's tables are derived from it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]
_REQUIRED: Any = (
    None  # a record without the part is refused with the op's name, which Python's own error would not have
)


class Request(NamedTuple):
    """A request has what decides which backend serves a call.

    data: the tensor whose device and type count. group_size: the channels whitened together; None in ops without
    groups. plane: the size (H, W) of a filter's spectrum; None in ops without one.
    """

    data: Tensor
    group_size: int | None = None
    plane: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Op:
    """The record of an op. Functions take the arguments that the schema names, in its order, unless said otherwise.

    schema: as torch.library takes it; no argument is a string, because LibTorch's stable ABI leaks these.
    eager: the implementation in plain PyTorch, which serves every device, type and layout.
    fake: shapes, types and strides of the results.
    request: what decides which backend serves the call.
    reference: the papers' equations for float64 tensors on the CPU; returns a tuple of the results, then of the
        arguments that the op changes, None for each that no equation gives.
    tolerance: the largest error of a float32 result relative to the largest number of the reference, derived; the
        arguments are those of the op.
    samples: takes activations (N, C, *) and a group size, and yields arguments: the usual ones first, then others such
        that every option occurs. It may call other ops.
    flops: the floating-point operations of a call, those that grow fastest with the sizes; it takes shapes in place of
        tensors.
    autograd: the gradient, as a Function with setup_context; None where there is none.
    channels: for torch.vmap, the dimension of channels or groups of each tensor taken and of each returned; None where
        an op has no rule.
    onnx: what torch.onnx.export traces in place of the op; None for an op that an export may not hold.
    kernels: the Triton kernels that it launches, as the table of configurations names them. With any, triton.py beside
        the module of ``eager`` has a function of the op's name.

    Raises ValueError, with the op's name and the part, where a part is missing or contradicts another.
    """

    schema: str
    eager: Function = _REQUIRED
    fake: Function = _REQUIRED
    request: Function = _REQUIRED
    reference: Function = _REQUIRED
    tolerance: Function = _REQUIRED
    samples: Callable[[Tensor, int], Iterable[tuple[Any, ...]]] = _REQUIRED
    flops: Function = _REQUIRED
    autograd: type[torch.autograd.Function] | None = None
    channels: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    onnx: Function | None = None
    kernels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z_]\w*\(.*\) -> .+", self.schema):
            raise ValueError(f"schema: expected name(Type argument, ...) -> Type, got {self.schema!r}")
        arguments, results = self.arguments, self.results
        if any(type.startswith("str") for type, _ in arguments):
            self._refuse("schema", "arguments that are no strings", self.schema)
        for field in fields(self):  # their types are strings, as every annotation here
            value = getattr(self, field.name)
            if field.type == "Function" or (field.type == "Function | None" and value is not None):
                self._check_arguments(field.name, value)
        if not callable(self.samples):
            self._refuse("samples", "a function of activations and a group size", self.samples)
        if self.autograd is not None:
            self._check_arguments("autograd", self.autograd.forward)
        if any(self.changes) and (self.autograd is not None or self.channels is not None):
            self._refuse("schema", "no changed arguments in an op with autograd or channels", self.schema)
        if self.channels is not None:
            tensors = sum(type.startswith("Tensor") for type, _ in arguments)
            if tuple(map(len, self.channels)) != (tensors, len(results)):
                expected = f"dimensions of {tensors} tensors taken and {len(results)} returned"
                self._refuse("channels", expected, self.channels)
        if self.kernels and importlib.util.find_spec(self.triton_module) is None:
            self._refuse("kernels", f"none without {self.triton_module}", self.kernels)

    @functools.cached_property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """The arguments' types and names, as the schema has them."""
        inside = self.schema.partition("(")[2].rpartition(") ->")[0]
        return [(type, name) for type, _, name in (each.rpartition(" ") for each in inside.split(", "))]

    @property
    def changes(self) -> list[bool]:
        """Whether the op changes each of its arguments."""
        return ["!" in type for type, _ in self.arguments]

    @property
    def results(self) -> list[str]:
        """The types of the results."""
        return self.schema.rpartition(" -> ")[2].strip("()").split(", ")

    @functools.cached_property
    def raw(self) -> Any:
        """The op in PyTorch's dispatcher."""
        return getattr(torch.ops.normkernels, self.name).default

    @property
    def primitive(self) -> str:
        """The folder of the op."""
        return self.eager.__module__.split(".")[-2]

    @property
    def triton_module(self) -> str:
        return f"{self.eager.__module__.rpartition('.')[0]}.triton"

    def _check_arguments(self, part: str, function: Any) -> None:
        """Raise unless ``function`` takes as many arguments as the schema has."""
        names = [name for _, name in self.arguments]
        if not callable(function):
            self._refuse(part, f"a function of {', '.join(names)}", function)
        try:
            inspect.signature(function).bind(*names)
        except TypeError as error:
            self._refuse(part, f"a function of {', '.join(names)}", f"{inspect.signature(function)}: {error}")

    def _refuse(self, part: str, expected: str, got: object) -> None:
        raise ValueError(f"{self.name}: {part}: expected {expected}, got {got}")


OPS: dict[str, Op] = {}

# Op -> backend -> implementation. The compiled implementations are registered by the extension and are not here.
IMPLEMENTATIONS: dict[str, dict[str, Function]] = {}
