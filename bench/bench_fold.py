"""Evaluation of a network with its norms, with its norms folded, and without."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import fold as folding
from bench.suites.run import CLOCK

SUITE = folding.fold


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
