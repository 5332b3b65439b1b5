"""Table A1 of the IterNorm paper: whitening against a 3x3 convolution of the same width."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import table_a1
from bench.suites.run import CLOCK

SUITE = table_a1.table_a1


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
