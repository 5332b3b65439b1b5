"""Compile every Triton kernel for GPUs that are not there, and list what each takes of a multiprocessor.

    python -m bench.builds.kernel_resources            # all entries of configs.json; writes docs/triton-kernels.csv
    python -m bench.builds.kernel_resources --check    # writes nothing; exit code 1 where ``complaint`` has one
    python -m bench.builds.kernel_resources --choose   # first rewrites the table: see ``choose``

The ops' Triton launchers themselves run, on small CPU tensors, with every launch replaced by a compilation for the
wanted architecture. So what is compiled is what they launch, with the same specialization.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.gpu.tune import FILTERS, SPECTRA, launching, write_table
from bench.measure.environment import ROOT
from normkernels.triton import configs, support
from normkernels.triton.configs import Config, Key
from normkernels.triton.support import Unsupported

RESULT = ROOT / "docs" / "triton-kernels.csv"
SIZES = (16, 32, 64, 128)
# Architecture of a table entry -> shared memory, in bytes, that a program may have on all GPUs that the entry serves:
# entries for sm_80 also serve sm_86 and sm_89, which have less of it.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536  # registers of a multiprocessor
IN_FLIGHT = 32 << 10  # bytes that a multiprocessor has to have requested at any time to keep up with the memory
# Bytes that a thread may spill. With the options that Triton gives it, ptxas spills a few registers even of kernels
# that leave others unused. They stay in the first-level cache: 64 bytes of 256 threads are 16 KiB.
SPILLED = 64


class Usage(NamedTuple):
    """A kernel's resources.

    spilled, shared: bytes. unordered: loads from global memory after stores to it without a barrier between.
    """

    registers: int
    spilled: int
    shared: int
    unordered: int = 0


SINGLE = 48  # groups of one channel: several programs in either layout
FILTERED = 8  # channels of planes that are filtered, and inputs of the kernels
SIDES = {16: (7, 32), 32: (34, 58, 64)}  # sides of a filter's planes, by the padded half
PLANES = {"positions": (16, 14), "odd": (7,), "channels": (16,)}


@dataclass(frozen=True)
class Case:
    """One entry of the table, and calls that launch its kernels."""

    kernel: str
    size: int
    layout: str
    type: str

    def key(self, arch: int) -> Key:
        return self.kernel, self.size, self.layout, self.type, arch

    def calls(self) -> Iterator[Callable[[], object]]:
        """Yield calls of every op that launches the kernel, with samples of its record.

        All samples are taken in one type and layout, and the first in the others: rejected was all everywhere, of which
        two cores had not compiled the variants after twelve minutes.
        """
        every_option = self.type == "float32" and self.layout in ("", "positions")
        for group_size, side in itertools.product(self.group_sizes, self.sides):
            for op in launching(self.kernel):
                kernels = getattr(importlib.import_module(op.triton_module), op.name)
                samples = filter(dense, op.samples(self.data(group_size, side), group_size))
                for arguments in samples if every_option else itertools.islice(samples, 1):
                    yield functools.partial(kernels, *arguments)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        if self.kernel in (*FILTERS, *SPECTRA):
            return (FILTERED,)
        if self.kernel == "newton":  # threads lie differently on the matrices in memory and on those padded
            return (self.size, self.size - 3)
        return (self.size,)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the planes: also no multiples of 16, of which the compiler knows less."""
        if self.kernel in FILTERS:
            return SIDES[self.size]
        return (34, 64) if self.kernel in SPECTRA else PLANES.get(self.layout, (16,))

    def data(self, group_size: int, side: int) -> Tensor:
        dtype = torch.float32 if self.type == "float32" else torch.bfloat16
        x = torch.zeros(3, SINGLE if group_size == 1 else group_size, side, side, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels" else x


def dense(arguments: tuple[Any, ...]) -> bool:
    """Return whether no tensor is expanded: for such gradients a kernel may spill."""
    return not any(isinstance(value, Tensor) and 0 in value.stride() for value in arguments)


PASSES = ("moments", "cross_moments", "mix", "stacked_mix")


def cases() -> list[Case]:
    types = ("float32", "half")
    over_data = [
        *itertools.product(PASSES, (1, *SIZES), ("positions", "odd", "channels"), types),
        *itertools.product(FILTERS, SIDES, ("positions", "channels"), types),
        *itertools.product(("precondition",), (1,), ("",), types),
    ]
    elsewhere = [("merge", 1), *itertools.product(("newton", "merge"), SIZES), *itertools.product(SPECTRA, (64,))]
    return [Case(*parts) for parts in over_data] + [Case(kernel, size, "", "float32") for kernel, size in elsewhere]


# --- compiling ------------------------------------------------------------------------------------------------------


class AbsentGPU:
    """The part of a driver that Triton needs in order to compile."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_entry(case: Case, arch: int, config: Config, only_first: bool = False) -> dict[str, Usage]:
    """Return kernel's name -> the most that any of its variants takes, for all kernels that this entry configures."""
    from triton.runtime import driver

    driver.set_active(AbsentGPU(arch))
    used: dict[str, Usage] = {}

    def record(kernel: Any, grid: Any, arguments: Sequence[Any], given: Config, meta: dict[str, Any]) -> None:
        if given is not config:
            return
        variants = [meta]
        if case.size in (1, 64) and "WIDE" in meta and not only_first:  # as for more than 2^31 columns
            variants.append(meta | {"WIDE": True})
        for variant in variants:
            compiled = kernel.warmup(*arguments, grid=grid, **variant, num_warps=given.warps, num_stages=given.stages)
            usage = usage_of(compiled)
            if case.kernel == "newton":
                usage = usage._replace(unordered=unordered(compiled.asm["ptx"]))
            name = kernel.fn.__name__
            used[name] = Usage(*map(max, zip(used.get(name, usage), usage, strict=True)))

    with configs.replaced({case.key(arch): config}), support.recording(arch, record):
        for call in itertools.islice(case.calls(), 1 if only_first else None):
            with suppress(Unsupported):  # another kernel of the call, which this architecture leaves to plain PyTorch
                call()
    if not used:
        raise LookupError(f"no launch uses the entry {case} for sm_{arch}")
    return used


def usage_of(compiled: Any) -> Usage:
    """Read what a kernel takes off the program that Triton has made, with the options that Triton gives to ptxas.

    The kernels use their stack for spilled registers only.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared)


def unordered(ptx: str) -> int:
    """Count loads that could see what another thread has not yet stored, in the order of the program's text.

    This is for kernels that pass matrices from thread to thread through global memory. Triton's interpreter, which runs
    a program as one thread, cannot show such a mistake, and compute-sanitizer does not look for it there.
    """
    found, stored = 0, False
    for line in ptx.splitlines():
        if "st.global" in line:
            stored = True
        elif "bar.sync" in line or "barrier.sync" in line:
            stored = False
        elif stored and ("ld.global" in line or ("cp.async" in line and "global" in line)):
            found += 1
    return found


# --- checking and choosing ------------------------------------------------------------------------------------------


def complaint(usage: Usage, arch: int) -> str:
    """Return what is wrong with a kernel, or an empty string."""
    if usage.spilled > SPILLED:
        return f"{usage.spilled} bytes spilled, more than {SPILLED}"
    if usage.shared > SHARED[arch]:
        return f"{usage.shared} bytes of shared memory, more than {SHARED[arch]}"
    if usage.unordered:
        return f"{usage.unordered} loads after stores without a barrier between"
    return ""


def entry(case: Case, arch: int) -> Config | None:
    """Return an architecture's configuration, maybe an older one's; None where plain PyTorch serves the kernel."""
    with suppress(Unsupported), support.recording(arch, lambda *_: None):
        dtype = torch.float32 if case.type == "float32" else torch.float16
        return configs.configuration(case.kernel, case.size, case.layout, dtype, arch)
    return None


def rows_of(task: tuple[Case, int]) -> list[dict[str, Any]]:
    case, arch = task
    config = entry(case, arch)
    assert config is not None
    described = {"entry": case.kernel, **{k: v for k, v in asdict(case).items() if k != "kernel"}, "arch": arch}
    return [
        {"kernel": name, **described, **asdict(config), **usage._asdict()}
        for name, usage in sorted(compile_entry(case, arch, config).items())
    ]


# (block, warps, stages), the preferred first: more columns at a time mean fewer barriers per byte.
CANDIDATES: dict[int, list[tuple[int, ...]]] = {
    16: [(128, 4, 3), (64, 4, 3), (64, 4, 2), (32, 4, 2)],
    32: [(128, 4, 3), (64, 4, 3), (64, 8, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2)],
    64: [(64, 4, 3), (64, 8, 3), (32, 4, 4), (32, 4, 3), (64, 8, 2), (32, 8, 3), (32, 4, 2), (16, 4, 4), (16, 4, 3),
         (16, 4, 2)],
    128: [(32, 8, 3), (32, 8, 2), (16, 8, 4), (16, 8, 3), (16, 8, 2), (32, 4, 2), (16, 4, 3), (16, 4, 2)],
}  # fmt: skip
# For GPUs with less shared memory: no pipeline, or fewer rows of the result (the fourth number) in a program.
LAST_RESORT: dict[tuple[str, int], list[tuple[int, ...]]] = {
    ("moments", 128): [(16, 8, 1)],
    ("stacked_mix", 128): [(16, 8, 2, 32), (32, 8, 2, 16)],
}
SMALL_MATRIX: dict[int, list[tuple[int, ...]]] = {
    size: [
        (min(size, step), warps, stages)
        for stages in (2, 1)
        for step in (32, 16)
        for warps in ((4, 8) if size < 128 else (8, 16))
    ]
    for size in SIZES
}
PRECISION = {("mix", "half"): "bf16x3", ("stacked_mix", "half"): "bf16x3", ("merge", "float32"): "ieee"}


def candidates(case: Case) -> list[Config]:
    if case.kernel in (*FILTERS, *SPECTRA) or case.size == 1:  # chosen by hand: spectral/DERIVATION.md, docs/triton.md
        return [config for key, config in configs.table().items() if key[:4] == case.key(0)[:4]]
    precision = PRECISION.get((case.kernel, case.type), "tf32x3")
    shapes = CANDIDATES[case.size] + LAST_RESORT.get((case.kernel, case.size), [])
    if case.kernel == "newton":
        shapes = SMALL_MATRIX[case.size]
    elif case.kernel == "merge":
        shapes = [(4, 4, 1), (2, 4, 1)]
    return [
        Config(block, warps, stages, precision, *(int(row) for row in rows)) for block, warps, stages, *rows in shapes
    ]


def choose(task: tuple[Case, int]) -> tuple[Case, int, Config | None]:
    """Choose a configuration by what is known without a GPU; bench/gpu/tune.py replaces it by what was measured on one.

    It is the first candidate without a complaint of which two programs fit a multiprocessor, so that the barriers of
    one are hidden behind the loads of the other, and which together keep enough bytes in flight; otherwise the first
    one without a complaint.
    """
    case, arch = task
    fallback = None
    for config in candidates(case):
        try:
            used = compile_entry(case, arch, config, only_first=True)
            if any(complaint(usage, arch) for usage in used.values()):
                continue
            used = compile_entry(case, arch, config)
        except Exception:  # a combination that Triton does not compile
            continue
        if any(complaint(usage, arch) for usage in used.values()):
            continue
        fallback = fallback or config
        if case.kernel not in PASSES:
            break
        programs = min(
            min(SHARED[arch] // max(usage.shared, 1), REGISTERS // (usage.registers * 32 * config.warps))
            for usage in used.values()
        )
        sources = 2 if case.kernel in ("cross_moments", "stacked_mix") else 1
        bytes_each = (config.stages - 1) * config.block * case.size * sources * (4 if case.type == "float32" else 2)
        if programs >= 2 and programs * bytes_each >= IN_FLIGHT:
            return case, arch, config
    return case, arch, fallback


def in_parallel(function: Callable[[Any], Any], tasks: list[Any], what: str) -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool() as pool:
        yield from tqdm(pool.imap(function, tasks), total=len(tasks), unit=what, disable=not sys.stderr.isatty())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.builds.kernel_resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--choose", action="store_true", help="first choose new entries, by resources")
    parser.add_argument("-k", metavar="KERNEL", action="append", help="only this entry; may be repeated")
    parser.add_argument("--size", type=int, action="append", help="only entries of this size; may be repeated")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED), help="only this; may be repeated")
    options = parser.parse_args(arguments)
    selected = [case for case in cases() if options.k is None or case.kernel in options.k]
    selected = [case for case in selected if options.size is None or case.size in options.size]
    tasks = [(case, arch) for arch in options.arch or SHARED for case in selected]
    if options.choose:
        table = dict(configs.table())
        for case, arch, config in in_parallel(choose, tasks, "entry"):
            if config is None:
                print(f"no candidate fits: {case} sm_{arch}")
            else:
                table[case.key(arch)] = config
        write_table(configs.TABLE, table)
        configs.table.cache_clear()
    tasks = [(case, arch) for case, arch in tasks if entry(case, arch) is not None]
    rows = [row for found in in_parallel(rows_of, tasks, "entry") for row in found]
    failed = 0
    for row in rows:
        wrong = complaint(Usage(*(row[name] for name in Usage._fields)), row["arch"])
        if wrong:
            failed += 1
            key = ", ".join(str(row[name]) for name in ("entry", "size", "layout", "type"))
            print(f"sm_{row['arch']} {row['kernel']} ({key}): {wrong}")
    print(
        f"{len(rows)} kernels compiled for {', '.join(f'sm_{a}' for a in options.arch or SHARED)}; {failed} do not fit"
    )
    if not options.check:
        with RESULT.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
