"""The suite that a GPU's goals are read off: norms, Newton's iteration, ConvNorm's filter and spectrum.

See gpu_check.py.
"""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import gpu_suite
from bench.suites.run import CLOCK

SUITE = gpu_suite.gpu


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
