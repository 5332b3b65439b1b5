"""BNP's change of all of a network's gradients in one operation, against a copy of them, which moves the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.timing import Timed, require_alive
from bench.measure.workload import TOLERANCE, compare
from bench.providers import catalogue as cat

PRECONDITION, FOREACH_COPY = "precondition", "torch._foreach_copy_"
EPS1, EPS2 = 1e-2, 1e-4


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of its weights: 53 convolutions without a bias, and a linear layer with one."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, channels)]


class Layers(NamedTuple):
    """The arguments of ``precondition``, in lists."""

    weight_grads: list[Tensor]
    bias_grads: list[Tensor | None]
    means: list[Tensor]
    variances: list[Tensor]
    groups: list[int]
    q2: list[float]

    def gradients(self) -> list[Tensor]:
        return [*self.weight_grads, *(bias for bias in self.bias_grads if bias is not None)]


def make_layers(dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, ...]] | None = None) -> Layers:
    """Draw the arguments for weights of some shapes, by default ResNet-50's; those of linear layers have a bias."""
    shapes = resnet50() if shapes is None else shapes
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = [shape[1] for shape in shapes]
    return Layers(
        [drawn(*shape, dtype=dtype) for shape in shapes],
        [drawn(shape[0], dtype=dtype) if len(shape) == 2 else None for shape in shapes],
        [drawn(n) for n in inputs],
        [0.5 + drawn(n).square() for n in inputs],
        [1] * len(shapes),
        [1.0 + i / 8 for i in range(len(shapes))],
    )


def exact(layers: Layers) -> Iterator[Tensor]:
    """Yield steps 3 to 5 of Algorithms 2 and 3 (BNP) in float64: the weights' gradients, then those of the biases."""
    biases = []
    for Gw, Gb, mean, var, _, q2 in zip(*layers, strict=True):
        taps = (1,) * (Gw.dim() - 2)
        mu, sigma2 = (value.double().view(-1, *taps) for value in (mean, var))
        new = Gw.double()
        if Gb is not None:
            new = new - Gb.double().view(-1, 1, *taps) * mu
        new = new / (q2 * (sigma2 + EPS1 * sigma2.max() + EPS2))
        yield new
        if Gb is not None:
            biases.append(Gb.double() / q2 - (new * mu).flatten(1).sum(1))
    yield from biases


Context = Callable[[], AbstractContextManager[object]]


class Update(Timed):
    """A timed change of gradients. Every call begins with the same ones."""

    def __init__(self, gradients: list[Tensor], function: Callable[[], object], around: Context = nullcontext) -> None:
        self.gradients, self.function, self.around = gradients, function, around
        self.originals = [gradient.clone() for gradient in gradients]

    def context(self) -> AbstractContextManager[object]:
        return self.around()

    def prepare(self, turn: int) -> None:
        torch._foreach_copy_(self.gradients, self.originals)

    def run(self) -> None:
        self.function()

    def finish(self) -> None:
        require_alive("the first gradient", self.gradients[0])


def prepare_copy(layers: Layers) -> Update:
    gradients = layers.gradients()
    scratch = [torch.empty_like(gradient) for gradient in gradients]
    return Update(gradients, lambda: torch._foreach_copy_(scratch, gradients))


def prepare_precondition(layers: Layers, around: Context = nullcontext) -> Update:
    """Return the operation once it has passed; raise GateError if it differs from float64."""
    ops: Any = cat.package().ops
    update = Update(layers.gradients(), lambda: ops.precondition(*layers, EPS1, EPS2), around)
    expected = list(exact(layers))
    with around():
        update.run()
    for gradient, reference in zip(update.gradients, expected, strict=True):
        compare(PRECONDITION, "a gradient", gradient, reference, TOLERANCE[gradient.dtype])
    return update


@dataclass(frozen=True)
class GradientsComparison(Comparison):
    """Operations on gradients; entries: name -> the context that the operation is called in; None: the copy."""

    entries: dict[str, Context | None] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def ours(self) -> tuple[str, ...]:
        return (PRECONDITION,)

    def counted_bytes(self, name: str) -> int | None:
        return 2 * self.work.nbytes

    def preparer(self) -> Callable[[str], Timed]:
        def prepare(name: str) -> Timed:
            layers, around = make_layers(self.work.dtype, self.work.device), self.entries[name]
            return prepare_copy(layers) if around is None else prepare_precondition(layers, around)

        return prepare


def gradients(settings: Settings) -> list[Comparison]:
    """Return the comparisons for ResNet-50's gradients, in float32 and bfloat16."""
    choices = {
        f"{PRECONDITION} ({backend})": partial(cat.package().use_backend, backend)
        for backend in cat.backends(settings.device)
    }
    entries: dict[str, Context | None] = {PRECONDITION: nullcontext, **choices, FOREACH_COPY: None}
    work = workload(settings, (sum(map(math.prod, resnet50())),), "inference")
    return [
        GradientsComparison(
            "gpu_precondition", replace(work, dtype=dtype), (), settings.plan(5, 60), (FOREACH_COPY,), entries=entries
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
