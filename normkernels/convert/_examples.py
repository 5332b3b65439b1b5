"""Example inputs, with which fold compares the folded model with the original one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normkernels.convert._affine import in_float64

RELATIVE = 1e-9  # times an output's largest entry; float64 rounds to 1e-16, a wrong fold is off by its weights


class Example:
    """Inputs, and a model's outputs for them; all in float64 on the CPU.

    ranks: the number of dimensions of the input of each norm that a call reached.
    """

    def __init__(self, model: nn.Module, inputs: object, norms: Collection[nn.Module]) -> None:
        self.args, self.kwargs = _arguments(inputs)
        try:
            inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            parameters = inspect.signature(model.forward)
            raise ValueError(
                f"example_inputs: expected arguments of {type(model).__name__}.forward{parameters}, "
                f"got {self._described()}: {error}"
            ) from error
        self.ranks: dict[nn.Module, int] = {}
        entered: list[str] = []

        def enter(name: str, norm: nn.Module | None, module: nn.Module, args: tuple[Any, ...]) -> None:
            entered.append(name)
            if norm is not None and args:
                self.ranks[norm] = args[0].dim()

        def leave(*_: Any) -> None:
            entered.pop()

        try:
            exact = in_float64(model)
            for name, module in model.named_modules():
                norm = module if module in norms else None
                exact.get_submodule(name).register_forward_pre_hook(functools.partial(enter, name, norm))
                exact.get_submodule(name).register_forward_hook(leave)
            self._expected = self._outputs(exact)
        except Exception as error:  # whatever the model's code raises
            where = f"{entered[-1]!r} raises " if entered and entered[-1] else ""
            raise ValueError(
                f"example_inputs: expected what a float64 copy of the model takes, got {self._described()}: "
                f"{where}{type(error).__name__}: {error}"
            ) from error
        if not self._expected:
            raise ValueError("example_inputs: expected a model that gives tensors to compare, got none")

    def difference(self, exact: nn.Module) -> str | None:
        """Return how outputs of a float64 model differ from those of the original, or None if they do not."""
        got = self._outputs(exact)
        if [each.shape for each in got] != [each.shape for each in self._expected]:
            return "outputs of other shapes"
        scale = max(map(_largest, self._expected))
        for value, expected in zip(got, self._expected, strict=True):
            finite = expected.isfinite()
            if not torch.equal(finite, value.isfinite()):
                return "outputs that are not finite"
            bound = RELATIVE * max(_largest(expected), 1e-3 * scale)
            off = _largest(torch.where(finite, value - expected, 0))
            if not off <= bound:
                return f"outputs that differ by {off:.3g}, where the largest is {_largest(expected):.3g}"
        return None

    def _outputs(self, exact: nn.Module) -> list[Tensor]:
        before = torch.get_default_dtype()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_default_dtype(torch.float64)  # for tensors that the model makes
            try:
                args, kwargs = copy.deepcopy((self.args, self.kwargs))  # because the model may change them
                return list(_tensors(exact(*args, **kwargs)))
            finally:
                torch.set_default_dtype(before)

    def _described(self) -> str:
        values = [*(("", value) for value in self.args), *((f"{name}=", value) for name, value in self.kwargs.items())]
        said = [
            name + (f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value))
            for name, value in values
        ]
        return ", ".join(said) or "no arguments"


def _arguments(inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        for name in inputs:
            if not isinstance(name, str):
                raise TypeError(f"example_inputs: expected names of arguments as keys, got {name!r}")
        return (), _exact(dict(inputs))
    if isinstance(inputs, tuple):
        return _exact(inputs), {}
    raise TypeError(
        "example_inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(inputs).__name__}"
    )


def _exact(value: Any) -> Any:
    """Return the value with its tensors on the CPU, floating-point and complex ones in float64 and complex128."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        exact = torch.complex128 if value.is_complex() else torch.float64
        return value.to(exact) if value.is_floating_point() or value.is_complex() else value
    if type(value) is dict:
        return {key: _exact(each) for key, each in value.items()}
    return type(value)(map(_exact, value)) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all numbers in a model's output, as tensors in float64 or complex128."""
    if isinstance(value, Tensor):
        yield value.to(torch.complex128 if value.is_complex() else torch.float64)
    elif isinstance(value, bool | int | float):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _largest(value: Tensor) -> float:
    finite = value.abs()[value.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0
