"""Redraw figures of the papers on data that is here, a PNG and the CSV behind it for each.

    make figures
    python -m bench.figures [--quick] [--only NAME] [--out DIR]

docs/figures.md sets them beside what the papers claim. All random numbers have fixed seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bench.figures import gaussian, hessian, weight_growth
from bench.measure.environment import ROOT, device_name, versions
from bench.report.plots import STYLE
from normkernels.analysis import stochasticity

# Each takes the folder and whether the run is quick; it returns the files that it has written.
FIGURES: dict[str, Callable[[Path, bool], list[Path]]] = {
    "iternorm_4": lambda out, quick: gaussian.figures_4_and_a2(out, gaussian.QUICK if quick else gaussian.FULL),
    "iternorm_5": lambda out, quick: gaussian.figure_5(out, gaussian.QUICK if quick else gaussian.FULL),
    "bnp_8": lambda out, quick: hessian.figure_8(out, hessian.QUICK if quick else hessian.FULL),
    "new_interpretations_3": lambda out, quick: weight_growth.figure_3(
        out, weight_growth.QUICK if quick else weight_growth.FULL
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny runs: does it work, not a result")
    parser.add_argument(
        "--only", action="append", choices=tuple(FIGURES), help="only this one (iternorm_4: Figure A2, too)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder (default: bench/results/figures; with --quick or --only out/figures)"
    )
    options = parser.parse_args(arguments)
    part = options.quick or bool(options.only)  # must not replace committed results
    out: Path = (options.out or (ROOT / "out" if part else ROOT / "bench" / "results") / "figures").resolve()
    if out.exists() and not out.is_dir():
        parser.error(f"--out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    stochasticity.KEPT_BYTES = 2**31  # ten draws at d = 512 are 1.2 GB; computing them twice takes minutes
    device = torch.device("cpu")
    print(f"{device_name(device)}\n{versions(device)}\n")
    files: list[Path] = []
    with plt.rc_context(STYLE):
        for name in dict.fromkeys(options.only or FIGURES):
            files += FIGURES[name](out, options.quick)
    print("\nFiles:")
    for path in files:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
