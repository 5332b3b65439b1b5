"""The comparisons of each suite. A comparison is measured once, all of its providers interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import nn

from bench import catalogue as cat
from bench import conv_catalogue as conv_cat
from bench.baselines import EighDBN, PlainIterNorm
from bench.timing import Measurement, Plan, Timed, clock_for, describe, interleave
from bench.vgg import NormFactory, prepare_vgg
from bench.workload import CPU, GraphCall, Inputs, Mode, Provider, Workload, prepare_layer

BATCHNORM, CONV, PLAIN, PLAIN_DBN = "BatchNorm2d", "conv3x3", "plain autograd Newton", "plain autograd DBN"
TRANSPOSED, GROUPED = "transposed IterNorm", "grouped conv1x1"
ITERNORM, DBN, VGG_ITERNORM = "IterNorm T=5", "DBN eigh", "IterNorm(64)"
CONV2D, PLAIN_CONV_NORM, CONV_NORM = "Conv2d", "plain autograd ConvNorm", "ConvNorm2d"
POP_NORM, PLAIN_POP_NORM = "POPNorm2d", "plain autograd POP-Norm"
FILTER, FFT, COPY, SPECTRUM, PADDED_FFT = "spectral_filter", "torch.fft", "copy", "kernel_spectrum", "padded FFT"


@dataclass(frozen=True)
class Settings:
    """The choices of the command line."""

    device: torch.device = CPU
    quick: bool = False
    vgg_batch: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def plan(self, budget_s: float = 12.0, rounds: int = 30) -> Plan:
        if self.quick:
            return Plan(rounds=5, min_rounds=3, warmup=1, budget_s=budget_s / 4)
        return Plan(rounds=rounds, min_rounds=7, warmup=2, budget_s=budget_s)


@dataclass(frozen=True)
class Comparison:
    """Providers that are measured against each other on one workload.

    kernel: the suite, first column of the CSV. relative_to: the providers that ratios are formed with.
    host: on a GPU, time what the host needs to queue the work, not what the device needs to do it.
    """

    kernel: str
    work: Workload
    providers: tuple[Provider, ...]
    plan: Plan
    relative_to: tuple[str, ...] = (CONV, BATCHNORM, PLAIN)
    host: bool = False

    @property
    def key(self) -> str:
        return f"{self.kernel}/{self.work.mode}/{self.work.shape_name}/{self.work.dtype_name}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(provider.name for provider in self.providers)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(provider.name for provider in self.providers if provider.ours)

    def counted_bytes(self, name: str) -> int | None:
        """Count the bytes that an ideal implementation has to move: whole-tensor passes times the bytes of x."""
        provider = self.provider(name)
        passes = provider.passes.get(self.work.mode)
        return passes * self.work.nbytes if passes else None

    def provider(self, name: str) -> Provider:
        return self.providers[self.names.index(name)]

    def preparer(self) -> Callable[[str], Timed]:
        """Return a function that builds and checks one provider by name; what they share is made once."""

        @cache
        def inputs(channels_last: bool) -> Inputs:
            return Inputs(replace(self.work, channels_last=channels_last))

        inputs(self.work.channels_last)  # whether they can be made at all concerns every provider

        def prepare(name: str) -> Timed:
            provider = self.provider(name)
            layout = self.work.channels_last if provider.channels_last is None else provider.channels_last
            call = prepare_layer(provider, inputs(layout))
            return GraphCall(call) if provider.graph else call

        return prepare

    def measure(self, on_round: Callable[[int, int], None] | None = None) -> Measurement:
        """Check every provider, then time those that passed; the failures are recorded."""
        prepare = self.preparer()
        ready: dict[str, Timed] = {}
        failures: dict[str, str] = {}
        for name in self.names:
            try:
                ready[name] = prepare(name)
            except Exception as error:  # an import error, a failed check, a missing kernel: all belong in the report
                failures[name] = describe(error)
        result = interleave(ready, self.plan, clock_for(self.work.device, self.host), on_round)
        result.failures.update(failures)
        return result


@dataclass(frozen=True)
class VggEntry:
    norm: NormFactory
    plain: NormFactory
    ours: bool


@dataclass(frozen=True)
class VggComparison(Comparison):
    """One training step of the VGG of Table A2 for several norms."""

    entries: dict[str, VggEntry] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(name for name, entry in self.entries.items() if entry.ours)

    def counted_bytes(self, name: str) -> int | None:
        return None  # a whole network: no single byte count says anything

    def preparer(self) -> Callable[[str], Timed]:
        def prepare(name: str) -> Timed:
            entry = self.entries[name]
            return prepare_vgg(name, entry.norm, entry.plain, self.work.shape[0], self.work.device)

        return prepare


def workload(settings: Settings, shape: tuple[int, ...], mode: Mode = "full") -> Workload:
    return Workload(shape, mode=mode, device=settings.device)


def table_a1(settings: Settings, modes: Sequence[Mode] = ("full", "forward")) -> list[Comparison]:
    """Return the paper's Table A1: 64 samples of 32 x 32 with d = 64 and 128 channels, one whitening group."""
    result = []
    for mode in modes:
        for d in (64, 128):
            providers = (
                cat.conv3x3(),
                cat.batch_norm(),
                *(cat.iter_norm(t, group_size=d) for t in (3, 5, 7)),
                cat.dbn(),
                cat.plain_iter_norm(group_size=d),
                cat.eigh_dbn(),
            )
            work = workload(settings, (64, d, 32, 32), mode)
            plan = settings.plan(budget_s=40, rounds=40)
            result.append(Comparison("table_a1", work, providers, plan, (CONV, BATCHNORM, PLAIN, PLAIN_DBN)))
    return result


def vgg(settings: Settings) -> list[Comparison]:
    """Return the comparison of one training step of the VGG of Table A2. The paper's batch is 256."""
    batch = settings.vgg_batch or (256 if settings.cuda else 8 if settings.quick else 32)
    entries = {
        BATCHNORM: VggEntry(nn.BatchNorm2d, nn.BatchNorm2d, False),
        VGG_ITERNORM: VggEntry(
            lambda c: cat.package().IterNorm2d(c, group_size=64), lambda c: PlainIterNorm(c, 64), True
        ),
        "DBN(16)": VggEntry(lambda c: cat.package().DBN2d(c, group_size=16), lambda c: EighDBN(c, 16), True),
        "plain autograd IterNorm(64)": VggEntry(lambda c: PlainIterNorm(c, 64), lambda c: PlainIterNorm(c, 64), False),
    }
    work = workload(settings, (batch, 3, 32, 32))
    plan = settings.plan(budget_s=60, rounds=15)
    return [VggComparison("vgg_step", work, (), plan, (BATCHNORM, VGG_ITERNORM), entries=entries)]


def scaling(settings: Settings) -> list[Comparison]:
    """Return cost against width, iterations, samples, group size, shape, layout and type, one thing at a time."""
    return [
        *_scaling_d(settings),
        *_scaling_t(settings),
        *_scaling_m(settings),
        *_scaling_groups(settings),
        *_shapes(settings),
        *_layouts(settings),
        *_types(settings),
    ]


def _scaling_d(settings: Settings) -> list[Comparison]:
    """Return comparisons of C = d channels in one group.

    The largest one is only for a GPU, as its convolution takes seconds on a CPU.
    """
    result = []
    for d in (16, 32, 64, 128, 256, 512) if settings.cuda else (16, 32, 64, 128, 256):
        providers = (
            cat.iter_norm(group_size=d),
            cat.dbn(),
            cat.plain_iter_norm(group_size=d),
            cat.batch_norm(),
            cat.conv3x3(),
        )
        work = workload(settings, (64, d, 16, 16))
        result.append(Comparison("scaling_d", work, providers, settings.plan()))
    return result


def _scaling_t(settings: Settings) -> list[Comparison]:
    providers = (*(cat.iter_norm(t) for t in (1, 3, 5, 7, 9)), cat.batch_norm())
    return [Comparison("scaling_T", workload(settings, (64, 64, 32, 32)), providers, settings.plan(), (BATCHNORM,))]


def _scaling_m(settings: Settings) -> list[Comparison]:
    """Return comparisons from 1024 samples per channel, where the d x d part counts, to where only the passes do."""
    providers = (cat.iter_norm(), cat.plain_iter_norm(), cat.batch_norm())
    sizes = (1, 4, 16, 64, 256)
    return [
        Comparison("scaling_m", workload(settings, (n, 64, 32, 32)), providers, settings.plan(), (BATCHNORM, PLAIN))
        for n in sizes
    ]


def _scaling_groups(settings: Settings) -> list[Comparison]:
    sizes = (16, 32, 64, 128, 256)
    iterating = tuple(cat.iter_norm(group_size=g, name=f"IterNorm T=5 group {g}") for g in sizes)
    exact = tuple(cat.dbn(group_size=g, name=f"DBN eigh group {g}") for g in sizes)
    work = workload(settings, (64, 256, 16, 16))
    return [Comparison("scaling_group", work, (*iterating, *exact, cat.batch_norm()), settings.plan(), (BATCHNORM,))]


def _shapes(settings: Settings) -> list[Comparison]:
    """Return comparisons on the planes of an ImageNet network, with 256 samples on a GPU.

    On a CPU the first two have fewer, and there is no convolution at 7 x 7: it takes seconds there.
    """
    shapes = [(256, 64, 56, 56), (256, 256, 14, 14), (256, 512, 7, 7)]
    if not settings.cuda:
        shapes[:2] = [(32, 64, 56, 56), (64, 256, 14, 14)]
    plan = settings.plan(budget_s=20)
    result = []
    for shape in shapes:
        providers = [cat.iter_norm(), cat.plain_iter_norm(), cat.transposed_iter_norm(), cat.batch_norm()]
        if settings.cuda or shape[-1] > 7:
            providers.append(cat.conv3x3())
        relative = (CONV, BATCHNORM, PLAIN, TRANSPOSED)
        result.append(Comparison("shapes", workload(settings, shape), tuple(providers), plan, relative))
    return result


def _layouts(settings: Settings) -> list[Comparison]:
    providers = (cat.iter_norm(), cat.plain_iter_norm(), cat.batch_norm(), cat.conv3x3())
    work = workload(settings, (64, 64, 32, 32))
    layouts = [replace(work, channels_last=channels_last) for channels_last in (False, True)]
    return [Comparison("layout", item, providers, settings.plan()) for item in layouts]


def _types(settings: Settings) -> list[Comparison]:
    providers = (cat.iter_norm(), cat.plain_iter_norm(), cat.batch_norm())
    work = workload(settings, (64, 64, 32, 32))
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [
        Comparison("dtype", replace(work, dtype=dtype), providers, settings.plan(), (BATCHNORM, PLAIN))
        for dtype in types
    ]


def inference(settings: Settings) -> list[Comparison]:
    """Return comparisons of evaluation with the grouped 1x1 convolution that the layers equal, and with BatchNorm."""
    result = []
    for channels, group, channels_last in (
        (64, 64, False),
        (128, 64, False),
        (128, 16, False),
        (64, 64, True),
    ):
        layer = cat.iter_norm(group_size=group) if group > 16 else cat.dbn(group_size=16, name="DBN(16)")
        providers = (layer, cat.grouped_conv1x1(group), cat.batch_norm())
        work = replace(workload(settings, (64, channels, 32, 32), "inference"), channels_last=channels_last)
        kernel = f"inference_d{group}"
        plan = settings.plan(budget_s=8, rounds=60)
        result.append(Comparison(kernel, work, providers, plan, (GROUPED, BATCHNORM)))
    return result


def conv_norm(settings: Settings) -> list[Comparison]:
    """Return layers against convolutions, the filter against a copy, the spectrum against the padded FFT."""
    return [*_conv_norm_layers(settings), *_filters(settings), *_spectra(settings)]


def _conv_norm_layers(settings: Settings) -> list[Comparison]:
    result = []
    for shape, stride, channels_last in (
        ((32, 64, 32, 32), 1, False),
        ((32, 64, 32, 32), 2, False),
        ((32, 64, 32, 32), 1, True),
        ((16, 256, 14, 14), 1, False),
    ):
        n, c, h, w = shape
        output = (n, c, -(-h // stride), -(-w // stride))
        work = replace(workload(settings, shape), stride=stride, output=output, channels_last=channels_last)
        plan = settings.plan(budget_s=25)
        relative = (CONV2D, PLAIN_CONV_NORM)
        result.append(Comparison("conv_norm", work, conv_cat.conv_norm_layers(), plan, relative))
    return result


def _filters(settings: Settings) -> list[Comparison]:
    return [
        Comparison(
            "spectral_filter", workload(settings, (n, 64, size, size)), conv_cat.filters(), settings.plan(), (COPY, FFT)
        )
        for n, size in ((128, 16), (32, 34), (12, 58), (10, 66))
    ]


def _spectra(settings: Settings) -> list[Comparison]:
    """Return comparisons of spectra for planes of 34 x 34 and kernels of 3 x 3."""
    result = []
    for channels in (64, 128, 256, 512):
        work = replace(workload(settings, (channels, channels, 3, 3), "inference"), output=(channels, 34, 18))
        plan = settings.plan(budget_s=20, rounds=15)
        result.append(Comparison("kernel_spectrum", work, conv_cat.spectra((34, 34)), plan, (PADDED_FFT,)))
    return result


def pop_norm(settings: Settings) -> list[Comparison]:
    """Return comparisons of POP-Norm with BatchNorm, whose bytes it moves, in training and in evaluation."""
    result = []
    for shape, channels_last, mode in (
        ((64, 64, 32, 32), False, "full"),
        ((64, 64, 32, 32), True, "full"),
        ((64, 256, 14, 14), False, "full"),
        ((256, 512, 7, 7), False, "full"),
        ((64, 64, 32, 32), False, "inference"),
    ):
        work = replace(
            workload(settings, shape, "inference" if mode == "inference" else "full"), channels_last=channels_last
        )
        training = (cat.plain_pop_norm_layer(),) if mode == "full" else ()
        providers = (cat.pop_norm(), cat.batch_norm(), *training)
        result.append(Comparison("pop_norm", work, providers, settings.plan(), (BATCHNORM, PLAIN_POP_NORM)))
    return result


def memory(settings: Settings) -> list[Comparison]:
    """Return untimed comparisons of what is kept for the backward pass, and of the peak of one step."""
    providers = (
        cat.iter_norm(group_size=64),
        cat.dbn(),
        cat.plain_iter_norm(),
        cat.transposed_iter_norm(),
        cat.eigh_dbn(),
        cat.batch_norm(),
        cat.conv3x3(),
    )
    whitening = Comparison("memory", workload(settings, (64, 64, 32, 32)), providers, settings.plan(), (BATCHNORM,))
    layers = conv_cat.conv_norm_layers()[:4]
    diagonal = (cat.pop_norm(), cat.plain_pop_norm_layer(), cat.batch_norm())
    work = workload(settings, (64, 128, 32, 32))
    diagonal_norms = Comparison("memory", work, diagonal, settings.plan(), (BATCHNORM,))
    convolution = Comparison("memory", workload(settings, (32, 64, 32, 32)), layers, settings.plan(), (CONV2D,))
    spectra = [replace(comparison, kernel="memory") for comparison in _spectra(settings)]
    return [whitening, diagonal_norms, convolution, *spectra]
