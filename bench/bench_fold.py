"""Evaluation of a network with its norms, with its norms folded, and without."""

import pytest

from bench import folding
from bench.session import CLOCK
from bench.suites import Comparison

SUITE = folding.fold


@pytest.mark.benchmark(timer=CLOCK)
def test_time(comparison: Comparison, provider: str, replay) -> None:
    replay(comparison, provider)
