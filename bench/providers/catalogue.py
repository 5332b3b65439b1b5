"""The providers: our layers, the baselines and torch's own layers, each with its float64 reference.

normkernels is imported when a provider is built, so that a broken package shows up as failed providers and
the baselines are still measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.workload import CONV_PASSES, NORM_PASSES, Provider, Reference, Tensors, Workload, match_layout
from bench.providers.baselines import (
    EighDBN,
    PlainIterNorm,
    PlainPOPNorm,
    TransposedIterNorm,
    eigh_inverse_sqrt,
    newton_inverse_sqrt,
    per_channel,
    plain_pop_norm,
    plain_whitening,
    to_groups,
)

WHOLE_WIDTH = 1 << 30  # a group size larger than the width means one group
DBN_EPS = 1e-3
ITERNORM_EPS = 1e-5


def package() -> Any:
    return importlib.import_module("normkernels")


def parameter_dtype(work: Workload) -> torch.dtype:
    """Return the type of a norm's parameters: float32 beside 16-bit activations, as under autocast."""
    return torch.float64 if work.dtype == torch.float64 else torch.float32


def whitening_reference(group_size: int, num_iterations: int | None, eps: float) -> Reference:
    """Return the reference: in training the paper's equations, in evaluation the affine map of the layer's buffers."""

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


def pop_norm_reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    """Compute the paper's equations in training, and the same with the layer's buffers in evaluation."""
    weight, bias, kappa, eps = tensors["weight"], tensors["bias"], 4.0, 1e-5
    if layer.training:
        return plain_pop_norm(x, weight, bias, kappa, eps)
    shifted = x - per_channel(tensors["running_mean"] - bias, x)
    return shifted * per_channel(weight / (kappa * (tensors["running_var"] + bias.square() + eps).sqrt()), x)


def pop_norm() -> Provider:
    def build(work: Workload) -> nn.Module:
        layer: nn.Module = package().POPNorm2d(work.channels, device=work.device, dtype=parameter_dtype(work))
        return layer

    return Provider("POPNorm2d", build, pop_norm_reference, NORM_PASSES, ours=True)


def plain_pop_norm_layer() -> Provider:
    def build(work: Workload) -> nn.Module:
        return PlainPOPNorm(work.channels, device=work.device, dtype=parameter_dtype(work))

    return Provider("plain autograd POP-Norm", build, pop_norm_reference, NORM_PASSES)


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
    """Return a grouped 1x1 convolution with bias, one d x d matrix per group, as a whitening layer is in inference."""

    def build(work: Workload) -> nn.Module:
        c = work.channels
        layer = nn.Conv2d(c, c, 1, groups=c // min(group_size, c), device=work.device, dtype=work.dtype)
        return match_layout(layer, work)

    def reference(layer: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
        groups = x.shape[1] // tensors["weight"].shape[1]
        return F.conv2d(x, tensors["weight"], tensors["bias"], groups=groups)

    return Provider("grouped conv1x1", build, reference, CONV_PASSES, check_samples=2, tf32=True)


# --- for a GPU ----------------------------------------------------------------------------------------------------


class _Passes(torch.autograd.Function):
    """y = x, with the eight passes of a norm over whole tensors: one copy forward, three backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        scratch = ctx.saved_tensors[0].clone()
        scratch.copy_(dy)
        return dy.clone()


class Floor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Passes.apply(x)
        return y


def byte_floor() -> Provider:
    """Return copies of the bytes that a norm has to move: their GB/s are the bandwidth of the device."""
    passes = {"full": NORM_PASSES["full"]}
    return Provider("byte floor", lambda work: Floor(), lambda layer, tensors, x: x.clone(), passes)


def compiled_plain_iter_norm(group_size: int = 64) -> Provider:
    """Return the plain path as torch.compile makes it for this very shape."""
    provider = plain_iter_norm(group_size=group_size, name="torch.compile plain")

    def build(work: Workload) -> nn.Module:
        torch.compiler.reset()  # otherwise Dynamo takes the shapes of the comparison before into account
        layer = provider.build(work)
        layer.compile(dynamic=False)
        return layer

    return replace(provider, build=build)


def backends(device: torch.device) -> tuple[str, ...]:
    """Return the backends that can run here: on a CPU only eager, because Triton's interpreter is for tests."""
    try:
        library = importlib.import_module("normkernels.dispatch.choose")
    except ImportError:
        return ()
    if device.type != "cuda":
        return ("eager",)
    return tuple(name for name in library.BACKENDS if library.availability(name)[0])


def on_backend(provider: Provider, backend: str) -> Provider:
    """Return the provider on one backend. It does not count as ours: a user gets the automatic choice."""
    return replace(
        provider, name=f"{provider.name} ({backend})", ours=False, context=lambda: package().use_backend(backend)
    )


def as_channels_last(provider: Provider) -> Provider:
    return replace(provider, name=f"{provider.name} channels_last", channels_last=True)


def as_graph(provider: Provider) -> Provider:
    return replace(provider, name=f"{provider.name} (graph)", graph=True)


@contextmanager
def own_tf32() -> Iterator[None]:
    """Set both switches that the package asks for before it uses TF32."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with importlib.import_module("normkernels.triton.support").use_tf32():
            yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def exact_convolutions() -> Iterator[None]:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def in_tf32(provider: Provider) -> Provider:
    """Return a layer of ours in the opt-in TF32 mode. It does not count as ours: a user gets the exact one."""
    return replace(provider, name=f"{provider.name} (TF32)", ours=False, tf32=True, context=own_tf32)


def without_tf32(provider: Provider) -> Provider:
    """Return a convolution in full float32, which is not the default."""
    return replace(provider, name=f"{provider.name} (no TF32)", context=exact_convolutions)


class RootOfCovariance(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, cov: Tensor) -> Tensor:
        return self.function(cov)


def roots() -> tuple[Provider, ...]:
    """Return three ways to the small matrix function alone, of covariances (G, d, d).

    They are ours, the plain recursion, and torch.linalg.eigh.
    """

    def ours(cov: Tensor) -> Tensor:
        w: Tensor = package().ops.inverse_sqrt(cov, 5, ITERNORM_EPS)
        return w

    def shifted(cov: Tensor) -> Tensor:
        return (cov + cov.mT) / 2 + ITERNORM_EPS * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)

    def newton(cov: Tensor) -> Tensor:
        return newton_inverse_sqrt(shifted(cov), 5)

    def eigh(cov: Tensor) -> Tensor:
        return eigh_inverse_sqrt(shifted(cov))

    def provider(name: str, function: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> Provider:
        return Provider(
            name,
            lambda work: RootOfCovariance(function),
            lambda layer, tensors, cov: reference(cov),
            {},
            ours=function is ours,
        )

    return (
        provider("inverse_sqrt", ours, newton),
        provider("plain autograd Newton", newton, newton),
        provider("torch.linalg.eigh", eigh, eigh),
    )
