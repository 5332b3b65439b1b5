"""`make check-abi`: compile the CUDA extension with the oldest torch that is supported, load and test it in the newest.

    python -m bench.builds.check_abi                              # makes two virtual environments, 5 GB each
    python -m bench.builds.check_abi --old PYTHON --new PYTHON    # interpreters of one version that have what is needed

LibTorch's stable interface promises that this works. No GPU is needed, so no kernel runs. Exit code 0 if all is well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from bench.builds.check_cuda import ROOT, build, test

FOLDER = ROOT / "build" / "abi"
TOOLS = (
    "setuptools>=77,<82",
    "wheel",
    "ninja",
    "pybind11",
    "numpy",
    "scipy",
    "pytest",
)  # torch 2.11 refuses newer ones


def environment(name: str, torch: str) -> str:
    """Return the interpreter of a virtual environment with this torch, which is made where it is missing."""
    folder = ROOT / ".venv-abi" / name
    python, complete = folder / "bin" / "python", folder / ".complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", torch, *TOOLS], check=True)
        complete.touch()
    return str(python)


def ask(python: str, question: str) -> str:
    command = [python, "-c", f"import sys, torch; print({question})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.builds.check_abi", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--old", help="an interpreter with a CUDA build of torch 2.11 and the build's requirements")
    parser.add_argument("--new", help="an interpreter with a newer one, and pytest")
    parser.add_argument("--architectures", default="9.0")
    options = parser.parse_args(arguments)
    old = options.old or environment("old", "torch===2.11.0")
    new = options.new or environment("new", "torch")
    pythons = [ask(python, "sys.version_info[:2]") for python in (old, new)]
    if pythons[0] != pythons[1]:
        parser.error(f"expected the same Python in both environments, got {' and '.join(pythons)}")
    build(options.architectures, FOLDER, old)
    codes = []
    for python in (old, new):
        codes.append(test(FOLDER, python))
        versions = f"torch {ask(old, 'torch.__version__')} and loaded in torch {ask(python, 'torch.__version__')}"
        print(f"Compiled with {versions}: {'failed' if codes[-1] else 'passed'}.", flush=True)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
