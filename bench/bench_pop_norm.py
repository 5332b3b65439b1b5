"""POP-Norm against BatchNorm."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import pop_norm
from bench.suites.run import CLOCK

SUITE = pop_norm.pop_norm


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
