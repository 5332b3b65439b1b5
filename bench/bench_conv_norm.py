"""ConvNorm: layers, the filter of image planes, and the spectrum of the kernels."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import conv_norm
from bench.suites.run import CLOCK

SUITE = conv_norm.conv_norm


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
