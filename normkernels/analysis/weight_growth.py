"""What training does to the parameters of normalized networks (Sun et al., 2020: "New Interpretations of Normalization
Methods in Deep Learning", Figures 2 and 3)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """The L2 norm of every parameter with at least two dimensions, by its name (Figure 3).

    In float64. Shared parameters come once, under their first name, parametrized ones under that of their original.
    """
    return {
        name: torch.linalg.vector_norm(parameter, dtype=torch.float64).item()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


class BatchNormGap(NamedTuple):
    """How far a layer's gamma and beta are from what it normalizes, (C,) each."""

    gamma_gap: Tensor  # |gamma^2 - sigma^2|
    beta_gap: Tensor  # |beta - mu|


@torch.no_grad()
def batch_norm_gaps(model: nn.Module) -> dict[str, BatchNormGap]:
    r"""How far gamma and beta are from the spread and the mean that they stand for (section 2.2 and Figure 2).

    .. math:: \lvert \gamma^2 - \sigma^2 \rvert, \quad \lvert \beta - \mu \rvert

    with :math:`\sigma^2` and :math:`\mu` of the pre-activations that the layer normalizes, as its running statistics
    have them (there the variance is the unbiased one).

    Returns: {name of the layer: BatchNormGap}, for every nn.BatchNorm and nn.SyncBatchNorm with parameters and running
    statistics; others are left out.
    """
    return {
        name: BatchNormGap((layer.weight.square() - layer.running_var).abs(), (layer.bias - layer.running_mean).abs())
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.affine
        and layer.running_var is not None
        and layer.running_mean is not None
    }


Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass
class Tracker:
    """Measures of a model over the steps of its training.

        tracker = Tracker(model, {"norm": weight_norms})
        tracker.record(step)
        tracker.write_csv("norms.csv")

    Attributes:
        model: what is measured.
        measures: {name: a function from the model to {name of a value: value}}.
        rows: one dict for each value, with the keys step, measure, name and value; in the order of recording.
    """

    model: nn.Module
    measures: Mapping[str, Measure]
    rows: list[dict[str, int | str | float]] = field(default_factory=list)

    def record(self, step: int) -> None:
        """Measures the model as it is now."""
        for measure, function in self.measures.items():
            for name, value in function(self.model).items():
                self.rows.append({"step": step, "measure": measure, "name": name, "value": float(value)})

    def write_csv(self, path: str | PathLike[str]) -> None:
        """All rows, under a header line; numbers as Python writes them, so that no digit is lost."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("step", "measure", "name", "value"))
            writer.writeheader()
            writer.writerows(self.rows)
