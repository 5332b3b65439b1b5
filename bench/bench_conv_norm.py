"""ConvNorm: layers, the filter of image planes, and the spectrum of the kernels."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.conv_norm


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
