"""Evaluation: one affine map per group, against the grouped 1x1 convolution that is the same map."""

import pytest

from bench import suites
from bench.session import CLOCK

SUITE = suites.inference


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: suites.Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
