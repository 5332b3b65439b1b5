"""`python -m bench.demo`: digits with BatchNorm, IterNorm and DBN, then the paper's Table A1 on this machine.

Prints both tables and writes them, the plots and the CSV files into out/demo/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from torch import nn

import normkernels as nk
from bench.experiments.digits import Epoch, NormFactory, Summary, summarize, train
from bench.measure.comparison import Settings
from bench.measure.environment import ROOT, device_name, versions
from bench.measure.results import Ratio, Record, Results, write_csv
from bench.providers.names import CONV
from bench.report.page import failures_table
from bench.report.plots import BLUE, DARK, ORANGE, STYLE, ratio_bars, save, square
from bench.report.tables import number, table
from bench.suites.run import begin, run
from bench.suites.table_a1 import table_a1

NORMS: dict[str, NormFactory] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "IterNorm2d": nk.IterNorm2d,
    "DBN2d": nk.DBN2d,
}
COLOURS = {"BatchNorm2d": DARK, "IterNorm2d": BLUE, "DBN2d": ORANGE}

# Table A1 of arXiv 1904.03441: TITAN Xp, forward + backward, ms; cuDNN's convolution and the whitening layers
PAPER_CONV = {64: 5.65, 128: 13.62}
PAPER = {
    "IterNorm T=3": {64: 6.59, 128: 13.32},
    "IterNorm T=5": {64: 7.40, 128: 13.92},
    "IterNorm T=7": {64: 8.21, 128: 14.68},
    "DBN eigh": {64: 15.92, 128: 35.02},
}


def digits_table(summaries: Sequence[Summary]) -> str:
    rows = [
        [
            s.norm,
            f"{s.final_loss:.4f}",
            f"{100 * s.accuracy:.2f} ± {100 * s.accuracy_std:.2f}",
            f"{s.seconds_per_epoch:.2f}",
        ]
        for s in summaries
    ]
    return table(["norm", "final training loss", "test accuracy, %", "s / epoch"], rows)


def table_a1_table(results: Results) -> str:
    """Return a table of our ms and ratios to the convolution, with the paper's ratios beside them."""
    times = results.find("table_a1")
    header = ["provider"]
    for d in (64, 128):
        header += [f"d={d}: ms", "/ conv3x3", "paper / conv3x3"]
    rows = []
    for name in dict.fromkeys(r.provider for r in times):
        cells = [name]
        for d in (64, 128):
            here = [r for r in times if r.provider == name and r.shape == f"64x{d}x32x32"]
            ratio = results.ratio("table_a1", name, CONV, "full", f"64x{d}x32x32", "float32")
            paper = PAPER.get(name)
            cells += [
                number(here[0].p50) if here else "failed",
                "1" if name == CONV else number(ratio.p50) if ratio else "-",
                "1" if name == CONV else number(paper[d] / PAPER_CONV[d]) if paper else "-",
            ]
        rows.append(cells)
    return table(header, rows)


def curves_plot(history: Sequence[Epoch], path: Path) -> Path:
    """Plot training loss and test accuracy per epoch: every seed thin, their mean thick."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for norm in dict.fromkeys(e.norm for e in history):
        mine = [e for e in history if e.norm == norm]
        epochs = sorted({e.epoch for e in mine})
        for axes, value in ((left, lambda e: e.train_loss), (right, lambda e: 100 * e.test_accuracy)):
            for seed in sorted({e.seed for e in mine}):
                axes.plot(
                    epochs,
                    [value(e) for e in mine if e.seed == seed],
                    color=COLOURS[norm],
                    linewidth=0.7,
                    alpha=0.35,
                )
            means = [mean(value(e) for e in mine if e.epoch == epoch) for epoch in epochs]
            axes.plot(epochs, means, color=COLOURS[norm], linewidth=2.2, label=norm)
    left.set_yscale("log")
    left.set_title("Training loss")
    right.set_title("Test accuracy, %")
    right.set_ylim(top=101)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e6e6", linewidth=0.8)
    left.legend()
    return save(figure, path)


def accuracy_plot(history: Sequence[Epoch], path: Path) -> Path:
    """Plot the final test accuracy: a dot per seed, a line at their mean."""
    last = max(e.epoch for e in history)
    names = list(dict.fromkeys(e.norm for e in history))
    figure, axes = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for position, norm in enumerate(names):
        scores = sorted(100 * e.test_accuracy for e in history if e.norm == norm and e.epoch == last)
        # dots side by side, so that equal scores stay visible
        offsets = [0.07 * (i - (len(scores) - 1) / 2) for i in range(len(scores))]
        axes.plot([position + o for o in offsets], scores, "o", color=COLOURS[norm], alpha=0.6, markersize=6)
        axes.hlines(mean(scores), position - 0.27, position + 0.27, color=COLOURS[norm], linewidth=2.2)
        axes.text(position + 0.29, mean(scores), f"{mean(scores):.2f}", ha="left", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.4)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_title("Final test accuracy, %: seeds and their mean")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    return save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and epochs; Table A1 is always in quick form")
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    print(f"{device_name(device)}\n{versions(device)}\n")

    print("1. A small convolutional network on scikit-learn's digits: three norms, same weights and batches")
    history = train(NORMS, seeds=2, epochs=6) if options.quick else train(NORMS)
    first = digits_table(summarize(history))
    print(f"\n{first}\n")

    print("2. Table A1 of the IterNorm paper on this machine: 64 samples of 32 x 32, forward + backward")
    settings = Settings(device, quick=True)
    results = begin(settings)
    run(table_a1(settings, modes=("full",)), results)
    second = table_a1_table(results)
    print(f"\n{second}\n\nPaper: TITAN Xp against cuDNN's convolution. Another device, not a goal for this one.")
    for note in results.notes:
        print(f"Note: {note}")
    if results.failures:
        print(f"\nFailed:\n{failures_table(results.failures)}", file=sys.stderr)

    files = [out / "digits.csv", out / "table_a1.csv", out / "table_a1_ratios.csv"]
    write_csv(out / "digits.csv", Epoch, history)
    write_csv(out / "table_a1.csv", Record, results.records)
    write_csv(out / "table_a1_ratios.csv", Ratio, results.ratios)
    with plt.rc_context(STYLE):
        files.append(curves_plot(history, out / "training_curves.png"))
        files.append(accuracy_plot(history, out / "test_accuracy.png"))
        bars = ratio_bars(
            results, "table_a1", CONV, "full", out / "table_a1.png", "Table A1, forward + backward", square
        )
        files += [bars] if bars else []
    page = out / "README.md"
    page.write_text(
        f"# Demo: {results.device}\n\n{results.versions}\n\n## Digits\n\n{first}\n\n## Table A1\n\n{second}\n"
    )
    print("\nFiles:")
    for path in [page, *files]:
        print(f"  {path}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
