"""The comparisons that a GPU's goals are read off. In order of importance: a run may be out of time before the last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.workload import Provider
from bench.providers import catalogue as cat
from bench.providers import conv_catalogue as conv_cat
from bench.providers.names import BATCHNORM, CONV, COPY, FFT, FILTER, ITERNORM, PADDED_FFT, PLAIN, PLAIN_DBN, POP_NORM
from bench.suites.gradients import gradients

FLOOR, COMPILED, ROOT, ROOT_GRAPH = "byte floor", "torch.compile plain", "inverse_sqrt", "inverse_sqrt (graph)"
ITERNORM_CL, BATCHNORM_CL, CONV_CL = (f"{name} channels_last" for name in (ITERNORM, BATCHNORM, CONV))
FILTER_SPECTRUM, FFT_SPECTRUM = f"{FILTER} with spectrum", f"{FFT} with spectrum"
ITERNORM_TRITON, POP_NORM_CL = f"{ITERNORM} (triton)", f"{POP_NORM} channels_last"
LARGE, SMALL = (256, 64, 56, 56), (64, 64, 32, 32)

# shape, type, group size, and whether autograd of plain PyTorch and DBN are measured there, too
NORMS = (
    (LARGE, torch.float32, 64, True),
    (SMALL, torch.float32, 64, True),
    (LARGE, torch.bfloat16, 64, False),
    ((256, 512, 7, 7), torch.float32, 64, False),
    ((256, 256, 14, 14), torch.float32, 64, False),
    ((64, 128, 32, 32), torch.float32, 128, False),
    (SMALL, torch.bfloat16, 64, False),
)
PLANES = (34, 58, 30)


def gpu(settings: Settings) -> list[Comparison]:
    """Return all comparisons. On a CPU they have two samples: to try the suite, not to measure."""
    return [
        *norms(settings),
        *pop_norms(settings),
        *gradients(settings),
        *roots(settings),
        *filters(settings),
        *spectra(settings),
        *overhead(settings),
    ]


def samples(shape: tuple[int, ...], settings: Settings) -> tuple[int, ...]:
    return shape if settings.cuda else (2, *shape[1:])


def variants(providers: Iterable[Provider], ours: Provider, settings: Settings) -> tuple[Provider, ...]:
    """Return the providers, then ours on each backend, and on a GPU ours and BatchNorm as CUDA graphs."""
    providers = tuple(providers)
    graphs = [cat.as_graph(p) for p in providers if p.name in (ours.name, BATCHNORM)] if settings.cuda else []
    return (*providers, *(cat.on_backend(ours, name) for name in cat.backends(settings.device)), *graphs)


def norms(settings: Settings) -> list[Comparison]:
    result = []
    for shape, dtype, group_size, plain in NORMS:
        ours = cat.iter_norm(group_size=group_size)
        layers = (ours, cat.batch_norm(), cat.conv3x3())
        providers = [*layers, *map(cat.as_channels_last, layers), cat.byte_floor()]
        if plain:
            providers += [cat.plain_iter_norm(group_size=group_size), cat.compiled_plain_iter_norm(group_size)]
        if plain and shape == SMALL:
            providers += [cat.dbn(), cat.eigh_dbn()]
        if dtype == torch.float32 and settings.cuda:
            providers += [cat.in_tf32(ours), cat.without_tf32(layers[2])]
        work = replace(workload(settings, samples(shape, settings)), dtype=dtype)
        relative = (FLOOR, BATCHNORM, BATCHNORM_CL, CONV, CONV_CL, COMPILED, PLAIN, PLAIN_DBN)
        result.append(Comparison("gpu_norm", work, variants(providers, ours, settings), settings.plan(5, 60), relative))
    return result


def pop_norms(settings: Settings) -> list[Comparison]:
    """Return comparisons of POP-Norm with BatchNorm, whose bytes it moves."""
    result = []
    for shape, dtype in (
        (LARGE, torch.float32),
        (LARGE, torch.bfloat16),
        (SMALL, torch.float32),
        ((256, 512, 7, 7), torch.float32),
    ):
        ours = cat.pop_norm()
        layers = (ours, cat.batch_norm())
        providers = (*layers, *map(cat.as_channels_last, layers), cat.byte_floor())
        work = replace(workload(settings, samples(shape, settings)), dtype=dtype)
        plan, relative = settings.plan(4, 60), (FLOOR, BATCHNORM, BATCHNORM_CL)
        result.append(Comparison("gpu_pop_norm", work, variants(providers, ours, settings), plan, relative))
    return result


def roots(settings: Settings) -> list[Comparison]:
    """Return comparisons of Newton's iteration alone, for one group and for eight."""
    result = []
    for groups in (1, 8):
        providers = cat.roots()
        work = replace(workload(settings, (groups, 64, 64)), covariance=True)
        plan = settings.plan(3, 60)
        result.append(Comparison("gpu_newton", work, variants(providers, providers[0], settings), plan, (PLAIN,)))
    return result


def filters(settings: Settings) -> list[Comparison]:
    result = []
    for size in PLANES:
        providers = conv_cat.filters()
        everything = variants((*providers, *conv_cat.filters_with_spectrum()), providers[0], settings)
        work = workload(settings, samples((256, 64, size, size), settings))
        relative = (COPY, FFT, FFT_SPECTRUM)
        result.append(Comparison("gpu_filter", work, everything, settings.plan(5, 60), relative))
    return result


def spectra(settings: Settings) -> list[Comparison]:
    """Return comparisons of spectra for planes of 34 x 34 and kernels of 3 x 3."""
    channels = 256 if settings.cuda else 16
    providers = conv_cat.spectra((34, 34))
    work = replace(workload(settings, (channels, channels, 3, 3), "inference"), output=(channels, 34, 18))
    everything = variants(providers, providers[0], settings)
    return [Comparison("gpu_spectrum", work, everything, settings.plan(5, 40), (PADDED_FFT,))]


def overhead(settings: Settings) -> list[Comparison]:
    """Return comparisons of what a call costs the host, on data so small that the device is done sooner."""
    result = []
    for mode in ("forward", "full"):
        ours = cat.iter_norm(group_size=64)
        backends = (cat.on_backend(ours, name) for name in cat.backends(settings.device))
        work = workload(settings, (2, 64, 8, 8), mode)
        providers = (ours, cat.batch_norm(), *backends)
        plan, relative = settings.plan(3, 200), (BATCHNORM, ITERNORM_TRITON)
        result.append(Comparison("gpu_overhead", work, providers, plan, relative, host=True))
    return result
