"""Find the fastest configuration of every Triton kernel on this GPU.

    python -m bench.gpu.tune --out configs.json [--kernel mix] [--size 64]
    NORMKERNELS_TRITON_CONFIGS=configs.json python train.py

Opt-in: the package itself never tunes. It times the ops that launch a kernel, once for each candidate around the
configuration in force, and keeps the fastest of those that compile and agree with the eager backend. The file is
written after each kernel, in the format of normkernels/triton/configs.json, which it overrides where it has a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normkernels
from bench.measure.timing import clock_for, describe
from bench.measure.workload import TOLERANCE, compare
from normkernels import _warnings
from normkernels.dispatch.record import OPS, Op
from normkernels.triton import configs, support
from normkernels.triton.configs import Config, Key

ROUNDS, WARMUP = 20, 3
LIMITS = {"block": (1, 256), "warps": (1, 16), "stages": (1, 4)}
ELEMENTWISE = 2048  # columns of a tile of single channels, which is multiplied by nothing, at most
POSITIONS, CHANNELS = 128 * 32 * 32, 256  # activations of 128 MiB in float32, more than a cache holds

Call = Callable[[], tuple[Tensor, ...]]


class Case(NamedTuple):
    """A row of the table without its architecture; size is that of a tile."""

    kernel: str
    size: int
    layout: str
    type: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.type == "float32" else torch.bfloat16

    def activations(self, device: torch.device, side: int = 32) -> Tensor:
        """Draw activations whose group size, or half the side of a plane, fills the tile."""
        side = 7 if self.layout == "odd" else side
        x = torch.randn(POSITIONS // side**2, CHANNELS, side, side, device=device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels" else x


FILTERS = (
    "spectral_filter",
    "cross_spectrum",
)  # kernels on planes, whose size in the table is the padded half of a side
SPECTRA = ("kernel_spectrum", "kernel_spectrum_backward")


def launching(kernel: str) -> list[Op]:
    """Return the ops that launch a kernel."""
    return [op for op in OPS.values() if kernel in op.kernels]


# Kernel -> its smallest block, where that is not 1: tensor cores want tiles of 16.
LEAST = dict.fromkeys(("moments", "cross_moments", "mix", "stacked_mix", "newton"), 16)
WITHIN = ("merge", "newton")  # kernels whose block is no larger than the tile


def call_of(case: Case, device: torch.device) -> Call:
    """Return a call of the ops that launch the kernel and as few others as possible, on data made for the case."""
    side = 2 * case.size - 2 if case.kernel in FILTERS else 34 if case.kernel in SPECTRA else 32
    x = case.activations(device, side)
    if case.kernel == "merge":
        x = x[:8]  # little to read, the same number of parts
    ops = launching(case.kernel)
    fewest = min(len(op.kernels) for op in ops)
    given = [
        (op, next(iter(op.samples(x, CHANNELS if case.kernel in SPECTRA else case.size))))
        for op in ops
        if len(op.kernels) == fewest
    ]

    def call() -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for op, arguments in given:
            fresh = [copied(value) if changed else value for value, changed in zip(arguments, op.changes, strict=True)]
            result = op.raw(*fresh)
            results += [result] if isinstance(result, Tensor) else result
            results += [tensor for value, changed in zip(fresh, op.changes, strict=True) if changed for tensor in value]
        return tuple(results)

    return call


def copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def cases(rows: Iterable[Key], kernels: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    """Return the rows to tune, one for all architectures; no kernel or no size means all of them."""
    wanted = dict.fromkeys(Case(*key[:4]) for key in rows)
    kernels, sizes = tuple(kernels), tuple(sizes)
    return [c for c in wanted if (not kernels or c.kernel in kernels) and (not sizes or c.size in sizes)]


def candidates(case: Case, base: Config) -> list[Config]:
    """Return the configuration in force, then its neighbours of the same precision.

    Block and warps are halved and doubled, stages are one less and one more.
    """
    most = ELEMENTWISE if case.size == 1 else case.size if case.kernel in WITHIN else LIMITS["block"][1]
    limits = LIMITS | {"block": (LEAST.get(case.kernel, 1), most)}

    def near(name: str) -> list[int]:
        value, (least, most) = getattr(base, name), limits[name]
        choices = (value - 1, value, value + 1) if name == "stages" else (value // 2, value, 2 * value)
        return [n for n in choices if least <= n <= most]

    grid = itertools.product(*map(near, limits))
    found = [replace(base, block=block, warps=warps, stages=stages) for block, warps, stages in grid]
    return [base, *(config for config in found if config != base)]


def fastest(options: Iterable[Config], seconds: Callable[[Config], float]) -> tuple[Config, dict[Config, float]]:
    """Return the option with the smallest time, and all times; one whose measurement raises is left out."""
    times: dict[Config, float] = {}
    reason = "there was none"
    for option in options:
        try:
            times[option] = seconds(option)
        except Exception as error:  # does not compile, takes too many resources, or is wrong
            reason = describe(error)
    if not times:
        raise RuntimeError(f"expected one configuration that works; {reason}")
    return min(times, key=lambda option: times[option]), times


def measurer(case: Case, arch: int, device: torch.device) -> Callable[[Config], float]:
    """Return a function that measures the seconds of a configuration.

    They are the median of some calls, after the result has passed.
    """
    with normkernels.use_backend("eager"):
        call = call_of(case, device)
        expected = call()
    clock = clock_for(device)

    def seconds(config: Config) -> float:
        _warnings.warned.clear()  # a candidate that does not compile falls back to eager with a warning: it is out
        with (
            warnings.catch_warnings(action="error"),
            normkernels.use_backend("triton"),
            configs.replaced({(*case, arch): config}),
        ):
            for got, exact in zip(call(), expected, strict=True):
                compare(case.kernel, "a result", got, exact.double(), TOLERANCE[case.dtype])
            times = [clock.time(lambda: void(call())) for _ in range(WARMUP + ROUNDS)]
        return statistics.median(times[WARMUP:])

    return seconds


def void(_: Any) -> None:
    """Return nothing, as what is timed must not."""


def write_table(path: Path, table: Mapping[Key, Config]) -> None:
    """Write the table in the format of the package's, a row on each line."""
    rows = [
        {"kernel": kernel, "size": size, "layout": layout, "type": kind, "arch": arch, **vars(config)}
        for (kernel, size, layout, kind, arch), config in sorted(table.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="table to write (JSON)")
    parser.add_argument(
        "--kernel",
        action="append",
        choices=sorted({key[0] for key in configs.table()}),
        default=[],
        help="only this (default: all)",
    )
    parser.add_argument("--size", action="append", type=int, default=[], help="only tiles of this size (default: all)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device and a torch built for it, found none")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    arch = support.architecture(device)
    torch.manual_seed(0)
    table: dict[Key, Config] = {}
    failed = 0
    for case in cases(configs.table(), options.kernel, options.size):
        name = " ".join(map(str, filter(None, case)))
        try:
            base = configs.configuration(*case[:3], case.dtype, arch)
            best, times = fastest(candidates(case, base), measurer(case, arch, device))
        except (RuntimeError, LookupError, support.Unsupported) as error:
            failed += 1
            print(f"{name}: {describe(error)}", file=sys.stderr, flush=True)
            continue
        table[(*case, arch)] = best
        write_table(options.out, table)
        before = times.get(base, math.nan)
        print(f"{name}: {before * 1e6:.1f} us -> {times[best] * 1e6:.1f} us, {best} of {len(times)}", flush=True)
    print(f"{options.out}: {len(table)} rows; NORMKERNELS_TRITON_CONFIGS={options.out} puts them in force")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    sys.exit(main())
