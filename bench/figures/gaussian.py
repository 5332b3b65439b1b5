"""IterNorm, Figures 4, A2 and 5: conditioning and stochasticity of normalized Gaussian samples.

The paper names neither the covariance of its samples nor eps. Here they have either the covariance I ("isotropic": the
condition number is the noise of a batch alone) or, in a random basis, one with the eigenvalues 1, 1/2, ..., 1/d
("decaying", condition number d: there is something to whiten); eps is 1e-5, BatchNorm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from tqdm import tqdm

import normkernels as nk
from bench.measure.results import write_csv
from bench.report.plots import BLUE, DARK, ORANGE, save
from normkernels.analysis import covariance_condition, snd

EPS = 1e-5
ISOTROPIC, DECAYING = "isotropic", "decaying"
BN, DBN, ITERNORM = "BN", "DBN", "IterNorm T=5"
ITERATIONS = (1, 3, 5, 7, 9)  # as in Figure A1
SHADES = {1: "#a9cbe8", 3: "#6ba5d6", 5: BLUE, 7: "#154c7d", 9: "#0a2a47"}
COLOURS = {BN: DARK, DBN: ORANGE} | {f"IterNorm T={T}": shade for T, shade in SHADES.items()}
MARKERS = {BN: "^", DBN: "s"}


@dataclass(frozen=True)
class Sizes:
    """How much is computed. Figures 4 and A2: ``samples`` in batches of ``batch_size``; Figure 5: see `population`."""

    dimensions: tuple[int, ...]
    samples: int
    batch_size: int
    draws: int
    batch_sizes: tuple[int, ...]
    dimension: int
    population: int

    def few(self, batch_size: int, d: int) -> int:
        """Return the number of samples for Figure 5: at least 32 batches, fewer samples in large dimensions.

        The paper names no number. 60,000 samples in pairs are 30,000 whitenings a draw, hours at d = 512; SND is a mean
        over samples, and the more dimensions they have the less they differ.
        """
        return max(32 * batch_size, min(self.population, 32 * self.population // d))


FULL = Sizes(tuple(2**k for k in range(1, 10)), 60_000, 1024, 10, tuple(2**k for k in range(1, 11)), 128, 2048)
QUICK = Sizes((2, 4, 8), 256, 64, 3, (2, 8), 8, 64)


@dataclass(frozen=True)
class Point:
    """One normalization of one kind of samples.

    ``condition`` and ``output_norm``, the length of an output, are means over as many batches as there are draws;
    ``relative_snd`` is SND divided by that length.
    """

    spectrum: str
    norm: str
    d: int
    batch_size: int
    samples: int
    draws: int
    condition: float
    snd: float
    output_norm: float
    relative_snd: float


def normalization(name: str, d: int) -> nn.Module:
    """Return the layer in training mode, without affine map, all channels whitened together."""
    if name == BN:
        return nn.BatchNorm1d(d, EPS, affine=False, track_running_stats=False)
    if name == DBN:
        return nk.DBN1d(d, d, EPS, affine=False, track_running_stats=False)
    T = int(name.removeprefix("IterNorm T="))
    return nk.IterNorm1d(d, d, T, EPS, affine=False, track_running_stats=False)


def samples(spectrum: str, count: int, d: int, seed: int = 0) -> Tensor:
    """Draw samples (count, d) in float32."""
    generator = torch.Generator().manual_seed(1000 * seed + d)
    x = torch.randn(count, d, generator=generator)
    if spectrum == ISOTROPIC:
        return x
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
    return (x * torch.arange(1, d + 1).rsqrt()) @ basis.T


@torch.no_grad()
def measure(spectrum: str, name: str, d: int, count: int, batch_size: int, draws: int) -> Point:
    """Measure SND by eq. 10, and the condition number.

    The latter is in float64: in float32 rounding alone makes DBN's differ from 1.
    """
    norm = normalization(name, d)
    x = samples(spectrum, count, d)
    disturbance = float(snd(norm, x, batch_size, draws, generator=torch.Generator().manual_seed(0)))
    outputs = [norm(batch.double()) for batch in x[: draws * batch_size].split(batch_size)]
    condition = mean(float(covariance_condition(y)) for y in outputs)
    output_norm = mean(float(y.norm(dim=1).mean()) for y in outputs)
    return Point(
        spectrum, name, d, batch_size, count, draws, condition, disturbance, output_norm, disturbance / output_norm
    )


Cell = tuple[str, str, int, int, int]  # the arguments of `measure` but for the draws


def measure_all(cells: Sequence[Cell], draws: int, title: str) -> list[Point]:
    points = []
    with tqdm(cells, unit="point", desc=title) as bar:
        for spectrum, name, d, count, batch_size in bar:
            bar.set_postfix_str(f"{spectrum}, {name}, d = {d}, batch {batch_size}")
            points.append(measure(spectrum, name, d, count, batch_size, draws))
    return points


def lines(axes: Axes, points: Iterable[Point], x: Callable[[Point], int], y: Callable[[Point], float]) -> None:
    points = list(points)
    for name in dict.fromkeys(p.norm for p in points):
        mine = [p for p in points if p.norm == name]
        axes.plot(
            [x(p) for p in mine],
            [y(p) for p in mine],
            color=COLOURS[name],
            marker=MARKERS.get(name, "o"),
            markersize=4.5,
            linewidth=1.8,
            label=name,
        )
    ticks = sorted({x(p) for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.grid(color="#e6e6e6", linewidth=0.8)


PANELS: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("Condition number", lambda p: p.condition),
    ("SND", lambda p: p.snd),
    ("SND / length of the output", lambda p: p.relative_snd),
)


def draw_dimensions(points: Sequence[Point], path: Path) -> Path:
    """Draw Figures 4 and A2: a row for each spectrum."""
    spectra = list(dict.fromkeys(p.spectrum for p in points))
    figure, rows = plt.subplots(
        len(spectra), 3, figsize=(13, 3.6 * len(spectra)), squeeze=False, sharex=True, layout="constrained"
    )
    for spectrum, row in zip(spectra, rows, strict=True):
        for axes, (title, value) in zip(row, PANELS, strict=True):
            lines(axes, (p for p in points if p.spectrum == spectrum), lambda p: p.d, value)
            axes.set_title(f"{title}, {spectrum}")
    for axes in rows[-1]:
        axes.set_xlabel(f"dimension (batches of {points[0].batch_size})")
    rows[0][0].legend(fontsize=9)
    return save(figure, path)


def figures_4_and_a2(out: Path, sizes: Sizes) -> list[Path]:
    """Make Figures 4 and A2.

    Figure A2 has more T than Figure 4, and only isotropic samples, because others would take more time.
    """
    few = (BN, DBN, ITERNORM)
    many = (BN, DBN, *(f"IterNorm T={T}" for T in ITERATIONS))
    cells = [
        (spectrum, name, d, sizes.samples, sizes.batch_size)
        for spectrum, names in ((ISOTROPIC, many), (DECAYING, few))
        for d in sizes.dimensions
        for name in names
    ]
    points = measure_all(cells, sizes.draws, "IterNorm, Figures 4 and A2")
    files = []
    for number, shown, spectra in (("4", few, (ISOTROPIC, DECAYING)), ("a2", many, (ISOTROPIC,))):
        part = [p for s in spectra for name in shown for p in points if (p.spectrum, p.norm) == (s, name)]
        table = out / f"iternorm_figure_{number}.csv"
        write_csv(table, type(part[0]), part)
        files += [table, draw_dimensions(part, table.with_suffix(".png"))]
    return files


def figure_5(out: Path, sizes: Sizes) -> list[Path]:
    """Make Figure 5: (a) against the batch size, (b) against the dimension in batches of 2.

    Below both is SND relative to the output's length.
    """
    by_batch = [(sizes.few(batch, sizes.dimension), batch) for batch in sizes.batch_sizes]
    cells = {
        "a": [(ISOTROPIC, name, sizes.dimension, *size) for size in by_batch for name in (BN, ITERNORM)],
        "b": [(ISOTROPIC, name, d, sizes.few(2, d), 2) for d in sizes.dimensions for name in (BN, ITERNORM)],
    }
    points = {part: measure_all(todo, sizes.draws, f"IterNorm, Figure 5 ({part})") for part, todo in cells.items()}
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    for row, (title, value) in zip(panels, PANELS[1:], strict=True):
        lines(row[0], points["a"], lambda p: p.batch_size, value)
        row[0].set_title(f"{title}, dimension {sizes.dimension}")
        lines(row[1], points["b"], lambda p: p.d, value)
        row[1].set_title(f"{title}, batches of 2")
    panels[1][0].set_xlabel("batch size")
    panels[1][1].set_xlabel("dimension")
    panels[0][0].legend(fontsize=9)
    table = out / "iternorm_figure_5.csv"
    write_csv(table, Point, [p for part in points.values() for p in part])
    return [table, save(figure, table.with_suffix(".png"))]
