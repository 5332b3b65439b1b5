"""Evaluation: one affine map per group, against the grouped 1x1 convolution that is the same map."""

from __future__ import annotations

from dataclasses import replace

from bench.measure.comparison import Comparison, Settings, workload
from bench.providers import catalogue as cat
from bench.providers.names import BATCHNORM, GROUPED


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
