"""The tables of docs/figures.md, from the CSV files that `make figures` has written.

python -m bench.figures.summary [DIR]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.measure.environment import ROOT
from bench.report.tables import table

Rows = list[dict[str, str]]
DIMENSIONS = ("2", "8", "32", "128", "512")
STRETCHES = ((1, 1), (2, 14), (15, 42), (43, 84), (85, 126), (127, 168))


def short(value: float) -> str:
    """Format a number with three digits; 1.2e+09 as 1.2e9."""
    mantissa, e, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def by_dimension(rows: Rows) -> str:
    """Return a table of condition number, SND and relative SND of each spectrum and normalization."""
    columns = {"condition number": "condition", "SND": "snd", "SND / length": "relative_snd"}
    cells = []
    for spectrum, norm in dict.fromkeys((r["spectrum"], r["norm"]) for r in rows):
        mine = {r["d"]: r for r in rows if (r["spectrum"], r["norm"]) == (spectrum, norm)}
        for title, column in columns.items():
            cells.append([spectrum, norm, title, *(short(float(mine[d][column])) for d in DIMENSIONS if d in mine)])
    here = [f"d = {d}" for d in DIMENSIONS if any(r["d"] == d for r in rows)]
    return table(
        ["samples", "normalization", "", *here], sorted(cells, key=lambda row: (row[0] != "isotropic", row[2]))
    )


def figure_5(rows: Rows) -> str:
    """Return a table of SND and relative SND.

    They are against the batch size at the figure's dimension, and against the dimension in pairs.
    """
    d = max((r["d"] for r in rows), key=lambda d: len({r["batch_size"] for r in rows if r["d"] == d}))
    cells = []
    for name, axis, part in (
        (f"d = {d}", "batch_size", [r for r in rows if r["d"] == d]),
        ("batch 2", "d", [r for r in rows if r["batch_size"] == "2"]),
    ):
        for norm in dict.fromkeys(r["norm"] for r in part):
            for title, column in (("SND", "snd"), ("SND / length", "relative_snd")):
                values = {r[axis]: short(float(r[column])) for r in part if r["norm"] == norm}
                cells.append([name, norm, title, *(values.get(x, "") for x in ("2", "8", "32", "128", "512"))])
    return table(["", "normalization", "", "2", "8", "32", "128", "512"], cells)


def figure_8(rows: Rows) -> str:
    """Return a table of medians over the seeds and over stretches of iterations."""
    columns = {
        "training loss": "train_loss",
        "test accuracy": "test_accuracy",
        "kappa(H)": "hessian",
        "as BNP does": "preconditioned",
        "by eq. 12": "preconditioned_batch",
        "kappa(D) as BNP scales": "scaling",
        "kappa(D) of eq. 12": "scaling_batch",
        "kappa(S)": "loss_part",
    }
    cells = []
    for method in dict.fromkeys(r["method"] for r in rows):
        for first, last in STRETCHES:
            mine = [r for r in rows if r["method"] == method and first <= int(r["step"]) <= last]
            if mine:
                values = [median(float(r[column]) for r in mine) for column in columns.values()]
                cells.append([method, f"{first} to {last}", *("-" if v != v else short(v) for v in values)])
    return table(["network", "iterations", *columns], cells)


def figure_3(rows: Rows) -> str:
    """Return a table of lengths, and of how far Lemma 3 is from what was measured, where it holds."""
    cells = []
    for norm, decay in dict.fromkeys((r["norm"], r["weight_decay"]) for r in rows):
        mine = [r for r in rows if (r["norm"], r["weight_decay"]) == (norm, decay)]
        lengths = [float(r["weight_norm"]) for r in mine]
        gap = max(abs(float(r["weight_norm"]) - float(r["lemma_3"])) for r in mine)
        longest = max(lengths)
        cells.append(
            [
                norm,
                decay,
                f"{lengths[0]:.2f}",
                f"{longest:.2f} at {lengths.index(longest) + 1}",
                f"{lengths[-1]:.2f}",
                "-" if float(decay) else short(gap),
                f"{100 * float(mine[-1]['test_accuracy']):.1f}",
            ]
        )
    header = ["norm", "weight decay", "first", "longest, at step", "last", "off Lemma 3", "test accuracy, %"]
    return table(header, cells)


TABLES = {
    "iternorm_figure_4": by_dimension,
    "iternorm_figure_a2": by_dimension,
    "iternorm_figure_5": figure_5,
    "bnp_figure_8": figure_8,
    "new_interpretations_figure_3": figure_3,
}


def tables(folder: Path) -> dict[str, str]:
    """Return the Markdown table of each CSV file that is there."""
    found = {}
    for name, summarize in TABLES.items():
        path = folder / f"{name}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                found[name] = summarize(list(csv.DictReader(file)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures.summary", description=__doc__.splitlines()[0])
    default = ROOT / "bench" / "results" / "figures"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="where the CSV files are")
    folder: Path = parser.parse_args(arguments).folder
    found = tables(folder)
    if not found:
        parser.error(f"folder: expected CSV files of `make figures` in {folder}, found none")
    for name, text in found.items():
        print(f"{name}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
