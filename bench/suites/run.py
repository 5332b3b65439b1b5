"""One run: each comparison is measured once, replayed to pytest-benchmark and kept for the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure.comparison import Comparison, Settings
from bench.measure.results import Results
from bench.measure.timing import Measurement, describe, settle_allocator
from bench.suites.memory import measure_memory

Progress = Callable[[str, int, int], None]  # (comparison, round, rounds)


class ReplayClock:
    """A clock that only moves when it is told to: pytest-benchmark reads it as its timer.

    pytest-benchmark measures one function at a time, and the providers here must be interleaved. So they are
    measured first, and then each recorded duration is played back as one round of `benchmark.pedantic`.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def player(self, durations: Sequence[float]) -> Callable[[], None]:
        """Return a function that takes durations[0] on its first call, durations[1] on the second, and so on."""
        remaining: Iterator[float] = iter(durations)

        def play() -> None:
            self.now += next(remaining, 0.0)  # a profiling run after the last round takes no time

        return play


CLOCK = ReplayClock()


@dataclass
class Session:
    settings: Settings
    results: Results
    progress: Progress | None = None
    measured: dict[str, Measurement] = field(default_factory=dict)
    out: Path | None = None
    before: Results | None = None  # rows of earlier runs in `out`, which stay there

    @classmethod
    def start(cls, settings: Settings, out: Path | None = None, add: bool = False) -> Session:
        before = Results.load(out, settings.device.type) if out is not None and add else None
        session = cls(settings, Results.start(settings.device), out=out, before=before)
        settle_allocator()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > 0.5:
            session.results.notes.append(
                f"Load average {load:.1f} when the run began: other programs were running, times are noisy."
            )
        if settings.quick:
            session.results.notes.append("Quick run: few rounds. Take figures from a full run.")
        return session

    def measure(self, comparison: Comparison) -> Measurement:
        """Return the measurement of a comparison, made at the first call and remembered."""
        if comparison.key not in self.measured:
            progress = self.progress

            def on_round(index: int, rounds: int) -> None:
                if progress is not None:
                    progress(comparison.key, index, rounds)

            on_round(0, comparison.plan.rounds)
            try:
                measurement = comparison.measure(on_round)
            except Exception as error:  # the inputs could not even be made: nobody in this comparison has a figure
                measurement = Measurement({}, dict.fromkeys(comparison.names, describe(error)))
            self.measured[comparison.key] = measurement
            self.results.add_times(comparison, measurement)
            self.save()
        return self.measured[comparison.key]

    def measure_memory(self, comparison: Comparison, provider: str) -> None:
        if self.progress is not None:
            self.progress(f"{comparison.key}: {provider}", 0, 1)
        try:
            use = measure_memory(comparison, provider)
        except Exception as error:
            self.results.add_failure(comparison, provider, describe(error))
            raise
        self.results.add_memory(comparison, provider, use)
        self.save()

    def save(self) -> None:
        """Save the results after every comparison: they are on the disk if the next comparison ends the process."""
        if self.out is not None:
            self.results.save(self.out, self.before)
