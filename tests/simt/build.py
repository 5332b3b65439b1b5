"""csrc/*.cu, compiled as C++ for a CPU on top of simt.h, and put to work in place of the CUDA backend.

``python -m tests.simt.build`` builds the library, with and without sanitizers. Objects and libraries have a hash of all
that went into them in their names, under build/simt: what is there is right, and what is missing is built.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"

COMPILER = os.environ.get("CXX", "g++")
# Paths are relative to the repository, so that a copy of it finds the same hashes in its copy of the build folder.
FLAGS = (
    "-xc++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    "-Icsrc", "-Itests/simt", "-Itests/simt/device",  # the folder that takes the place of csrc/device
    "-fno-strict-aliasing",  # kernels load four numbers as one vector, which nvcc allows
)  # fmt: skip
PLAIN = ("-O2",)
SANITIZED = (
    "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    # g++ 12 compiles (a ? p : q)[i % n] wrong when it checks i % n: i is set only if a. It warns of that.
    "-Werror=maybe-uninitialized",
)  # fmt: skip

NAMESPACE = "normkernels_simt"  # as in device/current.h
ARCHITECTURE = 80  # of the device that the runtime plays
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


class BuildError(Exception):
    """An error of the compiler, with what it said."""


def missing() -> str:
    """Return what keeps the runtime from being built here, or an empty string."""
    return "" if shutil.which(COMPILER) else f"no C++ compiler {COMPILER!r} (set CXX)"


def build(*, sanitize: bool = False) -> Path:
    """Build the library of the package's kernels."""
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    return link(
        "normkernels",
        [*sorted(CSRC.glob("*/*.c*[pu]")), HERE / "exports.cpp"],
        (*TORCH_FLAGS, *(f"-isystem{path}" for path in include_paths())),
        (*(str(libraries / name) for name in TORCH_LIBRARIES), f"-Wl,-rpath,{libraries}"),
        sanitize=sanitize,
    )


def link(
    name: str,
    sources: Sequence[Path],
    compile_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    *,
    sanitize: bool = False,
) -> Path:
    """Build the library of these sources and the runtime; several processes may ask for it at the same time."""
    folder = BUILD / ("sanitized" if sanitize else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    mode = SANITIZED if sanitize else PLAIN
    flags = (*FLAGS, *mode, *compile_flags)
    headers = sorted([*HERE.glob("*.h"), *HERE.glob("device/*"), *CSRC.glob("*/*.h"), *CSRC.glob("*/*.cuh")])
    common = _hash([" ".join(flags), compiler_version(), torch.__version__, *headers])
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = {
            source: folder / f"{name}-{source.name}.{_hash([common, source])}.o"
            for source in (*sources, HERE / "simt.cpp")
        }
        library = folder / f"lib{name}.{_hash([*link_flags, *(one.name for one in objects.values())])}.so"
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = [[*flags, "-c", str(source.relative_to(ROOT)), "-o"] for source in objects]
                list(pool.map(_make, commands, objects.values()))
            _make(["-shared", *mode, *map(str, objects.values()), *link_flags, "-o"], library)
            for old in {*folder.glob(f"{name}-*.o"), *folder.glob(f"lib{name}.*.so")} - {library, *objects.values()}:
                with suppress(FileNotFoundError):  # another process is tidying up, too
                    if time.time() - old.stat().st_mtime > 600:  # nobody is about to load it
                        old.unlink()
    return library


def _make(arguments: list[str], target: Path) -> None:
    """Let the compiler make ``target``, which then is there complete or not at all."""
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    command = [COMPILER, *arguments, str(partial)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"{target.name}: the compiler failed\n{done.stdout}")
    if done.stdout:
        print(done.stdout, file=sys.stderr, end="")
    partial.rename(target)


def _hash(parts: Sequence[str | Path]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        total.update(b"\0")
    return total.hexdigest()[:12]


@functools.cache
def compiler_version() -> str:
    return _ask("--version").splitlines()[0]


def _ask(question: str) -> str:
    return subprocess.run([COMPILER, question], check=True, capture_output=True, text=True).stdout.strip()


def sanitized_environment() -> dict[str, str]:
    """Return variables with which a Python that is not instrumented itself can load a sanitized library."""
    # libstdc++ comes along because AddressSanitizer looks for __cxa_throw when it starts.
    libraries = " ".join(_ask(f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so"))
    return {
        **os.environ,
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def sanitizing() -> bool:
    """Return whether this process has been started with these variables."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


@functools.cache
def load(library: Path) -> torch.library.Library:
    """Register a built library's ops under ``torch.ops.normkernels_simt``, for as long as the result lives."""
    from normkernels.dispatch import record

    definitions = torch.library.Library(NAMESPACE, "DEF")
    for op in record.OPS:
        schema = getattr(torch.ops.normkernels, op).default._schema
        definitions.define(str(schema).removeprefix("normkernels::"))
    torch.ops.load_library(library)
    return definitions


class Extension:
    """The functions of ``normkernels._C`` that the tests need, from a built library."""

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))
        self._functions.refusal.restype = self._functions.recorded.restype = ctypes.c_char_p
        self._functions.refusal.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_int]

    def refusal(self, op: str, dtype: str, group_size: int, plane: Sequence[int], architecture: int) -> str:
        height, width = plane or (0, 0)
        return self._functions.refusal(
            op.encode(), dtype.encode(), group_size, height, width, architecture
        ).decode()  # fmt: skip

    def compiled_for(self, architecture: int) -> bool:
        return architecture == ARCHITECTURE

    def record(self, *device: int) -> None:
        self._functions.record(*device)

    def recorded(self) -> list[dict[str, Any]]:
        launches: list[dict[str, Any]] = json.loads(self._functions.recorded())
        return launches


@functools.cache
def install(library: Path) -> None:
    """Make ``use_backend("cuda")`` serve CPU tensors by a built library's ops."""
    from normkernels.dispatch import compiled, record

    load(library)
    for op in record.OPS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
            record.IMPLEMENTATIONS[op]["cuda"] = getattr(getattr(torch.ops, NAMESPACE), op).default
    extension = Extension(library)
    compiled.load = lambda: (extension, "")  # type: ignore[assignment]
    compiled.availability = lambda: (True, "CUDA kernels compiled for the CPU")
    compiled._architecture = lambda device: ARCHITECTURE


if __name__ == "__main__":
    for sanitize in (False, True):
        print(build(sanitize=sanitize))
