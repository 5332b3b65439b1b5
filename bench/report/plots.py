"""PNG plots of a run. Our layers are coloured, what they are compared with is grey."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.measure.results import Ratio, Record, Results
from bench.providers.names import (
    BATCHNORM,
    CONV,
    CONV2D,
    COPY,
    DBN,
    FFT,
    GROUPED,
    ITERNORM,
    PLAIN,
    PLAIN_DBN,
    TRANSPOSED,
)
from bench.suites.gpu_suite import BATCHNORM_CL, COMPILED, CONV_CL, FFT_SPECTRUM, FLOOR, ITERNORM_CL

BLUE, ORANGE, DARK, MID, LIGHT = "#1f6fb4", "#e07b22", "#4d4d4d", "#8c8c8c", "#bdbdbd"
COLOURS = dict.fromkeys((CONV, TRANSPOSED, FLOOR, COMPILED, COPY, FFT, FFT_SPECTRUM), MID) | {
    BATCHNORM: DARK,
    PLAIN: LIGHT,
    PLAIN_DBN: "#d9d9d9",
    GROUPED: LIGHT,
}
MARKERS = {ITERNORM: "o", DBN: "s", BATCHNORM: "^", CONV: "D", PLAIN: "v", TRANSPOSED: "P", FLOOR: "|", COMPILED: "v"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def colour(provider: str) -> str:
    if provider in COLOURS:
        return COLOURS[provider]
    if provider.endswith(" channels_last"):
        return colour(provider.removesuffix(" channels_last"))
    if provider.startswith("plain"):
        return LIGHT
    return ORANGE if provider.startswith("DBN") else BLUE


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return path


def bars(
    axes: Axes,
    positions: Sequence[int],
    names: Sequence[str],
    values: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    label: Callable[[float], str] = "{:.2f}".format,
) -> None:
    """Draw horizontal bars with their value at the end and a whisker from p20 to p80."""
    axes.barh(positions, values, color=[colour(n) for n in names], height=0.68)
    ends = list(values)
    if low is not None and high is not None:
        below = [max(v - lo, 0) for v, lo in zip(values, low, strict=True)]
        above = [max(hi - v, 0) for v, hi in zip(values, high, strict=True)]
        axes.errorbar(values, positions, xerr=[below, above], fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
        ends = [max(v, hi) for v, hi in zip(values, high, strict=True)]
    widest = max(ends)
    for position, value, end in zip(positions, values, ends, strict=True):
        axes.annotate(label(value), (end, position), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, widest * 1.18)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def ratio_bars(
    results: Results,
    kernel: str,
    relative_to: str,
    mode: str,
    path: Path,
    title: str,
    shape_label: Callable[[str], str],
) -> Path | None:
    """Draw one panel per shape: every provider's time relative to `relative_to`, which is the line at 1."""
    found = [r for r in results.ratios if (r.kernel, r.relative_to, r.mode) == (kernel, relative_to, mode)]
    panels: dict[str, list[Ratio]] = {}
    for r in found:
        panels.setdefault(r.shape, []).append(r)
    if not panels:
        return None
    names = list(dict.fromkeys(r.provider for r in found))  # the same rows in every panel
    width, height = 3.0 + 3.6 * len(panels), 1.5 + 0.38 * len(names)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(width, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (shape, ratios) in zip(all_axes[0], panels.items(), strict=True):
        rows = [(position, r) for position, name in enumerate(names) for r in ratios if r.provider == name]
        bars(
            axes,
            [position for position, _ in rows],
            [r.provider for _, r in rows],
            [r.p50 for _, r in rows],
            [r.p20 for _, r in rows],
            [r.p80 for _, r in rows],
        )
        axes.axvline(1, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(shape_label(shape))
        axes.set_xlabel(f"time / time of {relative_to}")
    first = all_axes[0][0]
    # one scale, so that the panels can be compared, and the line at 1 is on it
    limit = max(1.1, *(axes.get_xlim()[1] for axes in all_axes[0]))
    for axes in all_axes[0]:
        axes.set_xlim(0, limit)
    first.set_yticks(range(len(names)), names)
    first.set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"{title}; {results.device}", x=0.01, ha="left", fontsize=10, color="#444444")
    return save(figure, path)


def line_plot(
    axes: Axes,
    series: dict[str, list[tuple[float, Record]]],
    xlabel: str,
    log_y: bool = True,
    ylabel: bool = True,
) -> None:
    """Draw median milliseconds against a number, with a band from p20 to p80."""
    ticks = sorted({x for points in series.values() for x, _ in points})
    for name, points in series.items():
        points = sorted(points, key=lambda item: item[0])
        xs = [x for x, _ in points]
        axes.plot(
            xs,
            [r.p50 for _, r in points],
            color=colour(name),
            marker=MARKERS.get(name, "o"),
            markersize=5,
            label=name,
            linewidth=1.8,
            linestyle="-" if colour(name) in (BLUE, ORANGE) else "--",
        )
        axes.fill_between(
            xs,
            [r.p20 for _, r in points],
            [r.p80 for _, r in points],
            color=colour(name),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{int(t):,}".replace(",", " ") for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel("ms, forward + backward")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(fontsize=9)


def dimensions(shape: str) -> list[int]:
    return [int(part) for part in shape.split()[0].split("x")]


def by_number(
    results: Results, kernel: str, number: Callable[[Record], float]
) -> dict[str, list[tuple[float, Record]]]:
    series: dict[str, list[tuple[float, Record]]] = {}
    for record in results.find(kernel):
        series.setdefault(record.provider, []).append((number(record), record))
    return series


def scaling_plot(
    results: Results, kernel: str, number: Callable[[Record], float], xlabel: str, title: str, path: Path
) -> Path | None:
    series = by_number(results, kernel, number)
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    line_plot(axes, series, xlabel)
    axes.set_title(title)
    return save(figure, path)


def family_plot(
    results: Results, kernel: str, pattern: str, xlabel: str, title: str, path: Path, log_x: bool
) -> Path | None:
    """Draw a comparison whose providers differ by a number in their name; the others are horizontal lines."""
    records = results.find(kernel)
    if not records:
        return None
    series: dict[str, list[tuple[float, Record]]] = {}
    constant: list[Record] = []
    for record in records:
        match = re.search(pattern, record.provider)
        if match:
            name = "DBN eigh" if record.provider.startswith("DBN") else "IterNorm" if "T" in xlabel else "IterNorm T=5"
            series.setdefault(name, []).append((float(match.group(1)), record))
        else:
            constant.append(record)
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    line_plot(axes, series, xlabel, log_y=False)
    for record in constant:
        axes.axhline(record.p50, color=colour(record.provider), linestyle="--", linewidth=1.5, label=record.provider)
    if not log_x:
        axes.set_xscale("linear")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.legend(fontsize=9)
    axes.set_title(title)
    return save(figure, path)


def dot_plot(
    results: Results,
    kernel: str,
    providers: Sequence[str],
    values: Callable[[str, str, str], Ratio | Record | None],
    path: Path,
    title: str,
    xlabel: str,
    line: float | None = None,
) -> Path | None:
    """Draw one row for each shape and type, one marker for each provider, a whisker from p20 to p80."""
    rows = list(dict.fromkeys((r.shape, r.dtype) for r in results.find(kernel)))
    found = {name: [(row, v) for row, where in enumerate(rows) if (v := values(name, *where))] for name in providers}
    if not any(found.values()):
        return None
    figure, axes = plt.subplots(figsize=(8.4, 1.8 + 0.45 * len(rows)), layout="constrained")
    for name, points in found.items():
        if not points:
            continue
        middle = [v.p50 for _, v in points]
        spread = [[max(v.p50 - v.p20, 0) for _, v in points], [max(v.p80 - v.p50, 0) for _, v in points]]
        axes.errorbar(
            middle,
            [row for row, _ in points],
            xerr=spread,
            fmt=MARKERS.get(name.removesuffix(" channels_last"), "X"),
            color=colour(name),
            markerfacecolor="white" if name.endswith("channels_last") else colour(name),
            capsize=2,
            label=name,
        )
    if line is not None:
        axes.axvline(line, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_yticks(range(len(rows)), [f"{plain_shape(shape)}, {dtype}" for shape, dtype in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel(xlabel)
    axes.set_title(title)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)


def gpu_plots(results: Results, out: Path) -> list[Path | None]:
    def to_batchnorm(name: str, shape: str, dtype: str) -> Ratio | None:
        return results.ratio("gpu_norm", name, BATCHNORM, "full", shape, dtype)

    def rate(name: str, shape: str, dtype: str) -> Record | None:
        found = results.find("gpu_norm", "gbytes_per_s")
        return next((r for r in found if (r.provider, r.shape, r.dtype) == (name, shape, dtype)), None)

    layers = (ITERNORM, ITERNORM_CL, BATCHNORM, BATCHNORM_CL)
    return [
        dot_plot(
            results,
            "gpu_norm",
            (ITERNORM, ITERNORM_CL, BATCHNORM_CL, CONV, CONV_CL, FLOOR, COMPILED, PLAIN_DBN),
            to_batchnorm,
            out / "gpu_norm_ratio.png",
            "Forward + backward, device time",
            f"time / time of {BATCHNORM}",
            line=1,
        ),
        dot_plot(
            results,
            "gpu_norm",
            (*layers, FLOOR),
            rate,
            out / "gpu_norm_bandwidth.png",
            "Counted bytes: 8 passes",
            "GB/s",
        ),
        ratio_bars(results, "gpu_filter", COPY, "full", out / "gpu_filter.png", "Filter of image planes", plain_shape),
    ]


def memory_plot(results: Results, path: Path) -> Path | None:
    # the spectrum has no backward pass here: its input is a weight
    saved = {r.provider: r.p50 for r in results.find("memory", "saved_over_input", "full")}
    peak = {r.provider: r.p50 for r in results.find("memory", "peak_over_input", "full")}
    if not saved:
        return None
    names = sorted(saved, key=lambda name: (saved[name], peak[name]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.4, 1.2 + 0.38 * len(names)), layout="constrained", sharey=True
    )
    positions = range(len(names))
    bars(left, positions, names, [saved[n] for n in names])
    bars(right, positions, names, [peak[n] for n in names], label="{:.1f}".format)
    left.set_yticks(positions, names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_title("saved for the backward pass")
    right.set_title("peak of one training step")
    for axes in (left, right):
        axes.set_xlabel("times the size of the input")
    return save(figure, path)


def square(shape: str) -> str:
    """Return the label of a shape: "d = 128   (64 samples of 32 × 32)" for "64x128x32x32"."""
    n, c, h, w = dimensions(shape)
    return f"d = {c}   ({n} samples of {h} × {w})"


def plain_shape(shape: str) -> str:
    return shape.replace("x", " × ", 3).replace("channels_last", "channels last")


def write_plots(results: Results, out: Path) -> list[Path]:
    """Draw every plot that the run has data for, and return their paths."""
    with plt.rc_context(STYLE):
        drawn = [
            ratio_bars(
                results,
                "table_a1",
                CONV,
                "full",
                out / "table_a1_conv.png",
                "Table A1, forward + backward",
                square,
            ),
            ratio_bars(
                results,
                "table_a1",
                BATCHNORM,
                "full",
                out / "table_a1_batchnorm.png",
                "Table A1, forward + backward",
                square,
            ),
            ratio_bars(
                results,
                "vgg_step",
                BATCHNORM,
                "full",
                out / "vgg_step.png",
                "VGG of Table A2, one training step",
                lambda shape: f"batch of {dimensions(shape)[0]}",
            ),
            scaling_plot(
                results,
                "scaling_d",
                lambda r: dimensions(r.shape)[1],
                "width d (64 samples of 16 × 16, one group)",
                "Cost against the width",
                out / "scaling_d.png",
            ),
            scaling_plot(
                results,
                "scaling_m",
                lambda r: dimensions(r.shape)[0] * 32 * 32,
                "samples per channel m (64 channels)",
                "Cost against the number of samples",
                out / "scaling_m.png",
            ),
            family_plot(
                results,
                "scaling_T",
                r"T=(\d+)",
                "iterations T (64 samples of 64 × 32 × 32)",
                "Cost against the number of iterations",
                out / "scaling_T.png",
                log_x=False,
            ),
            family_plot(
                results,
                "scaling_group",
                r"group (\d+)",
                "group size (64 samples of 256 × 16 × 16)",
                "Cost against the group size",
                out / "scaling_group.png",
                log_x=True,
            ),
            ratio_bars(
                results,
                "shapes",
                BATCHNORM,
                "full",
                out / "shapes.png",
                "Groups of 64, forward + backward",
                plain_shape,
            ),
            ratio_bars(
                results,
                "inference_d64",
                GROUPED,
                "inference",
                out / "inference_d64.png",
                "Inference, groups of 64",
                plain_shape,
            ),
            ratio_bars(
                results,
                "conv_norm",
                CONV2D,
                "full",
                out / "conv_norm.png",
                "3x3 convolutions, forward + backward",
                plain_shape,
            ),
            ratio_bars(
                results,
                "spectral_filter",
                COPY,
                "full",
                out / "spectral_filter.png",
                "Filter of image planes, forward + backward",
                plain_shape,
            ),
            memory_plot(results, out / "memory.png"),
            *gpu_plots(results, out),
        ]
    return [path for path in drawn if path is not None]
