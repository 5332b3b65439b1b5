"""Figures of the papers, redrawn on data that is here: Gaussian samples and scikit-learn's digits."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_table(path: Path, rows: Sequence[Any]) -> Path:
    """Write one line per dataclass, columns in the order of its fields, six digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return path
