"""Memory: what is saved for the backward pass, and the peak of one training step. Nothing is timed."""

from bench import suites
from bench.session import Session

SUITE = suites.memory


def test_memory(comparison: suites.Comparison, provider: str, session: Session) -> None:
    session.measure_memory(comparison, provider)
