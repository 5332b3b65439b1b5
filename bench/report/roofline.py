"""Bytes, operations and the time they take at least, for each kernel of a training step.

    python -m bench.report.roofline [--extension]

The counts follow from the shapes. The rates are a GPU's, by default an H200's. Times from them are predictions.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch

from bench.suites.gradients import resnet50
from normkernels.dispatch import compiled
from normkernels.dispatch.record import OPS
from normkernels.triton.configs import configuration, padded
from normkernels.triton.launch import WARPS, WAVES

# (N, C, H, W), group size
SHAPES = [
    ((64, 64, 32, 32), 64),
    ((64, 128, 32, 32), 128),
    ((256, 64, 56, 56), 64),
    ((256, 256, 14, 14), 64),
    ((256, 512, 7, 7), 64),
]
SINGLE = [(64, 64, 32, 32), (256, 64, 56, 56), (256, 512, 7, 7)]  # for POP-Norm
SPLIT = 3  # tensor-core products for one exact one


@dataclass(frozen=True)
class Rates:
    """Rates of a GPU; bandwidth: bytes/s of a copy; tf32, bf16: dense FLOP/s of single products on random data."""

    name: str = "H200"
    processors: int = 132
    bandwidth: float = 4.3e12
    tf32: float = 395e12
    bf16: float = 790e12


@dataclass(frozen=True)
class Work:
    kernel: str
    bytes: int
    flops: float  # on tensor cores, all three products of a split one counted
    rate: float

    def floor(self, rates: Rates) -> float:
        return max(self.bytes / rates.bandwidth, self.flops / self.rate)


def training_step(shape: tuple[int, ...], d: int, itemsize: int, rates: Rates) -> list[Work]:
    """Return the kernels that pass over activations. The small matrix function is bound by latency: see the page."""
    n, c, h, w = shape
    m, size = n * h * w, padded(d)
    groups = c // d
    one_pass = n * c * h * w * itemsize
    parts = max(1, WAVES * rates.processors // groups)
    partials = groups * parts * (size * size + 2 * size) * 4
    product = SPLIT * 2.0 * size * size * groups * m
    mixing = rates.tf32 if itemsize == 4 else rates.bf16
    return [
        Work("partial_moments", one_pass + partials, product, rates.tf32),
        Work("finish_forward: merge", partials, 0.0, rates.tf32),
        Work("mix", 2 * one_pass, product, mixing),
        Work("partial_cross", 2 * one_pass + partials, product, rates.tf32),
        Work("finish_backward: merge", partials, 0.0, rates.tf32),
        Work("stacked mix", 3 * one_pass, 2 * product, mixing),
    ]


def pop_norm_step(shape: tuple[int, ...], itemsize: int, rates: Rates) -> list[Work]:
    """Return the kernels of POP-Norm, positions innermost. No product of theirs runs on tensor cores."""
    n, c, h, w = shape
    one_pass = n * c * h * w * itemsize
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    config = configuration("moments", 1, "positions", dtype, 90)
    parts = max(1, WARPS // config.warps * rates.processors // -(-c // config.rows))
    partials = 3 * parts * c * 4
    passes = {"partial_channel_moments": 1, "normalize": 2, "partial_channel_cross": 2, "normalize_backward": 3}
    return [Work(kernel, count * one_pass + partials, 0.0, rates.tf32) for kernel, count in passes.items()]


def bytes_table(rates: Rates) -> str:
    """Return the table of what bytes alone bound: POP-Norm's training step, BNP's change of ResNet-50's gradients."""
    lines = ["| | type | kernel | MB | floor, us |", "|---|---|---|---|---|"]
    for kind, itemsize in (("fp32", 4), ("bf16", 2)):
        for shape in SINGLE:
            works = pop_norm_step(shape, itemsize, rates)
            for work in works if shape == SINGLE[1] else ():
                lines.append(
                    f"| POP-Norm {shape} | {kind} | {work.kernel} | {work.bytes / 1e6:.1f} | "
                    f"{1e6 * work.floor(rates):.1f} |"
                )
            moved, floor = sum(work.bytes for work in works), sum(work.floor(rates) for work in works)
            lines.append(f"| POP-Norm {shape} | {kind} | **together** | {moved / 1e6:.1f} | **{1e6 * floor:.1f}** |")
        moved = 2 * itemsize * sum(map(math.prod, resnet50()))
        lines.append(
            f"| gradients of ResNet-50 | {kind} | precondition_kernel | {moved / 1e6:.1f} | "
            f"**{1e6 * moved / rates.bandwidth:.1f}** |"
        )
    return "\n".join(lines)


def table(rates: Rates) -> str:
    lines = [
        "| (N, C, H, W), d | type | kernel | MB | tensor-core GFLOP | floor, us | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, d in SHAPES:
        for kind, itemsize in (("fp32", 4), ("bf16", 2)):
            works = training_step(shape, d, itemsize, rates)
            for work in works:
                bound = "bytes" if work.bytes / rates.bandwidth >= work.flops / work.rate else "products"
                lines.append(
                    f"| {shape}, {d} | {kind} | {work.kernel} | {work.bytes / 1e6:.1f} | {work.flops / 1e9:.1f} | "
                    f"{1e6 * work.floor(rates):.1f} | {bound} |"
                )
            ideal = 8 * itemsize * shape[0] * shape[1] * shape[2] * shape[3]
            lines.append(
                f"| {shape}, {d} | {kind} | **together** (8 passes alone: {1e6 * ideal / rates.bandwidth:.1f} us) | "
                f"{sum(work.bytes for work in works) / 1e6:.1f} | {sum(work.flops for work in works) / 1e9:.1f} | "
                f"**{1e6 * sum(work.floor(rates) for work in works):.1f}** | |"
            )
    return "\n".join(lines)


def training_launches(x: torch.Tensor, d: int) -> list[dict[str, Any]]:
    """Return the launches of iter_norm and of its backward."""
    ops = [op for op in OPS.values() if op.primitive == "iter_norm"]
    return [one for op in ops for one in compiled.launch_plan(op.name, *next(iter(op.samples(x, d))))]


def extension_table(rates: Rates) -> str:
    """Return the table of the compiled extension's launches, and of the bytes that it says it needs."""
    lines = [
        "| (N, C, H, W), d | type | kernel | blocks x threads | KiB shared | MB | floor of the bytes, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, d in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for one in training_launches(torch.empty(shape, dtype=dtype, device="meta"), d):
                moved = one["read_bytes"] + one["written_bytes"]
                lines.append(
                    f"| {shape}, {d} | {dtype} | {one['kernel']} | {one['grid'][0]} x {one['threads']} | "
                    f"{one['shared_bytes'] / 1024:.0f} | {moved / 1e6:.1f} | {1e6 * moved / rates.bandwidth:.1f} |"
                )
    return "\n".join(lines).replace("torch.", "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.roofline", description=__doc__.splitlines()[0])
    defaults = Rates()
    parser.add_argument("--name", default=defaults.name)
    parser.add_argument("--processors", type=int, default=defaults.processors, help="multiprocessors")
    parser.add_argument("--bandwidth", type=float, default=defaults.bandwidth, help="bytes/s of a copy")
    parser.add_argument("--tf32", type=float, default=defaults.tf32, help="FLOP/s")
    parser.add_argument("--bf16", type=float, default=defaults.bf16, help="FLOP/s")
    parser.add_argument(
        "--extension", action="store_true", help="of the compiled extension instead of Triton's kernels"
    )
    options = vars(parser.parse_args())
    chosen = (extension_table,) if options.pop("extension") else (table, bytes_table)
    print("\n\n".join(one(Rates(**options)) for one in chosen))


if __name__ == "__main__":
    main()
