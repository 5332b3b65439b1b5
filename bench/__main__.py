"""`python -m bench`: run the suites, write the report, print the tables.

Exit code: 0 if everything was measured, 1 if a provider failed (the others are still in the report) or the run was
interrupted, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.measure.comparison import Settings
from bench.measure.environment import ROOT, device_name, device_slug, versions
from bench.measure.results import Results
from bench.report.page import (
    TITLES,
    failures_table,
    goals_table,
    kernels,
    losses_table,
    memory_table,
    time_tables,
    write_report,
)
from bench.suites.goals import evaluate, where_we_lose
from bench.suites.run import SUITES, begin, run, select


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    result.add_argument("--quick", action="store_true", help="few rounds: a look, not a result")
    result.add_argument(
        "--out",
        type=Path,
        help="report folder (default: bench/results/<device>; with --quick or -k out/bench/<device>)",
    )
    result.add_argument(
        "-k",
        metavar="EXPR",
        default="",
        help='only comparisons whose suite, key or provider matches, such as "table_a1 and not forward"',
    )
    result.add_argument("--suite", action="append", choices=SUITES, help="only this one (default: all for the device)")
    result.add_argument("--add", action="store_true", help="add to the CSV files in --out, and write no report")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--vgg-batch", type=int, help="batch of the VGG step (the paper's is 256; default 32 on a CPU)")
    return result


def default_folder(options: argparse.Namespace, device: torch.device) -> Path:
    """Return bench/results/<device>, or out/bench/<device> for a quick or partial run.

    The former is committed: a quick or partial run must not replace a full one there.
    """
    part = options.quick or bool(options.k) or bool(options.suite)
    return ROOT / ("out" if part else "bench") / ("bench" if part else "results") / device_slug(device)


def print_tables(results: Results) -> None:
    for kernel in kernels(results):
        print(f"\n== {TITLES.get(kernel, kernel)}\n")
        print(memory_table(results) if kernel == "memory" else time_tables(results, kernel))
    verdicts = evaluate(results)
    if any(v.measured for v in verdicts):
        print(f"\n== Goals\n\n{goals_table(verdicts)}")
    losses = where_we_lose(results)
    if losses:
        shown = losses[:10]
        print(f"\n== Where we lose ({len(shown)} of {len(losses)}, worst first)\n\n{losses_table(shown)}")
    if results.failures:
        print(f"\n== Failed\n\n{failures_table(results.failures)}")
    for note in results.notes:
        print(f"\nNote: {note}")


def main(arguments: list[str] | None = None) -> int:
    arguments_of = parser()
    options = arguments_of.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        arguments_of.error("--device cuda: expected a CUDA device and a torch built for it, found none")
    if options.vgg_batch is not None and options.vgg_batch < 1:
        arguments_of.error(f"--vgg-batch: expected at least 1, got {options.vgg_batch}")
    device = torch.device(options.device)
    settings = Settings(device, options.quick, options.vgg_batch)
    suites = options.suite or [suite for suite in SUITES if suite != "gpu" or settings.cuda]
    try:
        comparisons = select(settings, suites, options.k)
    except ValueError as error:
        arguments_of.error(f"-k: {error}")
    if not comparisons:
        arguments_of.error(f"-k {options.k!r}: expected to select something, it matches no comparison")
    out = (options.out or default_folder(options, device)).resolve()
    print(f"{device_name(device)}\n{versions(device)}")

    results, interrupted = begin(settings), False
    before = Results.load(out, device.type) if options.add else None
    try:
        run(comparisons, results, out, before)
    except KeyboardInterrupt:
        interrupted = True
        results.notes.append("Interrupted: only a part was measured.")
    if not options.add:
        write_report(results, out)
    print_tables(results)
    print(f"\nReport: {out / ('records.csv' if options.add else 'README.md')}")
    return 1 if interrupted or results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
