"""Writes what a run found: records.csv, ratios.csv, failures.csv, README.md with tables, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.measure.results import Failure, Ratio, Results
from bench.providers.names import (
    BATCHNORM,
    CONV,
    CONV2D,
    COPY,
    FFT,
    GROUPED,
    PADDED_FFT,
    PLAIN,
    PLAIN_CONV_NORM,
    PLAIN_DBN,
    PLAIN_POP_NORM,
    TRANSPOSED,
    VGG_ITERNORM,
)
from bench.report import order
from bench.report.tables import number, spread, table
from bench.suites.bnp import BATCH_NORM, VANILLA
from bench.suites.goals import Verdict, evaluate, where_we_lose
from bench.suites.gpu_suite import BATCHNORM_CL, COMPILED, CONV_CL, FFT_SPECTRUM, FLOOR, ITERNORM_TRITON
from bench.suites.gradients import FOREACH_COPY

TITLES = {
    "table_a1": "Table A1: whitening against a 3x3 convolution of the same width",
    "vgg_step": "One training step of the VGG of Table A2",
    "scaling_d": "Cost against the width d (one group)",
    "scaling_T": "Cost against the number of iterations T",
    "scaling_m": "Cost against the number of samples m",
    "scaling_group": "Cost against the group size, 256 channels",
    "shapes": "Planes of an ImageNet network",
    "layout": "Memory layout",
    "dtype": "Type",
    "inference_d64": "Inference, groups of 64",
    "inference_d16": "Inference, groups of 16",
    "conv_norm": "ConvNorm and weight normalizations against the convolution, 3x3",
    "spectral_filter": "The filter against a copy and torch.fft",
    "kernel_spectrum": "The spectrum of a 3x3 convolution's kernels on planes of 34 x 34",
    "pop_norm": "POP-Norm against BatchNorm",
    "bnp_step": "One training step of a network with two hidden layers of 100 (BNP, Table 1), by mini-batch",
    "fold": "Evaluation of a ResNet-18 for CIFAR, its norms folded into its convolutions",
    "memory": "Memory of one training step",
    "gpu_norm": "IterNorm on a GPU",
    "gpu_pop_norm": "POP-Norm on a GPU",
    "gpu_precondition": "BNP's change of ResNet-50's gradients, against a copy of them",
    "gpu_newton": "Newton's iteration alone, G x d x d, forward and backward",
    "gpu_filter": "ConvNorm's filter on a GPU, against copy and torch.fft",
    "gpu_spectrum": "ConvNorm's spectrum on a GPU, planes of 34 x 34",
    "gpu_overhead": "What a call costs the host, which queues the work and does not wait for it",
}
MODES = {"full": "forward + backward", "forward": "forward", "backward": "backward", "inference": "inference"}
SHOWN_LOSSES = 25
# Order of the ratio columns.
REFERENCES = (
    FLOOR, CONV, CONV_CL, GROUPED, BATCHNORM, BATCHNORM_CL, COMPILED, PLAIN, PLAIN_DBN, TRANSPOSED, VGG_ITERNORM,
    CONV2D, PLAIN_CONV_NORM, COPY, FFT, PADDED_FFT, FFT_SPECTRUM, ITERNORM_TRITON, FOREACH_COPY, PLAIN_POP_NORM,
    VANILLA, BATCH_NORM,
)  # fmt: skip


def kernels(results: Results) -> list[str]:
    """Return what was measured, in the order of TITLES."""
    found = {r.kernel for r in results.records}
    return [k for k in TITLES if k in found] + sorted(found - TITLES.keys())


def time_tables(results: Results, kernel: str) -> str:
    """Return one table per comparison of a suite: time, GB/s and every ratio that was formed."""
    parts = []
    unit, scale = ("us", 1e3) if results.device_type == "cuda" else ("ms", 1.0)
    times = results.find(kernel)
    for where in dict.fromkeys((r.mode, r.shape, r.dtype) for r in times):
        here = [r for r in times if (r.mode, r.shape, r.dtype) == where]
        ratios = {
            (r.provider, r.relative_to): r
            for r in results.ratios
            if r.kernel == kernel and (r.mode, r.shape, r.dtype) == where
        }
        others = sorted({key[1] for key in ratios}, key=REFERENCES.index)
        rates = {r.provider: r.p50 for r in results.find(kernel, "gbytes_per_s") if (r.mode, r.shape, r.dtype) == where}
        header = [
            "provider",
            f"{unit}, median [p20, p80]",
            *(["GB/s"] if rates else []),
            *(f"/ {o}" for o in others),
        ]
        rows = []
        for r in here:
            cells = [r.provider, spread(r.p50 * scale, r.p20 * scale, r.p80 * scale)]
            if rates:
                cells.append(number(rates[r.provider]))
            for other in others:
                found = ratios.get((r.provider, other))
                cells.append("1" if other == r.provider else number(found.p50) if found else "-")
            rows.append(cells)
        mode, shape, dtype = where
        parts.append(f"{MODES[mode]}, {shape}, {dtype}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def memory_table(results: Results) -> str:
    metrics = ("saved_MiB", "saved_over_input", "peak_MiB", "peak_over_input")
    rows: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for metric in metrics:
        for record in results.find("memory", metric):
            rows.setdefault((record.mode, record.shape), {}).setdefault(record.provider, {})[metric] = record.p50
    header = ["provider", "saved for backward, MiB", "/ input", "peak of a step, MiB", "/ input"]
    return "\n\n".join(
        f"{MODES[mode]}, {shape}\n\n"
        + table(header, [[name, *(number(values[m]) for m in metrics)] for name, values in here.items()])
        for (mode, shape), here in rows.items()
    )


def goals_table(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        goal, found = verdict.goal, verdict.measured
        ours, others = (" or ".join(side) for side in goal.sides)
        what, scale = (f"{ours} / {others}", 1.0) if others else (f"{ours}, us", 1e3)
        limit = number(goal.limit * scale)
        if goal.stretch is not None:
            limit += f" ({number(goal.stretch * scale)})"
        where = [goal.shape, *([goal.dtype] if goal.dtype != "float32" else []), MODES[goal.mode]]
        measured = spread(found.p50 * scale, found.p20 * scale, found.p80 * scale) if found else "-"
        rows.append([what, ", ".join(where), limit, measured, verdict.state])
    return table(["ratio", "where", "goal", "measured [p20, p80]", "result"], rows)


def losses_table(losses: Sequence[Ratio]) -> str:
    rows = [
        [f"{r.provider} / {r.relative_to}", r.kernel, f"{MODES[r.mode]}, {r.shape}, {r.dtype}", number(r.p50)]
        for r in losses
    ]
    return table(["ratio", "suite", "where", "measured"], rows)


def failures_table(failures: Sequence[Failure]) -> str:
    rows = [[f.provider, f.kernel, f"{f.mode}, {f.shape}, {f.dtype}", f.error.replace("|", "/")] for f in failures]
    return table(["provider", "suite", "where", "error"], rows)


def markdown(results: Results, plots: Sequence[str] = (), introduction: Sequence[str] = ()) -> str:
    """Return the whole report as Markdown; introduction: lines that come before the goals."""
    lines = [f"# Benchmark: {results.device}", "", f"{results.versions}; commit {results.commit}.", ""]
    lines += [
        "Providers of one table were timed interleaved: each once per round, in changing order; a ratio is",
        "the median of the per-round ratios. Each provider was compared with float64 in this run before it",
        "was timed. GB/s counts the bytes an ideal implementation moves (`passes` in bench/measure/workload.py):",
        "more GB/s is less time, not more traffic.",
        "",
    ]
    for note in results.notes:
        lines += [f"**Note:** {note}", ""]
    lines += introduction
    verdicts = evaluate(results)
    if any(v.measured for v in verdicts):
        lines += ["## Goals", "", goals_table(verdicts), ""]
    lines += order.section(results)
    for kernel in kernels(results):
        lines += [f"## {TITLES.get(kernel, kernel)}", ""]
        lines += [memory_table(results) if kernel == "memory" else time_tables(results, kernel), ""]
        lines += [f"![{TITLES.get(kernel, kernel)}]({name})\n" for name in plots if name.startswith(kernel)]
    losses = where_we_lose(results)
    if losses:
        lines += [
            "## Where we lose",
            "",
            f"Ratios above 1 ({len(losses)}; the full list is in ratios.csv).",
            "",
        ]
        lines += [losses_table(losses[:SHOWN_LOSSES]), ""]
    if results.failures:
        lines += ["## Failed", "", failures_table(results.failures), ""]
    return "\n".join(lines)


def write_report(results: Results, out: Path, introduction: Sequence[str] = ()) -> list[Path]:
    """Write all files into `out` (made if missing) and return their paths."""
    page = out / "README.md"
    files = [page, *results.save(out)]
    page.write_text(markdown(results, introduction=introduction), encoding="utf-8")

    # last, so that the figures of a long run are safe whatever a plot does
    try:
        from bench.report.plots import write_plots
    except ImportError as error:
        results.notes.append(f"No plots: {error}.")
        plots = []
    else:
        plots = write_plots(results, out)
    page.write_text(markdown(results, [p.name for p in plots], introduction), encoding="utf-8")
    return files + plots
