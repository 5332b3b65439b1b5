"""Cost against width, iterations, samples, group size, shape, layout and type."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.scaling


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
