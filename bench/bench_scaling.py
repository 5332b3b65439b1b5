"""Cost against width, iterations, samples, group size, shape, layout and type."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import scaling
from bench.suites.run import CLOCK

SUITE = scaling.scaling


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
