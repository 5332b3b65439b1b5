"""Evaluation of a ResNet-18 for CIFAR: with IterNorm, with IterNorm folded into its convolutions, and without any norm.

Folded, the norms should cost nothing. The biases that folding adds are part of that claim: the convolutions of the
network without norms have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import nn

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.timing import Timed
from bench.measure.workload import TOLERANCE, Inputs, LayerCall, Workload, compare, randomize_affine, settle
from bench.networks.resnet import resnet18
from bench.providers.catalogue import package
from bench.providers.names import VGG_ITERNORM
from bench.suites.bnp import VANILLA
from bench.suites.vgg import NormFactory

FOLDED = f"{VGG_ITERNORM} folded"
BATCH, CLASSES = 8, 10


def network(norm: NormFactory) -> nn.Module:
    """Build the network, with the same weights for every norm: norm layers draw no random numbers."""
    torch.manual_seed(0)
    model = resnet18(classes=CLASSES)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, norm(module.num_features))
    return model


def prepare(name: str, inputs: Inputs) -> LayerCall:
    """Build the network and compare its output with that in float64; folded, with that of the unfolded one.

    Raises GateError if they differ.
    """
    norm = nn.Identity if name == VANILLA else lambda c: package().IterNorm2d(c, group_size=64)
    model = network(norm)
    randomize_affine(model)
    settle(model, inputs.work)
    exact, x = copy.deepcopy(model).double(), inputs[0].x
    if name == FOLDED:
        model = package().convert.fold(model)
    with torch.no_grad():
        compare(name, "y", model(x), exact(x.double()), TOLERANCE[inputs.work.dtype])
    return LayerCall(model, inputs)


@dataclass(frozen=True)
class FoldComparison(Comparison):
    """One evaluation of the same network, in different ways."""

    entries: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        return self.entries

    @property
    def ours(self) -> tuple[str, ...]:
        return (VGG_ITERNORM, FOLDED)

    def counted_bytes(self, name: str) -> int | None:
        return None  # a whole network: no single byte count says anything

    def preparer(self) -> Callable[[str], Timed]:
        inputs = cache(Inputs)
        return lambda name: prepare(name, inputs(self.work))


def fold(settings: Settings) -> list[Comparison]:
    """Return the comparison, of few images as in use: the more there are, the more the convolutions alone count."""
    work: Workload = replace(workload(settings, (BATCH, 3, 32, 32), "inference"), output=(BATCH, CLASSES))
    plan = settings.plan(budget_s=30, rounds=60)
    return [
        FoldComparison("fold", work, (), plan, (VANILLA, VGG_ITERNORM), entries=(VANILLA, FOLDED, VGG_ITERNORM)),
    ]
