"""A training step with BNP, with BatchNorm and without either, by mini-batch."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import bnp
from bench.suites.run import CLOCK

SUITE = bnp.bnp


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
