"""Evaluation: one affine map per group, against the grouped 1x1 convolution that is the same map."""

import pytest

from bench.measure.comparison import Comparison
from bench.suites import inference
from bench.suites.run import CLOCK

SUITE = inference.inference


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
