"""POP-Norm against BatchNorm."""

from __future__ import annotations

from dataclasses import replace

from bench.measure.comparison import Comparison, Settings, workload
from bench.providers import catalogue as cat
from bench.providers.names import BATCHNORM, PLAIN_POP_NORM


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
