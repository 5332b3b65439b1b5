"""Memory: what is saved for the backward pass, and the peak of one training step. Nothing is timed."""

from bench.measure.comparison import Comparison
from bench.suites import memory
from bench.suites.run import Session

SUITE = memory.memory


def test_memory(comparison: Comparison, provider: str, session: Session) -> None:
    session.measure_memory(comparison, provider)
