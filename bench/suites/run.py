"""A run: the suites by name, the comparisons that are selected of them, and the loop that measures these."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.measure.comparison import Comparison, Settings
from bench.measure.results import Results
from bench.measure.timing import Measurement, describe, settle_allocator
from bench.suites.bnp import bnp
from bench.suites.conv_norm import conv_norm
from bench.suites.fold import fold
from bench.suites.gpu_suite import gpu
from bench.suites.inference import inference
from bench.suites.memory import measure_memory, memory
from bench.suites.pop_norm import pop_norm
from bench.suites.scaling import scaling
from bench.suites.table_a1 import table_a1
from bench.suites.vgg import vgg

try:
    from tqdm import tqdm
except ImportError:  # without tqdm plain lines show the progress
    tqdm = None

# In the order in which they are measured; gpu is not part of a run on a CPU.
SUITES: dict[str, Callable[[Settings], list[Comparison]]] = {
    "table_a1": table_a1,
    "vgg": vgg,
    "inference": inference,
    "scaling": scaling,
    "conv_norm": conv_norm,
    "pop_norm": pop_norm,
    "bnp": bnp,
    "fold": fold,
    "memory": memory,
    "gpu": gpu,
}
OPERATORS = ("and", "or", "not", "(", ")")


def matches(expression: str, text: str) -> bool:
    """Return whether a text matches words with and, or, not and parentheses; a word matches where the text has it.

    Upper and lower case are the same, and no words match everything. Raises ValueError for another expression.
    """
    words = re.findall(r"[()]|[^\s()]+", expression)
    code = " ".join(word if word in OPERATORS else str(word.lower() in text.lower()) for word in words)
    try:
        return not words or bool(eval(code))  # nothing is left of the words but True, False and operators
    except (SyntaxError, TypeError):
        raise ValueError(f"expected words with and, or, not and parentheses, got {expression!r}") from None


def select(settings: Settings, suites: Iterable[str], expression: str = "") -> list[Comparison]:
    """Return the comparisons of some suites whose suite, key or provider matches the expression."""
    found = [(suite, comparison) for suite in suites for comparison in SUITES[suite](settings)]
    return [c for suite, c in found if matches(expression, " ".join([suite, c.key, *c.names]))]


class Progress:
    """Shows one step per comparison, with the round that is being measured; a log file gets lines."""

    def __init__(self, total: int) -> None:
        shown = tqdm is not None and sys.stderr.isatty()
        self.bar: Any = tqdm(total=total, unit="comparison", file=sys.stderr, dynamic_ncols=True) if shown else None
        self.total, self.begun, self.key = total, 0, ""

    def begin(self, key: str) -> None:
        self.begun, self.key = self.begun + 1, key
        if self.bar is None:
            print(f"[{self.begun}/{self.total}] {key}", file=sys.stderr, flush=True)
            return
        self.bar.update(self.begun - 1 - self.bar.n)
        self.bar.set_postfix_str(key)

    def on_round(self, index: int, rounds: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.key} round {index + 1}/{rounds}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def begin(settings: Settings) -> Results:
    """Return empty results, with notes of what the reader of the figures has to know."""
    results = Results.start(settings.device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        results.notes.append(
            f"Load average {load:.1f} when the run began: other programs were running, times are noisy."
        )
    if settings.quick:
        results.notes.append("Quick run: few rounds. Take figures from a full run.")
    return results


def run(
    comparisons: Sequence[Comparison], results: Results, out: Path | None = None, before: Results | None = None
) -> None:
    """Measure comparisons and add what is found to the results; whoever fails costs the others nothing.

    The results are saved in `out` after every comparison, for the next one may end the process.
    before: rows of earlier runs in `out`, which stay there.
    """
    settle_allocator()
    progress = Progress(len(comparisons))
    try:
        for comparison in comparisons:
            progress.begin(comparison.key)
            if comparison.kernel == "memory":
                add_memory(comparison, results)
            else:
                add_times(comparison, results, progress)
            if out is not None:
                results.save(out, before)
    finally:
        progress.close()


def add_times(comparison: Comparison, results: Results, progress: Progress) -> None:
    try:
        measurement = comparison.measure(progress.on_round)
    except Exception as error:  # the inputs could not even be made: nobody in this comparison has a figure
        measurement = Measurement({}, dict.fromkeys(comparison.names, describe(error)))
    results.add_times(comparison, measurement)


def add_memory(comparison: Comparison, results: Results) -> None:
    for provider in comparison.names:
        try:
            results.add_memory(comparison, provider, measure_memory(comparison, provider))
        except Exception as error:  # it belongs in the report, like that of a provider that is timed
            results.add_failure(comparison, provider, describe(error))
