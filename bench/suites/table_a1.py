"""Table A1 of the IterNorm paper: whitening against a 3x3 convolution of the same width."""

from __future__ import annotations

from collections.abc import Sequence

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.workload import Mode
from bench.providers import catalogue as cat
from bench.providers.names import BATCHNORM, CONV, PLAIN, PLAIN_DBN


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
