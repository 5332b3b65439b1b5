"""One training step of the VGG of Table A2 with BatchNorm, IterNorm(64) and DBN(16)."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.vgg


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
