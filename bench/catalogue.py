"""The providers: our layers, the baselines and torch's own layers, each with its float64 reference.

normkernels is imported when a provider is built, so that a broken package shows up as failed providers and
the baselines are still measured.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import (
    EighDBN,
    PlainIterNorm,
    TransposedIterNorm,
    per_channel,
    plain_whitening,
    to_groups,
)
from bench.workload import CONV_PASSES, NORM_PASSES, Provider, Reference, Tensors, Workload, match_layout

WHOLE_WIDTH = 1 << 30  # a group size larger than the width means one group
DBN_EPS = 1e-3
ITERNORM_EPS = 1e-5


def package() -> Any:
    return importlib.import_module("normkernels")


def parameter_dtype(work: Workload) -> torch.dtype:
    """Norm parameters stay float32 beside 16-bit activations, as under autocast."""
    return torch.float64 if work.dtype == torch.float64 else torch.float32


def whitening_reference(group_size: int, num_iterations: int | None, eps: float) -> Reference:
    """Training: the paper's equations. Evaluation: the affine map written in the layer's buffers."""

    def reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
        if layer.training:
            return plain_whitening(x, tensors["weight"], tensors["bias"], group_size, num_iterations, eps)
        centred = x - per_channel(tensors["running_mean"], x)
        w = tensors["running_whitening"]
        grouped = to_groups(centred, w.shape[-1])
        y = (w @ grouped).reshape(x.transpose(0, 1).shape).transpose(0, 1)
        return y * per_channel(tensors["weight"], x) + per_channel(tensors["bias"], x)

    return reference


def batchnorm_reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    if not layer.training:
        mean, var = tensors["running_mean"], tensors["running_var"]
    else:
        dims = [i for i in range(x.dim()) if i != 1]
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
    normalized = (x - per_channel(mean, x)) / per_channel((var + 1e-5).sqrt(), x)
    return normalized * per_channel(tensors["weight"], x) + per_channel(tensors["bias"], x)


def iter_norm(num_iterations: int = 5, group_size: int = 64, name: str | None = None) -> Provider:
    def build(work: Workload) -> nn.Module:
        layer: nn.Module = package().IterNorm2d(
            work.channels,
            group_size=group_size,
            num_iterations=num_iterations,
            eps=ITERNORM_EPS,
            device=work.device,
            dtype=parameter_dtype(work),
        )
        return layer

    reference = whitening_reference(group_size, num_iterations, ITERNORM_EPS)
    return Provider(name or f"IterNorm T={num_iterations}", build, reference, NORM_PASSES, ours=True)


def dbn(group_size: int = WHOLE_WIDTH, name: str = "DBN eigh") -> Provider:
    def build(work: Workload) -> nn.Module:
        layer: nn.Module = package().DBN2d(
            work.channels, group_size=group_size, eps=DBN_EPS, device=work.device, dtype=parameter_dtype(work)
        )
        return layer

    return Provider(name, build, whitening_reference(group_size, None, DBN_EPS), NORM_PASSES, ours=True)


def plain_iter_norm(
    num_iterations: int = 5,
    group_size: int = 64,
    name: str = "plain autograd Newton",
    layer_type: type[PlainIterNorm] = PlainIterNorm,
) -> Provider:
    def build(work: Workload) -> nn.Module:
        return layer_type(
            work.channels,
            group_size,
            num_iterations,
            ITERNORM_EPS,
            device=work.device,
            dtype=parameter_dtype(work),
        )

    return Provider(name, build, whitening_reference(group_size, num_iterations, ITERNORM_EPS), NORM_PASSES)


def transposed_iter_norm(num_iterations: int = 5, group_size: int = 64) -> Provider:
    return plain_iter_norm(num_iterations, group_size, "transposed IterNorm", TransposedIterNorm)


def eigh_dbn(group_size: int = WHOLE_WIDTH, name: str = "plain autograd DBN") -> Provider:
    def build(work: Workload) -> nn.Module:
        return EighDBN(work.channels, group_size, DBN_EPS, device=work.device, dtype=parameter_dtype(work))

    return Provider(name, build, whitening_reference(group_size, None, DBN_EPS), NORM_PASSES)


def batch_norm() -> Provider:
    def build(work: Workload) -> nn.Module:
        return nn.BatchNorm2d(work.channels, device=work.device, dtype=parameter_dtype(work))

    return Provider("BatchNorm2d", build, batchnorm_reference, NORM_PASSES)


def conv3x3() -> Provider:
    def build(work: Workload) -> nn.Module:
        layer = nn.Conv2d(work.channels, work.channels, 3, padding=1, bias=False, device=work.device, dtype=work.dtype)
        return match_layout(layer, work)

    def reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
        return F.conv2d(x, tensors["weight"], padding=1)

    return Provider("conv3x3", build, reference, CONV_PASSES, check_samples=2, tf32=True)


def grouped_conv1x1(group_size: int) -> Provider:
    """What a whitening layer is in inference: one d x d matrix per group and a bias."""

    def build(work: Workload) -> nn.Module:
        c = work.channels
        layer = nn.Conv2d(c, c, 1, groups=c // min(group_size, c), device=work.device, dtype=work.dtype)
        return match_layout(layer, work)

    def reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
        groups = x.shape[1] // tensors["weight"].shape[1]
        return F.conv2d(x, tensors["weight"], tensors["bias"], groups=groups)

    return Provider("grouped conv1x1", build, reference, CONV_PASSES, check_samples=2, tf32=True)
