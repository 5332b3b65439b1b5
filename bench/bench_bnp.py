"""A training step with BNP, with BatchNorm and without either, by mini-batch."""

import pytest

from bench import bnp
from bench.session import CLOCK
from bench.suites import Comparison

SUITE = bnp.bnp


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
