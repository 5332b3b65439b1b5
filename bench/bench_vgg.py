"""One training step of the VGG of Table A2 with BatchNorm, IterNorm(64) and DBN(16)."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import vgg
from bench.suites.run import CLOCK

SUITE = vgg.vgg


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
