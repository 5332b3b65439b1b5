"""The layers that BNP preconditions: every Linear and convolution whose weight is a parameter of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from normkernels._checks import DTYPES, statistics_dtype
from normkernels.optim._batch import Batch

TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # transposed ones are no subclasses of these, nor is ConvNorm


@dataclass(eq=False)
class Layer:
    """One weight with its bias, and what is known about its input."""

    name: str
    modules: list[nn.Module]  # more than one where they share weight and bias
    mean: Tensor  # (I,), running; from the first step on views into Running
    variance: Tensor
    samples: int = 0  # N and positions of the last step with statistics; 0 before there was one
    positions: float = 0.0
    batch: Batch | None = None  # since the last step
    watched: Tensor | None = None  # the weight whose gradients set ``accumulated``
    accumulated: bool = False
    handle: RemovableHandle | None = None

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.name or "model"

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.modules[0].bias  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        return int(getattr(self.modules[0], "groups", 1))

    @property
    def q2(self) -> float:
        """max(fan_in / N, sqrt(r s)) (Algorithm 3); for a Linear on (N, in) that is Proposition 5."""
        fan_in = self.weight[0].numel()
        return max(fan_in / self.samples, self.positions**0.5)

    def gather(self, batch: Batch, weight: Tensor) -> None:
        """Add a forward pass to the ones since the last step, or since the gradients were dropped.

        A gradient that was there after a backward pass and is None now was used by nobody: GradScaler skipped the step,
        or a generator's loss went through its discriminator. Its statistics are dropped with it. Only the
        accumulation's own hook can tell that from a second call before the first backward pass.
        """
        if self.watched is not weight:
            self.unwatch()
            self.forget()
            self.watched = weight
            # Autograd holds the hook where gc does not look: if it referred to the weight, neither would ever be freed.
            layer = weakref.ref(self)
            self.handle = weight.register_post_accumulate_grad_hook(lambda _: _mark(layer()))
        if self.accumulated and weight.grad is None:
            self.forget()
        self.batch = batch if self.batch is None else self.batch.merged(batch)

    def check(self) -> None:
        """Raise unless the weights are still the modules' parameters, for the statistics' number of input channels."""
        for module in self.modules:
            _check_parameters(self.name, module)
        channels = self.weight.shape[1] * self.groups
        if channels != len(self.mean):
            raise ValueError(
                f"{self.label}: expected a weight for {len(self.mean)} input channels, as when BNP was made, got one "
                f"for {channels}; make another BNP after it is replaced"
            )

    def check_call(self, x: object, output: object) -> None:
        """Raise unless input and output are tensors that can be used: subclasses of the layers may take others."""
        for what, value in (("input", x), ("output", output)):
            if not isinstance(value, Tensor):
                got = type(value).__name__
            elif value.layout is not torch.strided or value.is_nested:
                got = "a nested one" if value.is_nested else str(value.layout)
            elif value.dtype not in DTYPES:
                got = str(value.dtype)
            else:
                continue
            raise TypeError(
                f"{self.label}: expected a strided floating-point tensor as {what}, got {got}; put the layer in skip"
            )

    def unwatch(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.watched = None

    def forget(self) -> None:
        self.batch, self.accumulated = None, False


def _mark(layer: Layer | None) -> None:
    if layer is not None:
        layer.accumulated = True


def find_layers(model: nn.Module, skip: Sequence[str | nn.Module]) -> list[Layer]:
    """Return the layers in the order of named_modules. Errors are those that BNP documents."""
    skipped = _skipped(model, skip)
    names = {module: name for name, module in model.named_modules()}
    found = {module: name for module, name in names.items() if isinstance(module, TYPES) and module not in skipped}
    for module, name in found.items():
        _check_parameters(name, module)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in names:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    layers: dict[int, Layer] = {}
    for module, name in found.items():
        weight = module.weight
        if weight.numel() == 0 or id(weight) in layers:
            continue
        bias, groups = module.bias, getattr(module, "groups", 1)
        users = owners[id(weight)] + ([] if bias is None else owners[id(bias)])
        if not all(
            owner in found and key in ("weight", "bias") and owner.weight is weight and owner.bias is bias
            and getattr(owner, "groups", 1) == groups
            for owner, key in users
        ):  # fmt: skip
            raise ValueError(
                f"{listed(dict.fromkeys(names[owner] for owner, _ in users))}: expected a weight and bias that belong "
                f"to one layer, or to layers that share both and have the same groups, got modules that share parts; "
                f"put the layers in skip"
            )
        modules = [owner for owner, _ in owners[id(weight)]]
        mean = torch.zeros(weight.shape[1] * groups, dtype=statistics_dtype(weight.dtype), device=weight.device)
        layers[id(weight)] = Layer(name, modules, mean, torch.ones_like(mean))
    if not layers:
        raise ValueError("model: expected at least one Linear, Conv1d, Conv2d or Conv3d that is not skipped, got none")
    return list(layers.values())


def _skipped(model: nn.Module, skip: Sequence[str | nn.Module]) -> set[nn.Module]:
    if not isinstance(skip, Iterable) or isinstance(skip, str | nn.Module):  # a Sequential is iterable, too
        raise TypeError(f"skip: expected a list of names or modules, got {skip!r}")
    by_name = dict(model.named_modules(remove_duplicate=False))
    modules = set(by_name.values())
    skipped: set[nn.Module] = set()
    for entry in skip:
        if not isinstance(entry, str | nn.Module):
            raise TypeError(f"skip: expected names or modules, got {entry!r}")
        module = by_name.get(entry) if isinstance(entry, str) else entry
        if module is None or module not in modules:
            layers = listed(name for name, module in by_name.items() if isinstance(module, TYPES))
            raise ValueError(f"skip: expected names or modules of the model, got {entry!r}; its layers are {layers}")
        skipped.update(module.modules())
    return skipped


def _check_parameters(name: str, module: nn.Module) -> None:
    for key in ("weight", "bias"):
        if key not in module._parameters:
            raise ValueError(
                f"{name or 'model'}: expected {key} to be a parameter of the layer, got one that is computed from "
                f"others (a parametrization, weight_norm, pruning); put the layer in skip"
            )
        parameter = module._parameters[key]
        if parameter is not None and is_lazy(parameter):
            raise ValueError(
                f"{name or 'model'}: expected an initialized layer, got {type(module).__name__}, whose {key} has no "
                f"shape before the first forward pass"
            )
        if parameter is not None and parameter.dtype not in DTYPES:
            raise ValueError(
                f"{name or 'model'}: expected {key} in float16, bfloat16, float32 or float64, got {parameter.dtype}; "
                f"put the layer in skip"
            )


def listed(names: Iterable[str]) -> str:
    """Return the names in a line for messages; the model itself has no name."""
    return ", ".join(name or "model" for name in names) or "none"
