"""`make check-cuda`: compile the CUDA extension, list what its kernels take, test what can be tested without a GPU.

    python -m bench.builds.check_cuda                            # needs nvcc and a CUDA build of torch
    python -m bench.builds.check_cuda --architectures 8.6+PTX    # others; writes no docs/cuda-kernels.csv

Compiled from nothing, as setup.py does it for every user, but for the architectures below and with warnings as errors.
A kernel that spills registers, or keeps anything else in local memory, is refused. Then tests/test_extension.py runs
on what was built. Exit code 0 if all is well.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda"
RESULT = ROOT / "docs" / "cuda-kernels.csv"
ARCHITECTURES = "8.0;9.0;10.0"


class Usage(NamedTuple):
    """A kernel's resources as ptxas prints them.

    stack, spilled, shared: bytes; shared is only what is fixed when the kernel is compiled.
    """

    kernel: str
    architecture: int
    registers: int
    stack: int
    spilled: int
    shared: int


def build(architectures: str, folder: Path = BUILD, python: str = sys.executable) -> str:
    """Build the package in a folder, which is emptied first, and return what the compilers wrote.

    The program ends where they fail.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {
        "NORMKERNELS_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": architectures,
        "CFLAGS": "-Werror",
        "NVCC_APPEND_FLAGS": "-Werror=all-warnings -Xcompiler=-Werror -Xptxas=-v",
    }
    commands = ["egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder)]
    started = time.monotonic()
    done = subprocess.run(
        [python, "setup.py", *commands],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        noise = ("copying", "creating", "ptxas info", "    ")
        lines = [line for line in done.stdout.splitlines() if not line.startswith(noise)]
        sys.exit("\n".join([*lines[-60:], f"The extension could not be built for {architectures}."]))
    print(f"Built for {architectures} in {time.monotonic() - started:.0f} s.", flush=True)
    return done.stdout


def usages(text: str) -> Iterator[Usage]:
    """Yield the kernels in the output of ptxas -v, by its mangled names."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'\n"
        r"(?:.*\n)*?.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
        r" loads\n.*?Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for match in entry.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        numbers = int(match["registers"]), int(match["stack"]), spilled, int(shared[1]) if shared else 0
        yield Usage(match["name"], int(match["architecture"]), *numbers)


def readable(names: Sequence[str]) -> list[str]:
    """Return names as in the sources: `mix<float, 64>` for `void nk::mix<float, 64>(nk::Columns, ...)`."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    result = []
    for line in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|\bnk::|^void ", "", line)
        depth = 0
        for end, character in enumerate(name):  # where the arguments begin: the first bracket outside of < >
            depth += {"<": 1, ">": -1}.get(character, 0)
            if character == "(" and depth == 0:
                name = name[:end]
                break
        result.append(re.sub(r"\((?:int|bool|unsigned int)\)", "", name))
    return result


def table(rows: Sequence[Usage]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Usage._fields)
    writer.writerows(sorted(rows))
    return text.getvalue()


def test(folder: Path = BUILD, python: str = sys.executable) -> int:
    """Run tests/test_extension.py on the package built in a folder, and return the exit code."""
    (library,) = folder.glob("lib*")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(library), str(ROOT)])}
    environment.pop("NORMKERNELS_BACKEND", None)
    isolated = [python, "-P"]  # the sources at hand must not come before the package that was built
    load = [*isolated, "-W", "error", "-c", "import torch, normkernels._C"]
    if code := subprocess.run(load, cwd=ROOT, env=environment, check=False).returncode:
        return code  # the tests would only be skipped
    tests = ["-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "tests/test_extension.py"]
    return subprocess.run([*isolated, *tests], cwd=ROOT, env=environment, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.builds.check_cuda", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--architectures", default=ARCHITECTURES, help=f"default: {ARCHITECTURES}")
    options = parser.parse_args(arguments)
    found = list(usages(build(options.architectures)))
    found = [
        usage._replace(kernel=name) for usage, name in zip(found, readable([u.kernel for u in found]), strict=True)
    ]
    text = table(found)
    print(f"{len(found)} kernels, at most {max(usage.registers for usage in found)} registers.")
    failed = False
    for usage in sorted(found):
        if usage.spilled or usage.stack:
            failed = True
            print(
                f"{usage.kernel} for sm_{usage.architecture}: expected nothing in local memory, got "
                f"{usage.spilled} bytes of spills and a stack frame of {usage.stack}"
            )
    if options.architectures == ARCHITECTURES:
        RESULT.write_text(text)
    else:
        print(text, end="")
    return 1 if test() or failed else 0


if __name__ == "__main__":
    sys.exit(main())
