"""Memory: what is saved for the backward pass, and the peak of one training step. Nothing is timed."""

from bench import memory
from bench.session import Session
from bench.suites import Comparison

SUITE = memory.comparisons


def test_memory(comparison: Comparison, provider: str, session: Session) -> None:
    session.measure_memory(comparison, provider)
