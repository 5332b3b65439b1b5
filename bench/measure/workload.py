"""Inputs, the correctness check and the timed call of one normalization or convolution layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bench.measure.environment import cache_bytes, convolutions_in_tf32
from bench.measure.timing import Timed, poison, require_alive

Mode = Literal["forward", "backward", "full", "inference"]
Tensors = Mapping[str, Tensor]
Build = Callable[["Workload"], nn.Module]
Reference = Callable[[nn.Module, Tensors, Tensor], Tensor]  # (layer, its tensors in float64, x in float64) -> y

CPU = torch.device("cpu")
MAX_INPUT_SETS = 4
CACHE_MULTIPLE = 2  # the sets together are this many times the last-level cache

# Largest accepted |got - expected| / |expected| (Frobenius) against float64 on the same input. The float32
# figure leaves room for the accumulation over m = 2^16 samples and for the d x d iteration; the 16-bit ones
# are one rounding of the output and of the gradient (half of 2^-10 and 2^-7) with the same room; float64 is
# float64's own error times d m.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
TF32_TOLERANCE = 3e-3  # 10 mantissa bits, used for convolutions where cuDNN may take TF32


class GateError(AssertionError):
    """A provider disagrees with its float64 reference; it is not timed."""


@dataclass(frozen=True)
class Workload:
    """One input: shape (N, C, H, W), type, memory layout, and which part of the step is timed.

    stride: of layers that have one. output: shape of y where it is not x's.
    covariance: x is not activations but a covariance matrix for each group, (G, d, d).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    mode: Mode = "full"
    channels_last: bool = False
    device: torch.device = CPU
    stride: int = 1
    output: tuple[int, ...] | None = None
    covariance: bool = False

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape if self.output is None else self.output

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape_name(self) -> str:
        name = "x".join(map(str, self.shape))
        name += f" stride {self.stride}" if self.stride > 1 else ""
        return f"{name} channels_last" if self.channels_last else name


@dataclass(frozen=True)
class Provider:
    """One thing to measure.

    passes: how often each mode must read or write a whole activation, counted for an ideal implementation;
    the bytes and GB/s of the report are this number times the bytes of x.
    check_samples: check the first so many samples only (for layers that treat samples one by one).
    channels_last: the memory layout that it runs in, where that is not the comparison's.
    context: it is checked and timed inside of this, such as a choice of the backend.
    graph: on a GPU, time replays of its CUDA graph.
    """

    name: str
    build: Build
    reference: Reference
    passes: Mapping[str, int]
    ours: bool = False
    check_samples: int | None = None
    tf32: bool = False
    channels_last: bool | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    graph: bool = False


# BatchNorm and IterNorm alike. forward: x for the statistics, x and y for the affine map; backward: dy and x
# for the sums, dy, x and dx for the map.
NORM_PASSES = {"forward": 3, "backward": 5, "full": 8, "inference": 2}
# forward: x, y; backward: dy and dx for the input, x and dy for the weight (the weight itself is small).
CONV_PASSES = {"forward": 2, "backward": 4, "full": 6, "inference": 2}


def make_input(work: Workload, seed: int) -> Tensor:
    """Draw samples with correlated channels, unequal variances and a mean, as a layer sees them; never zeros."""
    if work.covariance:
        z = torch.randn(*work.shape[:2], 2 * work.channels, generator=torch.Generator().manual_seed(seed))
        return (z @ z.mT / z.shape[2]).to(work.device, work.dtype)
    generator = torch.Generator().manual_seed(seed)
    c = work.channels
    mix = torch.eye(c) + torch.randn(c, c, generator=generator) * (0.3 / math.sqrt(c))
    mix = mix * (0.5 + torch.rand(c, 1, generator=generator))
    mean = torch.randn(c, generator=generator)
    # the large tensor is drawn where it is used: drawing 50 million values on the host takes longer than the
    # benchmark
    large = torch.Generator(work.device).manual_seed(seed)
    z = torch.randn(work.shape, generator=large, device=work.device)
    flat = z.flatten(2)
    x = torch.matmul(mix.to(work.device), flat).add_(mean.to(work.device)[:, None]).view(work.shape)
    return lay_out(x, work)


def match_layout(layer: nn.Module, work: Workload) -> nn.Module:
    """Move a layer's weight to the layout of the input, as convolutions want it."""
    return layer.to(memory_format=torch.channels_last) if work.channels_last else layer  # type: ignore[call-overload]


def make_gradient(work: Workload, seed: int) -> Tensor:
    generator = torch.Generator(work.device).manual_seed(seed + 10_000)
    return lay_out(torch.randn(work.output_shape, generator=generator, device=work.device), work)


def lay_out(x: Tensor, work: Workload) -> Tensor:
    x = x.to(work.dtype)
    return x.contiguous(memory_format=torch.channels_last) if work.channels_last and x.dim() == 4 else x.contiguous()


@dataclass
class InputSet:
    x: Tensor
    dy: Tensor


class Inputs:
    """Several input sets of one workload, made once and shared by its providers."""

    def __init__(self, work: Workload, seed: int = 0) -> None:
        wanted = math.ceil(CACHE_MULTIPLE * cache_bytes(work.device) / (2 * work.nbytes))
        count = max(2, min(MAX_INPUT_SETS, wanted))
        self.work = work
        self.sets = []
        for index in range(count):
            x, dy = make_input(work, seed + index), make_gradient(work, seed + index)
            require_alive("x", x)
            require_alive("dy", dy)
            self.sets.append(InputSet(x.requires_grad_(work.mode != "inference"), dy))

    def __getitem__(self, turn: int) -> InputSet:
        return self.sets[turn % len(self.sets)]


def randomize_affine(layer: nn.Module, seed: int = 7) -> None:
    """Draw a weight away from one and a bias away from zero, so that the check sees both."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                values = 0.5 + torch.rand(parameter.shape, generator=generator)
                parameter.copy_(values.to(parameter))


def prepare_layer(provider: Provider, inputs: Inputs) -> LayerCall:
    """Build the layer, check it against float64, return its timed call; a failed check raises GateError."""
    work = inputs.work
    with provider.context():
        layer = provider.build(work).to(work.device)
        randomize_affine(layer)
        layer.train(work.mode != "inference")
        if work.mode == "inference":
            settle(layer, work)
        check_layer(provider, layer, inputs)
    return LayerCall(layer, inputs, provider.context)


def settle(layer: nn.Module, work: Workload) -> None:
    """Fill the running statistics from small batches, then switch to evaluation."""
    layer.train()
    small = replace(work, shape=(min(8, work.shape[0]), *work.shape[1:]))
    with torch.no_grad():
        for seed in range(3):
            layer(make_input(small, 100 + seed))
    layer.eval()


def double_tensors(layer: nn.Module) -> dict[str, Tensor]:
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return {name: t.detach().double() if t.is_floating_point() else t.detach().clone() for name, t in tensors.items()}


def check_layer(provider: Provider, layer: nn.Module, inputs: Inputs) -> None:
    """Compare y, dx and the parameter gradients with the float64 reference on the first input set."""
    work = inputs.work
    keep = slice(provider.check_samples)
    x, dy = inputs[0].x.detach()[keep], inputs[0].dy[keep]
    tolerance = TOLERANCE[work.dtype]
    if provider.tf32 and x.is_cuda and convolutions_in_tf32():
        tolerance = max(tolerance, TF32_TOLERANCE)
    differentiate = work.mode != "inference"
    # the parameters alone get a gradient: the running buffers of the layer belong to the check only where it
    # reads them
    tensors = double_tensors(layer)
    names = [name for name, _ in layer.named_parameters()]
    x64 = x.double().requires_grad_(differentiate)
    for name in names:
        tensors[name].requires_grad_(differentiate)

    x = x.requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        y = layer(x)
        expected = provider.reference(layer, tensors, x64)
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise GateError(f"{provider.name}: expected a new output tensor, got a view of the input")
    if y.dtype != work.dtype or y.shape != expected.shape:
        raise GateError(
            f"{provider.name}: expected {work.dtype} {tuple(expected.shape)}, got {y.dtype} {tuple(y.shape)}"
        )
    compare(provider.name, "y", y, expected, tolerance)
    if not differentiate:
        return
    parameters = [dict(layer.named_parameters())[name] for name in names]
    got = torch.autograd.grad(y, [x, *parameters], dy)
    exact = torch.autograd.grad(expected, [x64, *(tensors[name] for name in names)], dy.double())
    for name, a, b in zip(["dx", *(f"d{name}" for name in names)], got, exact, strict=True):
        compare(provider.name, name, a, b, tolerance)


def compare(provider: str, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
    if not error <= tolerance:  # NaN fails too
        raise GateError(f"{provider}: expected {what} within {tolerance:.1e} of float64, got an error of {error:.2e}")


class LayerCall(Timed):
    """The timed call of one layer: forward, backward alone, both, or inference without gradients."""

    def __init__(
        self, layer: nn.Module, inputs: Inputs, context: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.layer, self.inputs, self.mode = layer, inputs, inputs.work.mode
        self.inside = context
        self.parameters = list(layer.parameters())
        self.current = inputs[0]
        self.y: Tensor | None = None

    def context(self) -> AbstractContextManager[object]:
        return self.inside()

    def prepare(self, turn: int) -> None:
        self.current = self.inputs[turn]
        self.current.x.grad = None  # otherwise the backward pass would add to the old gradient: another pass of traffic
        for parameter in self.parameters:
            parameter.grad = None
        if self.mode == "backward":
            self.y = self.layer(self.current.x)

    def run(self) -> None:
        if self.mode == "inference":
            with torch.inference_mode():
                self.y = self.layer(self.current.x)
            return
        if self.mode != "backward":
            self.y = self.layer(self.current.x)
        if self.mode != "forward":
            assert self.y is not None
            self.y.backward(self.current.dy)

    def finish(self) -> None:
        y, dx = self.y, self.current.x.grad
        self.y = None
        self.current.x.grad = None
        assert y is not None
        require_alive("y", y)
        if self.mode in ("backward", "full"):
            assert dx is not None
            require_alive("dx", dx)
            poison(dx)
        with torch.inference_mode(self.mode == "inference"):
            poison(y)


class GraphCall(Timed):
    """Replays of a layer's call, captured as one CUDA graph for each input set: no work of the host is left in it."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with call.context():
            with torch.cuda.stream(side):  # a first call may compile and allocate, which a graph must not hold
                for turn in range(3):
                    call.prepare(turn)
                    call.run()
            torch.cuda.current_stream().wait_stream(side)
            self.call.y = None  # with it goes the autograd graph, whose nodes belong to the other stream
            self.captured = [self.capture(turn) for turn in range(len(call.inputs.sets))]
        self.current = self.captured[0]

    def capture(self, turn: int) -> tuple[torch.cuda.CUDAGraph, Tensor | None, Tensor | None]:
        """Return the graph, y and dx, which keep their places in its memory."""
        self.call.prepare(turn)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.call.run()
        y, self.call.y = self.call.y, None
        return graph, None if y is None else y.detach(), self.call.current.x.grad

    def prepare(self, turn: int) -> None:
        self.current = self.captured[turn % len(self.captured)]

    def run(self) -> None:
        self.current[0].replay()

    def finish(self) -> None:
        for name, tensor in zip(("y", "dx"), self.current[1:], strict=True):
            if tensor is not None:
                require_alive(name, tensor)
                with torch.inference_mode(self.call.mode == "inference"):
                    poison(tensor)
