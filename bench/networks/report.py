"""The table of architectures, as text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch")
COLUMNS = ("network", "norms", "replaced", "folded", "with IterNorm", "agreement", "why not")


def row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns' entries for one network."""
    if "error" in result:
        return (name, "", "", "", "", "", result["error"])
    folded = [
        f"{result[key]['norms'] - result[key]['kept']} of {result[key]['norms']}" if key in result else "–"
        for key in ("fold", "converted")
    ]
    off = max(result[key]["off"] for key in ("fold", "converted") if key in result)
    return (name, str(result["norms"]), str(result["replaced"]), *folded, f"{off:.0e}", "; ".join(reasons(result)))


def reasons(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield why norms stay: what keeps them from the layer in front, or the whole network from being traced."""
    if "refused" in result:
        yield f"replace: {result['refused']}"
    counts: dict[str, int] = {}
    for key in ("fold", "converted"):
        short: dict[str, int] = {}
        for reason, names in result.get(key, {}).get("reasons", {}).items():
            said = re.split(r"; and to be folded|; name the layers|\. ", reason)[0]
            short[said] = short.get(said, 0) + len(names)
        counts |= {said: max(count, counts.get(said, 0)) for said, count in short.items()}
    for reason, count in counts.items():
        yield f"{count}: {reason}"


def how_far(result: Mapping[str, Any]) -> str:
    """Return whether all norms of a network are folded, some or none."""
    kept = result["fold"]["kept"]
    return "Completely" if kept == 0 else "Not" if kept == result["fold"]["norms"] else "Partly"


def write(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write docs/networks.csv and docs/networks.md."""
    rows = {name: row(name, result) for name, result in results.items()}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows.values())
    (DOCS / "networks.csv").write_text(text.getvalue(), encoding="utf-8")
    (DOCS / "networks.md").write_text("\n".join(page(results, rows)) + "\n", encoding="utf-8")


def page(results: Mapping[str, Mapping[str, Any]], rows: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of docs/networks.md."""
    yield HEAD.format(libraries=", ".join(f"{library} {version(library)}" for library in LIBRARIES))
    for far in ("Completely", "Partly", "Not"):
        names = [name for name, result in results.items() if "error" not in result and how_far(result) == far]
        if names:
            yield f"## {far} folded\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"
            for name in names:
                yield "| " + " | ".join(entry.replace("|", "\\|") for entry in rows[name]) + " |"
            yield ""


HEAD = """# Public architectures

    make check-networks                    # all of them, and this page
    make check-networks ARGS="--quick"     # a few small ones
    make check-networks ARGS="--only timm"

Each architecture has random weights and statistics, small images and ten classes. `nk.convert.replace` is asked to turn
every BatchNorm that is of no subclass into IterNorm with groups of 16 channels; the network trains three steps in
float32 and three in bfloat16 autocast, with finite losses. `nk.convert.fold`, with `strict=False`, `grouped="append"`
and `example_inputs`, is tried on the network as it was ("folded") and on that one ("with IterNorm"), in float64.
"agreement" is the largest difference between an output of the folded network and the same of the unfolded one,
relative to the output's largest entry. With {libraries}.
"""
