"""`make gpu-check OUT=dir`: install, test and measure on a machine with a GPU and no network, within a time limit.

Every step is a process of its own with a share of the time. One that fails or overruns is recorded and the next one
runs; what was measured until then stays. OUT gets log.txt, README.md with tables and goals, the CSV files, and plots.
Exit code: 0 if every step succeeded, 1 if one did not, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from bench.measure.environment import ROOT
from bench.measure.results import Results
from bench.report.page import write_report
from bench.report.tables import table

RESERVE_S = 15.0  # for the report
GRACE_S = 10.0  # between asking a step to end and ending it
# The measurements, and the share of the time that each may take.
KERNELS = {
    "gpu_norm": 0.3, "gpu_pop_norm": 0.1, "gpu_precondition": 0.05, "gpu_newton": 0.1, "gpu_filter": 0.2,
    "gpu_spectrum": 0.1, "gpu_overhead": 0.05,
}  # fmt: skip
OUTPUTS = ("log.txt", "README.md", "records.csv", "ratios.csv", "failures.csv", "gpu_*.png")


@dataclass(frozen=True)
class Step:
    """One step; share: of the whole time, at most; succeeded: exit codes that are no failure."""

    name: str
    arguments: tuple[str, ...]
    share: float
    succeeded: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    step: str
    failed: bool
    result: str
    seconds: float
    last_line: str


def steps(device: str, quick: bool, kernels: Sequence[str], out: Path) -> list[Step]:
    """Return the steps, with python's arguments.

    Without a GPU nothing is installed, and no test is selected (pytest's exit code 5). Installing compiles the CUDA
    extension for the GPUs that are there; -v puts the compiler's words into the log.
    """
    cuda = device == "cuda"
    install = ("-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")
    bench = ("-m", "bench", "--suite", "gpu", "--add", "--device", device, "--out", str(out))
    return [
        Step("environment", ("-m", "bench.measure.environment", "--device", device), 0.1),
        *([Step("install", install, 0.3)] if cuda else []),
        Step("self-test", ("-m", "normkernels.info", "--selftest"), 0.15),
        Step("GPU tests", ("-m", "bench.gpu.gpu_tests"), 0.45, (0,) if cuda else (0, 5)),
        # one process for each: an illegal memory access ends all further work of a process on the GPU
        *(Step(k, (*bench, *(["--quick"] if quick else []), "-k", k), KERNELS[k]) for k in kernels),
    ]


def environment() -> dict[str, str]:
    """Return the environment of a step.

    In it the package is found where it is, even if it could not be installed, and Triton compiles, whatever a test
    wanted.
    """
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run(step: Step, limit_s: float, log: IO[str]) -> Outcome:
    """Run one step, its output on the terminal and in the log."""
    last = ""

    def copy(stream: IO[str]) -> None:
        nonlocal last
        with stream:
            for line in stream:
                last = line.strip() or last
                write(line, log)

    write(f"\n=== {step.name}: python {' '.join(step.arguments)} (at most {limit_s:.0f} s)\n", log)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    copier = threading.Thread(target=copy, args=(process.stdout,), daemon=True)
    copier.start()
    try:
        code = process.wait(limit_s)
        failed = code not in step.succeeded
        result = f"failed, exit code {code}" if failed else "succeeded"
    except subprocess.TimeoutExpired:
        failed, result = True, f"stopped after {limit_s:.0f} s"
    finally:
        stop(process)
    copier.join(GRACE_S)  # not for ever: a grandchild may hold the pipe open
    outcome = Outcome(step.name, failed, result, time.monotonic() - started, last)
    write(f"=== {step.name}: {result}, {outcome.seconds:.0f} s\n", log)
    return outcome


def stop(process: subprocess.Popen[str]) -> None:
    """End the step with all that it started: as by Ctrl-C, so that pytest sums up what it has, then for good."""
    for number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def write(text: str, log: IO[str]) -> None:
    print(text, end="", flush=True)
    log.write(text)
    log.flush()


def no_time(step: Step) -> Outcome:
    return Outcome(step.name, True, "no time left", 0.0, "")


def introduction(outcomes: Sequence[Outcome], planned: Sequence[Step]) -> list[str]:
    """Return the steps as a table, for the report."""
    rows = [[o.step, o.result, f"{o.seconds:.0f}", o.last_line.replace("|", "/")[:100]] for o in outcomes]
    rows += [[step.name, "not run", "-", ""] for step in planned[len(outcomes) :]]
    return [
        "## Steps",
        "",
        table(["step", "result", "s", "last line of its output"], rows),
        "",
        "Details: log.txt.",
        "",
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--minutes", type=float, default=8.5, help="all of it ends by then (default: 8.5)")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a result")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="measure only this (default: all)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device and a torch built for it, found none")
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    total_s = 60 * options.minutes
    deadline = time.monotonic() + total_s - RESERVE_S
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for pattern in OUTPUTS:  # files of an earlier run: they must not be taken for this one's
        for path in out.glob(pattern):
            path.unlink()
    planned = steps(options.device, options.quick, options.kernel or list(KERNELS), out)
    outcomes: list[Outcome] = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        try:
            for step in planned:
                limit_s = min(step.share * total_s, deadline - time.monotonic() - GRACE_S)
                outcomes.append(run(step, limit_s, log) if limit_s > 0 else no_time(step))
        finally:
            results = Results.load(out, options.device)
            if options.quick:
                results.notes.append("Quick run: few rounds. Take figures from a full run.")
            text = introduction(outcomes, planned)
            files = write_report(results, out, text)
            write("\n".join(["", *text, f"Report: {out} ({len(files) + 1} files)", ""]), log)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a run that is ended writes its report, too
    sys.exit(main())
