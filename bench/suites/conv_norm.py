"""ConvNorm: layers, the filter of image planes, and the spectrum of the kernels."""

from __future__ import annotations

from dataclasses import replace

from bench.measure.comparison import Comparison, Settings, workload
from bench.providers import conv_catalogue as conv_cat
from bench.providers.names import CONV2D, COPY, FFT, PADDED_FFT, PLAIN_CONV_NORM


def conv_norm(settings: Settings) -> list[Comparison]:
    """Return layers against convolutions, the filter against a copy, the spectrum against the padded FFT."""
    return [*_conv_norm_layers(settings), *_filters(settings), *spectra(settings)]


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


def spectra(settings: Settings) -> list[Comparison]:
    """Return comparisons of spectra for planes of 34 x 34 and kernels of 3 x 3."""
    result = []
    for channels in (64, 128, 256, 512):
        work = replace(workload(settings, (channels, channels, 3, 3), "inference"), output=(channels, 34, 18))
        plan = settings.plan(budget_s=20, rounds=15)
        result.append(Comparison("kernel_spectrum", work, conv_cat.spectra((34, 34)), plan, (PADDED_FFT,)))
    return result
