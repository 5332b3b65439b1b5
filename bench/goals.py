"""The ratios this project wants to reach, and whether a run reached them.

Goals are ratios measured side by side in one run (forward and backward unless said otherwise), float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import Ratio, Results
from bench.suites import (
    BATCHNORM,
    CONV,
    CONV2D,
    CONV_NORM,
    GROUPED,
    ITERNORM,
    PADDED_FFT,
    PLAIN,
    PLAIN_DBN,
    SPECTRUM,
    TRANSPOSED,
)

NARROW, WIDE = "64x64x32x32", "64x128x32x32"


@dataclass(frozen=True)
class Goal:
    """`provider` takes at most `limit` times as long as `relative_to`."""

    kernel: str
    shape: str
    provider: str
    relative_to: str
    limit: float
    device_type: str = "cpu"
    mode: str = "full"
    dtype: str = "float32"


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    measured: Ratio | None

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured.p50 <= self.goal.limit else "missed"


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
    Goal("kernel_spectrum", "512x512x3x3", SPECTRUM, PADDED_FFT, 1 / 20, mode="inference"),
    Goal("table_a1", NARROW, ITERNORM, CONV, 0.7, device_type="cuda"),
    Goal("table_a1", WIDE, ITERNORM, CONV, 0.5, device_type="cuda"),
    Goal("table_a1", NARROW, ITERNORM, PLAIN_DBN, 1 / 30, device_type="cuda"),
    Goal("shapes", "256x64x56x56", ITERNORM, BATCHNORM, 1.0, device_type="cuda"),
    Goal("shapes", "256x256x14x14", ITERNORM, CONV, 0.25, device_type="cuda"),
    Goal("shapes", "256x512x7x7", ITERNORM, CONV, 0.15, device_type="cuda"),
)


def evaluate(results: Results, goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """One verdict per goal of the device that was measured."""
    return [
        Verdict(
            goal,
            results.ratio(goal.kernel, goal.provider, goal.relative_to, goal.mode, goal.shape, goal.dtype),
        )
        for goal in goals
        if goal.device_type == results.device_type
    ]


def where_we_lose(results: Results) -> list[Ratio]:
    """Every ratio above one of a layer of ours, worst first: the other provider was faster there."""
    return sorted((r for r in results.ratios if r.ours and r.p50 > 1.0), key=lambda r: -r.p50)
