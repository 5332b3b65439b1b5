"""How far T Newton iterations whiten white noise: the output variance against d, for both scalings.

    python -m bench.experiments.output_variance [--out DIR]

Each figure is measured, not derived: the mean diagonal of W Sigma W for Sigma = I, which is what a layer's
output has as covariance when its input is white. Writes output_variance.csv and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

import normkernels as nk

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
ITERATIONS = (3, 5, 7, 9)


def output_variance(d: int, num_iterations: int, scaling: str) -> float:
    W = nk.ops.inverse_sqrt(torch.eye(d, dtype=torch.float64)[None], num_iterations, eps=0.0, scaling=scaling)[0]
    return (W @ W).diagonal().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    header = ["scaling", "T", *(f"d={d}" for d in SIZES)]
    rows = [
        [scaling, str(T), *(f"{output_variance(d, T, scaling):.3f}" for d in SIZES)]
        for scaling in ("trace", "frobenius")
        for T in ITERATIONS
    ]
    with (out / "output_variance.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
