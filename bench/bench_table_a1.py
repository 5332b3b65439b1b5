"""Table A1 of the IterNorm paper: whitening against a 3x3 convolution of the same width."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.table_a1


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
