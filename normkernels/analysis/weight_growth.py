"""Measures of what training does to the parameters of normalized networks.

Sun et al., 2020: "New Interpretations of Normalization Methods in Deep Learning", Figures 2 and 3.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor, nn

from normkernels._torch import BatchNormBase
from normkernels.analysis._checks import check_callable, check_module
from normkernels.eager.devices import in_float64, with_float64


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """Return the L2 norm of every parameter with at least two dimensions, by its name (Figure 3).

    Norms are float64. Shared parameters come once, under their first name, parametrized ones under that of their
    original.

    Raises:
        TypeError: model is no module.
    """
    check_module("model", model)
    return {
        name: torch.linalg.vector_norm(with_float64(parameter), dtype=torch.float64).item()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


class BatchNormGap(NamedTuple):
    """How far a layer's gamma and beta are from what it normalizes, (C,) each."""

    gamma_gap: Tensor  # |gamma^2 - sigma^2|
    beta_gap: Tensor  # |beta - mu|


@torch.no_grad()
def batch_norm_gaps(model: nn.Module) -> dict[str, BatchNormGap]:
    r"""Return how far gamma and beta are from the spread and the mean that they stand for (section 2.2 and Figure 2).

    .. math:: \lvert \gamma^2 - \sigma^2 \rvert, \quad \lvert \beta - \mu \rvert

    with :math:`\sigma^2` and :math:`\mu` of the pre-activations that the layer normalizes, as its running statistics
    have them (there the variance is the unbiased one).

    Returns: {name of the layer: BatchNormGap}, for every nn.BatchNorm and nn.SyncBatchNorm with parameters and running
    statistics; others are left out.

    Raises:
        TypeError: model is no module.
    """
    check_module("model", model)
    return {
        name: BatchNormGap((layer.weight.square() - layer.running_var).abs(), (layer.bias - layer.running_mean).abs())
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNormBase)
        and layer.affine
        and layer.running_var is not None
        and layer.running_mean is not None
    }


Value = SupportsFloat | Tensor | tuple["Value", ...]  # tuples with names for their fields
Measure = Callable[[nn.Module], Mapping[str, Value]]


@dataclass
class Tracker:
    """Measures of a model over the steps of its training.

        tracker = Tracker(model, {"norm": weight_norms, "gap": batch_norm_gaps})
        tracker.record(step)
        tracker.write_csv("norms.csv")

    Attributes:
        model: the model that is measured.
        measures: {name: a function from the model to {name of a value: value}}. A value is a number, a tensor, of
            which the mean is recorded, or a NamedTuple of these, as that of batch_norm_gaps.
        rows: one dict for each value, with the keys step, measure, name and value (a float); in the order of recording.
            A NamedTuple has one for each field, with the name "name.field".
    """

    model: nn.Module
    measures: Mapping[str, Measure]
    rows: list[dict[str, int | str | float]] = field(default_factory=list)

    def record(self, step: int) -> None:
        """Measure the model as it is now.

        Raises:
            TypeError: a measure is no function, does not return a mapping, or has a value of another kind.
            ValueError: a tensor has no values.

        No rows are added where it raises.
        """
        rows: list[dict[str, int | str | float]] = []
        for measure, function in self.measures.items():
            check_callable(f"measures[{measure!r}]", function)
            values = function(self.model)
            if not isinstance(values, Mapping):
                raise TypeError(f"measures[{measure!r}]: expected a mapping as result, got {type(values).__name__}")
            for name, value in values.items():
                rows += [{"step": step, "measure": measure, "name": n, "value": v} for n, v in _numbers(name, value)]
        self.rows += rows

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows, under a header line; numbers as Python writes them, so that no digit is lost."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("step", "measure", "name", "value"))
            writer.writeheader()
            writer.writerows(self.rows)


def _numbers(name: str, value: Value) -> Iterator[tuple[str, float]]:
    """Yield the numbers that are recorded of a value, each with its name."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        for part, of_part in zip(value._fields, value, strict=True):
            yield from _numbers(f"{name}.{part}", of_part)
    elif isinstance(value, Tensor) and not value.is_complex():
        if not value.numel():
            raise ValueError(f"{name}: expected at least one value, got shape {tuple(value.shape)}")
        yield name, in_float64(value.detach()).mean().item()
    elif isinstance(value, SupportsFloat) and not isinstance(value, Tensor):
        yield name, float(value)
    else:
        raise TypeError(f"{name}: expected a number, a real tensor or a NamedTuple of them, got {type(value).__name__}")
