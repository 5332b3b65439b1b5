"""The ratios this project wants to reach, and whether a run reached them.

Goals are ratios measured side by side in one run (forward and backward unless said otherwise), float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure.results import Ratio, Record, Results
from bench.providers.names import (
    BATCHNORM,
    CONV,
    CONV2D,
    CONV_NORM,
    COPY,
    FILTER,
    GROUPED,
    ITERNORM,
    PADDED_FFT,
    PLAIN,
    PLAIN_DBN,
    POP_NORM,
    SPECTRUM,
    TRANSPOSED,
)
from bench.suites.bnp import VANILLA
from bench.suites.fold import FOLDED
from bench.suites.gpu_suite import (
    BATCHNORM_CL,
    COMPILED,
    CONV_CL,
    FFT_SPECTRUM,
    FILTER_SPECTRUM,
    FLOOR,
    ITERNORM_CL,
    ITERNORM_TRITON,
    PLANES,
    POP_NORM_CL,
    ROOT,
    ROOT_GRAPH,
)
from bench.suites.gradients import FOREACH_COPY, PRECONDITION

NARROW, WIDE, IMAGENET = "64x64x32x32", "64x128x32x32", "256x64x56x56"
# Memory layouts: where a user may choose, the best one of each side counts.
ITERNORMS, BATCHNORMS, CONVS = (ITERNORM, ITERNORM_CL), (BATCHNORM, BATCHNORM_CL), (CONV, CONV_CL)
POP_NORMS, RESNET50 = (POP_NORM, POP_NORM_CL), "25502912"


@dataclass(frozen=True)
class Goal:
    """The fastest of `providers` takes at most `limit` times as long as the fastest of `relative_to`.

    relative_to: without any, `limit` is a time in ms. stretch: what would be better still.
    """

    kernel: str
    shape: str
    providers: str | tuple[str, ...]
    relative_to: str | tuple[str, ...]
    limit: float
    stretch: float | None = None
    device_type: str = "cpu"
    mode: str = "full"
    dtype: str = "float32"

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Both sides, each as a tuple."""
        first, second = ((s,) if isinstance(s, str) else s for s in (self.providers, self.relative_to))
        return first, second


@dataclass(frozen=True)
class Verdict:
    """The state of a goal; measured: a ratio, or a time where the goal is one; None where a provider has no figure."""

    goal: Goal
    measured: Ratio | Record | None

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.goal.stretch is not None and self.measured.p50 <= self.goal.stretch:
            return "met, and its stretch"
        return "met" if self.measured.p50 <= self.goal.limit else "missed"


def on_gpu(
    kernel: str,
    shape: str,
    providers: str | tuple[str, ...],
    relative_to: str | tuple[str, ...],
    limit: float,
    stretch: float,
    dtype: str = "float32",
) -> Goal:
    return Goal(kernel, shape, providers, relative_to, limit, stretch, "cuda", dtype=dtype)


GOALS = (
    Goal("table_a1", NARROW, ITERNORM, CONV, 0.30),
    Goal("table_a1", WIDE, ITERNORM, CONV, 0.25),
    Goal("table_a1", NARROW, ITERNORM, BATCHNORM, 2.5),
    Goal("table_a1", WIDE, ITERNORM, BATCHNORM, 2.5),
    Goal("table_a1", NARROW, ITERNORM, PLAIN, 0.5),
    Goal("table_a1", WIDE, ITERNORM, PLAIN, 0.5),
    Goal("shapes", "256x512x7x7", ITERNORM, TRANSPOSED, 1.0),
    Goal("inference_d64", NARROW, ITERNORM, GROUPED, 1.2, mode="inference"),
    Goal("inference_d64", WIDE, ITERNORM, GROUPED, 1.2, mode="inference"),
    Goal("inference_d64", f"{NARROW} channels_last", ITERNORM, GROUPED, 1.2, mode="inference"),
    Goal("inference_d16", WIDE, "DBN(16)", GROUPED, 1.2, mode="inference"),
    Goal("conv_norm", "32x64x32x32", CONV_NORM, CONV2D, 1.8),
    Goal("conv_norm", "32x64x32x32 stride 2", CONV_NORM, CONV2D, 4.0),
    Goal("fold", "8x3x32x32", FOLDED, VANILLA, 1.02, mode="inference"),
    Goal("kernel_spectrum", "512x512x3x3", SPECTRUM, PADDED_FFT, 1 / 20, mode="inference"),
    on_gpu("gpu_norm", IMAGENET, ITERNORM, FLOOR, 1.25, 1.15),
    on_gpu("gpu_norm", IMAGENET, ITERNORMS, BATCHNORMS, 1.0, 0.8),
    on_gpu("gpu_norm", IMAGENET, ITERNORMS, BATCHNORMS, 1.0, 0.8, "bfloat16"),
    on_gpu("gpu_norm", IMAGENET, ITERNORM, BATCHNORM, 0.5, 0.3, "bfloat16"),
    on_gpu("gpu_norm", NARROW, ITERNORMS, CONVS, 0.7, 0.5),
    on_gpu("gpu_norm", WIDE, ITERNORMS, CONVS, 0.5, 0.4),
    on_gpu("gpu_norm", "256x256x14x14", ITERNORMS, CONVS, 0.25, 0.2),
    on_gpu("gpu_norm", "256x512x7x7", ITERNORMS, CONVS, 0.15, 0.12),
    on_gpu("gpu_norm", NARROW, ITERNORM, PLAIN_DBN, 1 / 30, 1 / 50),
    on_gpu("gpu_norm", NARROW, ITERNORM, COMPILED, 0.45, 0.3),
    on_gpu("gpu_norm", IMAGENET, ITERNORM, COMPILED, 0.45, 0.3),
    on_gpu("gpu_pop_norm", IMAGENET, POP_NORM, FLOOR, 1.25, 1.15),
    *(on_gpu("gpu_pop_norm", IMAGENET, POP_NORMS, BATCHNORMS, 1.0, 0.8, kind) for kind in ("float32", "bfloat16")),
    on_gpu("gpu_pop_norm", NARROW, POP_NORMS, BATCHNORMS, 1.0, 0.8),
    Goal("gpu_precondition", RESNET50, PRECONDITION, FOREACH_COPY, 1.5, 1.25, "cuda", "inference"),
    Goal("gpu_precondition", RESNET50, PRECONDITION, FOREACH_COPY, 1.5, 1.25, "cuda", "inference", "bfloat16"),
    on_gpu("gpu_newton", "1x64x64", (ROOT, ROOT_GRAPH), (), 12e-3, 7.5e-3),
    on_gpu("gpu_filter", "256x64x34x34", FILTER, COPY, 1.25, 1.1),
    on_gpu("gpu_filter", "256x64x30x30", FILTER, COPY, 1.25, 1.1),
    on_gpu("gpu_filter", "256x64x58x58", FILTER, COPY, 1.6, 1.3),
    Goal("gpu_overhead", "2x64x8x8", ITERNORM, ITERNORM_TRITON, 0.5, device_type="cuda"),
    *(on_gpu("gpu_filter", f"256x64x{n}x{n}", FILTER_SPECTRUM, FFT_SPECTRUM, 0.2, 0.12) for n in PLANES),
)


def evaluate(results: Results, goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """Return one verdict per goal of the device that was measured."""
    return [Verdict(goal, measured(results, goal)) for goal in goals if goal.device_type == results.device_type]


def measured(results: Results, goal: Goal) -> Ratio | Record | None:
    """Return the figure that a goal is about; None where it needs one that the run does not have.

    The others must all have been measured, since the missing one may be the fastest. One of ours is enough.
    """
    ours, others = goal.sides
    found: list[Ratio | Record] = []
    if not others:
        times = results.find(goal.kernel, mode=goal.mode)
        found += [r for r in times if (r.shape, r.dtype) == (goal.shape, goal.dtype) and r.provider in ours]
    for name in ours if others else ():
        ratios = [results.ratio(goal.kernel, name, o, goal.mode, goal.shape, goal.dtype) for o in others]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) == len(others):
            found.append(max(known, key=lambda ratio: ratio.p50))  # to the fastest of the others
    return min(found, key=lambda figure: figure.p50, default=None)


def where_we_lose(results: Results) -> list[Ratio]:
    """Return every ratio above one of a layer of ours, worst first: the other provider was faster there.

    Ratios to the floor are left out: nothing can beat it.
    """
    lost = (r for r in results.ratios if r.ours and r.p50 > 1.0 and r.relative_to != FLOOR)
    return sorted(lost, key=lambda r: -r.p50)
