"""Run the tests marked gpu, one process for each file, several at once: `python -m bench.gpu_tests`.

Most of their time is Triton compiling kernels on the CPU, of which a machine with a GPU has many cores. And after an
illegal memory access a process can do no more on the GPU: only that file's tests are lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from bench.environment import ROOT

AT_ONCE = max(1, min(8, (os.cpu_count() or 2) // 2))
WORDS = ("mark.gpu", 'usefixtures("backend")')
NO_TESTS = 5  # pytest's exit code
# Warnings of other versions than those the tests were written with are no failures here.
SETTINGS = ("-m", "gpu", "-q", "--durations=3", "-p", "no:cacheprovider", "-o", "filterwarnings=default")


def files() -> list[Path]:
    """Those that speak of GPUs or use the fixture ``backend``; the largest first, so that none begins last."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if any(w in path.read_text() for w in WORDS)]
    return sorted(found, key=lambda path: -path.stat().st_size)


def run(path: Path) -> tuple[Path, int, str]:
    command = [sys.executable, "-m", "pytest", str(path), *SETTINGS]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return path, done.returncode, done.stdout


def main() -> int:
    failed, passed = [], 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in as_completed([pool.submit(run, path) for path in files()]):
            path, code, output = future.result()
            if code == NO_TESTS:
                continue
            print(f"--- {path.relative_to(ROOT)}\n{output}", flush=True)
            passed += code == 0
            if code:
                failed.append(str(path.relative_to(ROOT)))
    print(f"{passed} files of GPU tests passed, {len(failed)} failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0 if passed else NO_TESTS


if __name__ == "__main__":
    sys.exit(main())
