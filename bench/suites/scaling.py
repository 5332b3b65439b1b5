"""Cost against width, iterations, samples, group size, shape, layout and type."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.measure.comparison import Comparison, Settings, workload
from bench.providers import catalogue as cat
from bench.providers.names import BATCHNORM, CONV, PLAIN, TRANSPOSED


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
        result.append(Comparison("scaling_d", work, providers, settings.plan(), (CONV, BATCHNORM, PLAIN)))
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
    return [Comparison("layout", item, providers, settings.plan(), (CONV, BATCHNORM, PLAIN)) for item in layouts]


def _types(settings: Settings) -> list[Comparison]:
    providers = (cat.iter_norm(), cat.plain_iter_norm(), cat.batch_norm())
    work = workload(settings, (64, 64, 32, 32))
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [
        Comparison("dtype", replace(work, dtype=dtype), providers, settings.plan(), (BATCHNORM, PLAIN))
        for dtype in types
    ]
