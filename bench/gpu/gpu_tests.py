"""Run the tests marked gpu in several processes at once: `python -m bench.gpu.gpu_tests`.

Most of their time is Triton compiling kernels on the CPU, of which a machine with a GPU has many cores. And after an
illegal memory access a process can do no more on the GPU: only its part of the tests is lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from bench.measure.environment import ROOT

AT_ONCE = max(1, min(12, (os.cpu_count() or 2) - 2))
PARTS = 3  # parts of each file
WORDS = ("mark.gpu", 'usefixtures("backend")', 'importorskip("triton")')  # one is in every file with such tests
NO_TESTS = 5  # pytest's exit code
# Warnings of other versions than those the tests were written with are no failures here.
SETTINGS = ("-m", "gpu", "-q", "--durations=3", "-p", "no:cacheprovider", "-o", "filterwarnings=default")
PATIENCE_S = 5.0  # for processes that were told to stop


@dataclass
class Job:
    path: Path
    part: int
    output: IO[str] = field(default_factory=lambda: tempfile.TemporaryFile("w+"))  # noqa: SIM115 -- its process's life
    process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "pytest", str(self.path), f"--part={self.part}/{PARTS}", *SETTINGS]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT)

    def report(self) -> int:
        """Print what it wrote, and return pytest's exit code, or 1 for a process that had to be stopped."""
        assert self.process is not None
        code = self.process.poll()
        self.output.seek(0)
        if code != NO_TESTS:
            print(f"--- {self.path.relative_to(ROOT)}, part {self.part} of {PARTS}\n{self.output.read()}", flush=True)
        return 1 if code is None else code


def jobs() -> list[Job]:
    """Return the jobs, those of the largest files first, so that none of these begins last."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if any(word in path.read_text() for word in WORDS)]
    found.sort(key=lambda path: -path.stat().st_size)
    return [Job(path, part) for path in found for part in range(1, PARTS + 1)]


def run(waiting: list[Job], on_end: Callable[[Job], None]) -> None:
    """Run all jobs, AT_ONCE at a time. Interrupted, it reports what those that run have written, and starts no more."""
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(waiting.pop(0))
                running[-1].start()
            for job in [job for job in running if job.process is not None and job.process.poll() is not None]:
                running.remove(job)
                on_end(job)
            time.sleep(0.1)
    except KeyboardInterrupt:  # they got it, too
        deadline = time.monotonic() + PATIENCE_S
        for job in running:
            assert job.process is not None
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.0, deadline - time.monotonic()))
            on_end(job)
            job.process.kill()
        print(f"interrupted: {len(running)} processes stopped, {len(waiting)} not begun")
        raise


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: no tests to run")
        return NO_TESTS
    codes: list[int] = []
    failed: list[str] = []

    def on_end(job: Job) -> None:
        codes.append(job.report())
        if codes[-1] not in (0, NO_TESTS):
            failed.append(f"{job.path.relative_to(ROOT)} ({job.part})")

    try:
        run(jobs(), on_end)
    finally:
        passed = codes.count(0)
        print(f"{passed} parts of files with GPU tests passed, {len(failed)} failed {', '.join(failed)}".rstrip())
    return 1 if failed else 0 if passed else NO_TESTS


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(1)
