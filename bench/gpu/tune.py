"""Find the fastest configuration of every Triton kernel on this GPU.

    python -m bench.gpu.tune --out configs.json [--kernel mix] [--size 64]
    NORMKERNELS_TRITON_CONFIGS=configs.json python train.py

Opt-in: the package itself never tunes. It times the op that a kernel belongs to, once for each candidate around the
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normkernels
from bench.measure.timing import clock_for, describe
from bench.measure.workload import TOLERANCE, compare
from bench.suites.gradients import EPS1, EPS2, make_layers
from normkernels import _warnings
from normkernels.triton import configs, support
from normkernels.triton.configs import Config, Key

ROUNDS, WARMUP = 20, 3
LIMITS = {"block": (1, 256), "warps": (1, 16), "stages": (1, 4)}
ELEMENTWISE = 2048  # columns of a tile of single channels, which is multiplied by nothing, at most
POSITIONS, CHANNELS = 128 * 32 * 32, 256  # activations of 128 MiB in float32, more than a cache holds

Call = Callable[[], Tensor | tuple[Tensor, ...]]


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


@dataclass(frozen=True)
class Tuned:
    """A kernel's tuning; call: the op that launches it, on data made for a case.

    least: smallest block; tensor cores want tiles of 16. within: a block is no larger than the tile.
    """

    call: Callable[[Case, torch.device], Call]
    least: int = 1
    within: bool = False


raw = torch.ops.normkernels


def moments(case: Case, device: torch.device) -> Call:
    x = case.activations(device)
    return lambda: raw.moments(x, case.size, False)


def cross_moments(case: Case, device: torch.device) -> Call:
    x, y = case.activations(device), case.activations(device)
    mean = raw.moments(x, case.size, False)[0]
    return lambda: raw.cross_moments(y, x, mean, case.size)


def merge(case: Case, device: torch.device) -> Call:
    x = case.activations(device)[:8]  # little to read, the same number of parts
    return lambda: raw.moments(x, case.size, False)


def mix(case: Case, device: torch.device) -> Call:
    x = case.activations(device)
    mean, _, cov = raw.moments(x, case.size, False)
    W = raw.inverse_sqrt(cov, 5, 1e-5, False, False)[0]
    return lambda: raw.whiten(x, mean, W, None, None)


def stacked_mix(case: Case, device: torch.device) -> Call:
    x, dy = case.activations(device), case.activations(device)
    weight = torch.ones(CHANNELS, device=device)
    if case.size == 1:
        options = 4.0, 1e-5, True, True
        _, *statistics = raw.pop_norm(x, weight, weight, *options)
        return lambda: raw.pop_norm_backward(dy, x, weight, weight, *statistics, *options)
    mean = raw.moments(x, case.size, False)[0]
    matrix = torch.randn(CHANNELS // case.size, case.size, 2 * case.size, device=device)
    return lambda: raw.stacked_mix(dy, x, mean, mean, matrix, mean)


def newton(case: Case, device: torch.device) -> Call:
    z = torch.randn(4, case.size, 2 * case.size, device=device)
    cov, grad = z @ z.mT / z.shape[2], torch.randn(4, case.size, case.size, device=device)

    def call() -> tuple[Tensor, ...]:
        W, saved_matrix, scale = raw.inverse_sqrt(cov, 5, 1e-5, False, False)
        return W, raw.inverse_sqrt_backward(grad, W, saved_matrix, scale, 5, False, False)

    return call


def spectral_filter(case: Case, device: torch.device) -> Call:
    n = 2 * case.size - 2
    z, v = case.activations(device, n), torch.rand(CHANNELS, n, n, device=device)
    return lambda: raw.spectral_filter(z, v, [0, 1, 0, 1], [0, 1, n, 0, 1, n])


def cross_spectrum(case: Case, device: torch.device) -> Call:
    n = 2 * case.size - 2
    y, z = case.activations(device, n), case.activations(device, n)
    return lambda: raw.cross_spectrum(y, z, [n, n], [0, 1, 0, 1], [0, 1, 0, 1])


def kernel_spectrum(case: Case, device: torch.device) -> Call:
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device)
    return lambda: raw.kernel_spectrum(weight, [34, 34], 1e-8, [1, 1])


def kernel_spectrum_backward(case: Case, device: torch.device) -> Call:
    weight, grad = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device), torch.randn(CHANNELS, 34, 34, device=device)
    return lambda: raw.kernel_spectrum_backward(grad, weight, 1e-8, [1, 1])


def precondition(case: Case, device: torch.device) -> Call:
    layers = make_layers(case.dtype, device)
    originals = [gradient.clone() for gradient in layers.gradients()]

    def call() -> tuple[Tensor, ...]:
        torch._foreach_copy_(layers.gradients(), originals)
        normkernels.ops.precondition(*layers, EPS1, EPS2)
        return tuple(gradient.clone() for gradient in layers.gradients()[-2:])

    return call


KERNELS = {
    "moments": Tuned(moments, least=16),
    "cross_moments": Tuned(cross_moments, least=16),
    "mix": Tuned(mix, least=16),
    "stacked_mix": Tuned(stacked_mix, least=16),
    "merge": Tuned(merge, within=True),
    "newton": Tuned(newton, least=16, within=True),
    "spectral_filter": Tuned(spectral_filter),
    "cross_spectrum": Tuned(cross_spectrum),
    "kernel_spectrum": Tuned(kernel_spectrum),
    "kernel_spectrum_backward": Tuned(kernel_spectrum_backward),
    "precondition": Tuned(precondition),
}


def cases(rows: Iterable[Key], kernels: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    """Return the rows to tune, one for all architectures; no kernel or no size means all of them."""
    wanted = dict.fromkeys(Case(*key[:4]) for key in rows)
    kernels, sizes = tuple(kernels) or KERNELS, tuple(sizes)
    return [case for case in wanted if case.kernel in kernels and (not sizes or case.size in sizes)]


def candidates(case: Case, base: Config) -> list[Config]:
    """Return the configuration in force, then its neighbours of the same precision.

    Block and warps are halved and doubled, stages are one less and one more.
    """
    tuned = KERNELS[case.kernel]
    most = ELEMENTWISE if case.size == 1 else case.size if tuned.within else LIMITS["block"][1]
    limits = LIMITS | {"block": (tuned.least, most)}

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


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measurer(case: Case, arch: int, device: torch.device) -> Callable[[Config], float]:
    """Return a function that measures the seconds of a configuration.

    They are the median of some calls, after the result has passed.
    """
    with normkernels.use_backend("eager"):
        call = KERNELS[case.kernel].call(case, device)
        expected = as_tuple(call())
    clock = clock_for(device)

    def seconds(config: Config) -> float:
        _warnings.warned.clear()  # a candidate that does not compile falls back to eager with a warning: it is out
        with (
            warnings.catch_warnings(action="error"),
            normkernels.use_backend("triton"),
            configs.replaced({(*case, arch): config}),
        ):
            for got, exact in zip(as_tuple(call()), expected, strict=True):
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
    parser.add_argument("--kernel", action="append", choices=KERNELS, default=[], help="only this (default: all)")
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
