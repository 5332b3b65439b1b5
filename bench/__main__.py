"""`python -m bench`: run the suites, write the report, print the tables.

Exit code: 0 if everything was measured, 1 if a provider failed (the others are still in the report), 2 for a
wrong call.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure.environment import ROOT, device_name, device_slug, versions
from bench.measure.results import Results
from bench.report.page import TITLES, failures_table, goals_table, kernels, losses_table, memory_table, time_tables
from bench.suites.goals import evaluate, where_we_lose
from bench.suites.run import Session

HERE = Path(__file__).resolve().parent
SUITES = ("table_a1", "vgg", "inference", "scaling", "conv_norm", "pop_norm", "bnp", "fold", "memory")
GPU_SUITE = "gpu"

try:
    from tqdm import tqdm
except ImportError:  # without tqdm plain lines show the progress
    tqdm = None


class ProgressBar:
    """A pytest plugin: one step per comparison, with the round that is being measured; a log file gets lines."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.total = 0
        self.session: Session | None = None
        self.begun: set[str] = set()
        self.seen: set[str] = set()
        self.messages: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        from bench.conftest import SESSION

        self.session = session.config.stash[SESSION]
        self.session.progress = self.on_round
        self.total = len({self.unit(item.nodeid) for item in session.items})
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, unit="comparison", file=sys.stderr, dynamic_ncols=True)

    @staticmethod
    def unit(nodeid: str) -> str:
        """Return the unit of progress that a test belongs to.

        A timed comparison is measured once for all its providers, memory for each provider by itself.
        """
        return nodeid if "bench_memory" in nodeid else nodeid.rsplit("-", 1)[0]

    def on_round(self, key: str, index: int, rounds: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{key} round {index + 1}/{rounds}" if rounds > 1 else key)
        elif key not in self.begun:
            self.begun.add(key)
            print(f"[{len(self.begun)}/{self.total}] {key}", file=sys.stderr, flush=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.messages.append(f"{report.nodeid}\n{report.longreprtext}")
        unit = self.unit(report.nodeid)
        if report.when == "teardown" and unit not in self.seen:
            self.seen.add(unit)
            if self.bar is not None:
                self.bar.update()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.messages.append(f"{report.nodeid}\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            self.bar.close()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a result")
    parser.add_argument(
        "--out",
        type=Path,
        help="report folder (default: bench/results/<device>; with --quick or -k out/bench/<device>)",
    )
    parser.add_argument(
        "-k", metavar="EXPR", default="", help="only suites and comparisons that match, as in pytest -k"
    )
    parser.add_argument(
        "--suite", action="append", choices=(*SUITES, GPU_SUITE), help="only this one (default: all for the device)"
    )
    parser.add_argument("--add", action="store_true", help="add to the CSV files in --out, and write no report")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vgg-batch", type=int, help="batch of the VGG step (the paper's is 256; default 32 on a CPU)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device and a torch built for it, found none")
    if options.vgg_batch is not None and options.vgg_batch < 1:
        parser.error(f"--vgg-batch: expected at least 1, got {options.vgg_batch}")
    return options


def default_folder(options: argparse.Namespace, device: torch.device) -> Path:
    """Return bench/results/<device>, or out/bench/<device> for a quick or partial run.

    The former is committed: a quick or partial run must not replace a full one there.
    """
    part = options.quick or bool(options.k) or bool(options.suite)
    return (ROOT / "out" / "bench" if part else HERE / "results") / device_slug(device)


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
    options = parse(arguments)
    device = torch.device(options.device)
    out = (options.out or default_folder(options, device)).resolve()
    print(f"{device_name(device)}\n{versions(device)}")
    selected = options.suite or (*SUITES, *([GPU_SUITE] if options.device == "cuda" else []))
    suites = [str(HERE / f"bench_{suite}.py") for suite in selected]
    command = [
        *suites,
        "-s",
        "-p",
        "no:terminal",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=default",
        f"--rootdir={ROOT}",
        f"--bench-device={options.device}",
        f"--bench-out={out}",
        "-k",
        options.k,
    ]
    if options.quick:
        command.append("--bench-quick")
    if options.add:
        command.append("--bench-add")
    if options.vgg_batch:
        command.append(f"--bench-vgg-batch={options.vgg_batch}")
    progress = ProgressBar()
    with warnings.catch_warnings():
        code = int(pytest.main(command, plugins=[progress]))
    for message in progress.messages:
        print(f"\n{message}", file=sys.stderr)
    if progress.session is None:
        return 2
    if not progress.total:
        print(f"-k {options.k!r}: expected to select something, it matches no comparison", file=sys.stderr)
        return 2
    print_tables(progress.session.results)
    print(f"\nReport: {out / ('records.csv' if options.add else 'README.md')}")
    return 1 if code or progress.session.results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
