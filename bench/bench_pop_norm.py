"""POP-Norm against BatchNorm."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.pop_norm


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
