"""The fastest backend for each op, out of a run of the suite `gpu`, as ORDER in dispatch/choose.py should have it."""

from __future__ import annotations

import json
import math
from collections import defaultdict

from bench.measure.results import Results

# Comparison -> the primitives whose kernels it spends its time in.
PRIMITIVES = {
    "gpu_norm": ("moments", "whiten", "iter_norm"),
    "gpu_pop_norm": ("pop_norm",),
    "gpu_precondition": ("precondition",),
    "gpu_newton": ("inverse_sqrt",),
    "gpu_filter": ("spectral_filter",),
    "gpu_spectrum": ("kernel_spectrum",),
}
BACKENDS = ("cuda", "triton", "eager")


def ops_of(comparison: str) -> tuple[str, ...]:
    """Return the ops whose kernels a comparison spends its time in."""
    from normkernels.dispatch.record import OPS  # late: results can be read where the package is broken

    return tuple(op.name for op in OPS.values() if op.primitive in PRIMITIVES[comparison])


def slowness(results: Results, kernel: str) -> dict[str, float]:
    """Return backend -> its time over the fastest one's, the geometric mean over all workloads; fastest first.

    A backend without a figure somewhere has failed there and is left out.
    """
    times: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for record in results.find(kernel):
        for backend in BACKENDS:
            if record.provider.endswith(f" ({backend})"):
                times[record.provider.removesuffix(f" ({backend})"), record.mode, record.shape, record.dtype][
                    backend
                ] = record.p50
    rounds = list(times.values())
    complete = [backend for backend in BACKENDS if rounds and all(backend in found for found in rounds)]
    means = {
        backend: math.exp(sum(math.log(found[backend] / min(found.values())) for found in rounds) / len(rounds))
        for backend in complete
    }
    return dict(sorted(means.items(), key=lambda item: item[1]))


def order(results: Results) -> dict[str, list[str]]:
    """Return the order as NORMKERNELS_BACKEND_ORDER takes it: nothing comes after eager, which serves everything."""
    found: dict[str, list[str]] = {}
    for kernel in PRIMITIVES:
        backends = list(slowness(results, kernel))
        if "eager" in backends:
            found |= dict.fromkeys(ops_of(kernel), backends[: backends.index("eager") + 1])
    return found


def section(results: Results) -> list[str]:
    """Return the lines of the report about the backends."""
    rows = [
        f"* {', '.join(ops_of(kernel))}: " + ", ".join(f"{backend} {ratio:.2f}" for backend, ratio in measured.items())
        for kernel in PRIMITIVES
        if (measured := slowness(results, kernel))
    ]
    if not rows:
        return []
    text = json.dumps(order(results), indent=1)
    return [
        "## Backends",
        "",
        "Time over that of the fastest backend, the geometric mean over all shapes and types:",
        "",
        *rows,
        "",
        "As a file, for NORMKERNELS_BACKEND_ORDER:",
        "",
        "```json",
        text,
        "```",
        "",
    ]
