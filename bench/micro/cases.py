"""The ops and layers of ours that are benchmarked, on a few shapes and layouts, each with its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure.workload import Inputs, LayerCall, Provider, Tensors, Workload, prepare_layer
from bench.providers import catalogue as cat
from bench.providers import conv_catalogue as conv_cat
from bench.providers.baselines import covariance, per_channel, plain_pop_norm, plain_whitening, to_groups

GROUP = 64
EPS, KAPPA = 1e-5, 4.0
SPECTRUM = (34, 34)
Function = Callable[[Tensors, Tensor], Tensor]


class Op(nn.Module):
    """An op of x; what else it takes are the module's parameters, so that their gradients are computed, too."""

    def __init__(self, function: Function, others: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in others.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(dict(self.named_parameters()), x)


def op(name: str, function: Function, reference: Function, others: Callable[[Workload], dict[str, Tensor]]) -> Provider:
    def build(work: Workload) -> nn.Module:
        return Op(function, others(work))

    return Provider(name, build, lambda layer, tensors, x: reference(tensors, x), {}, ours=True)


def ops() -> Any:
    return cat.package().ops


def nothing(work: Workload) -> dict[str, Tensor]:
    return {}


def affine(work: Workload) -> dict[str, Tensor]:
    return {"weight": torch.ones(work.channels), "bias": torch.zeros(work.channels)}


def whitening(work: Workload) -> dict[str, Tensor]:
    """Return all that whiten takes; a mean that is drawn like a bias is as good as any."""
    generator = torch.Generator().manual_seed(5)
    W = torch.eye(GROUP) + torch.randn(work.channels // GROUP, GROUP, GROUP, generator=generator) / GROUP
    return {**affine(work), "mean": torch.zeros(work.channels), "W": W}


def second(work: Workload) -> dict[str, Tensor]:
    """Return the other batch of cross_moments, in x's layout, and the mean."""
    y = torch.randn(work.shape, generator=torch.Generator().manual_seed(6))
    layout = torch.channels_last if work.channels_last else torch.contiguous_format
    return {"y": y.contiguous(memory_format=layout), "mean": torch.zeros(work.channels)}


def group_covariance(x: Tensor) -> Tensor:
    grouped = to_groups(x, GROUP)
    return covariance(grouped - grouped.mean(-1, keepdim=True), 0.0)


def products(tensors: Tensors, x: Tensor) -> Tensor:
    return to_groups(tensors["y"], GROUP) @ to_groups(x - per_channel(tensors["mean"], x), GROUP).mT


def affine_map(tensors: Tensors, x: Tensor) -> Tensor:
    mixed = tensors["W"] @ to_groups(x - per_channel(tensors["mean"], x), GROUP)
    y = mixed.reshape(x.transpose(0, 1).shape).transpose(0, 1)
    return y * per_channel(tensors["weight"], x) + per_channel(tensors["bias"], x)


MOMENTS = op("moments", lambda t, x: ops().moments(x, GROUP)[2], lambda t, x: group_covariance(x), nothing)
CROSS_MOMENTS = op("cross_moments", lambda t, x: ops().cross_moments(t["y"], x, t["mean"], GROUP)[0], products, second)
WHITEN = op("whiten", lambda t, x: ops().whiten(x, t["mean"], t["W"], t["weight"], t["bias"]), affine_map, whitening)
ITER_NORM = op(
    "iter_norm",
    lambda t, x: ops().iter_norm(x, GROUP, 5, EPS, t["weight"], t["bias"])[0],
    lambda t, x: plain_whitening(x, t["weight"], t["bias"], GROUP, 5, EPS),
    affine,
)
POP_NORM = op(
    "pop_norm",
    lambda t, x: ops().pop_norm(x, t["weight"], t["bias"], KAPPA, EPS)[0],
    lambda t, x: plain_pop_norm(x, t["weight"], t["bias"], KAPPA, EPS),
    affine,
)


class Case(NamedTuple):
    """A provider on one input; on a GPU it has `more` times as many samples."""

    provider: Provider
    work: Workload
    more: int = 32

    def __str__(self) -> str:
        return f"{self.provider.name}-{self.work.shape_name}".replace(" ", "-")

    def prepare(self, device: torch.device) -> LayerCall:
        """Return the call on a device, once its output and all gradients have been compared with float64."""
        scale = self.more if device.type == "cuda" else 1
        n, *rest = self.work.shape
        work = replace(self.work, device=device, shape=(n * scale, *rest))
        return prepare_layer(self.provider, Inputs(work))


PLANES, SMALL = Workload((8, 64, 32, 32)), Workload((32, 256, 7, 7))
LAST = replace(PLANES, channels_last=True)


def matrices(work: Workload) -> Workload:
    """Return the input of an op that reduces it to a matrix for each group."""
    return replace(work, output=(work.channels // GROUP, GROUP, GROUP))


OPS = (
    *(Case(MOMENTS, matrices(work)) for work in (PLANES, LAST)),
    *(Case(CROSS_MOMENTS, matrices(work)) for work in (PLANES, LAST)),
    *(Case(cat.roots()[0], Workload((groups, GROUP, GROUP), covariance=True), 1) for groups in (1, 8)),
    *(Case(WHITEN, work) for work in (PLANES, LAST)),
    *(Case(ITER_NORM, work) for work in (PLANES, LAST, SMALL)),
    *(Case(POP_NORM, work) for work in (PLANES, LAST, SMALL)),
    *(Case(conv_cat.spectra(SPECTRUM)[0], Workload((n, n, 3, 3), output=(n, 34, 18)), 1) for n in (32, 64)),
    *(Case(conv_cat.filters()[0], Workload((8, 64, size, size))) for size in (16, 34)),
)
LAYERS = tuple(
    Case(provider, work)
    for provider in (cat.iter_norm(group_size=GROUP, name="IterNorm2d"), cat.dbn(16, "DBN2d"), cat.pop_norm())
    for work in (PLANES, LAST)
) + tuple(Case(conv_cat.conv_norm_layers()[1], replace(work, shape=(4, 64, 32, 32))) for work in (PLANES, LAST))
