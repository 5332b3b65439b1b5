"""Normalization at mini-batches of 1, 2, 6 and 60 (BNP paper, section 5, Figures 3 to 5) on scikit-learn's digits.

    python -m bench.experiments.small_batches [--quick] [--workers N] [--out DIR]

Two networks with ReLU, as in the paper: fully connected, three hidden layers of 100; convolutional, three 3x3 layers
of 16, 32 and 16 channels and a dense one of 64, on images of 8 x 8. The normalization stands behind each hidden
activation and so before the next layer, the place of BatchNorm in the paper and of POP-Norm in its own. Plain SGD,
Glorot uniform weights and zero biases. For one seed all methods start from the same weights and see the same
mini-batches.

The learning rate of each method, network and mini-batch is the one of `LEARNING_RATES` with the smallest training
loss, averaged over the steps of a run of the first seed: a whole one at mini-batch 60, the first 450 to 900 steps at
smaller ones. Running averages have momentum .01, as BNP's rho = .99, and .1 at mini-batch 60, where an epoch has 14
steps. Batch renormalization begins as BatchNorm and is relaxed over three epochs.

Writes curves.csv (every epoch), learning_rates.csv (the search), summary.csv, error.png and loss.png; prints the
summary. docs/small-batches.md sets it beside the paper's claims.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import inf, isfinite, nan
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from torch import nn
from tqdm import tqdm

import normkernels as nk
from bench.experiments.batch_renorm import BatchRenorm1d, BatchRenorm2d, _BatchRenorm
from bench.experiments.digits import NUM_CLASSES, Split, accuracy, digits_split, train_epoch
from bench.measure.environment import ROOT
from bench.measure.results import write_csv
from bench.report.plots import BLUE, DARK, LIGHT, MID, ORANGE, STYLE, save
from bench.report.tables import table

GROUPS = (
    4  # in GroupNorm. Groups of 4 channels, as one may read the paper, leave 4 values to normalize in a dense layer
)
DENSE, CONVOLUTIONAL = "fully connected", "convolutional"
WIDTHS = {DENSE: ((), (100, 100, 100)), CONVOLUTIONAL: ((16, 32, 16), (64,))}  # convolutions, dense layers

# For each method: channels and momentum -> the layer on (N, C), the layer on (N, C, H, W).
Factory = Callable[[int, float], nn.Module]
METHODS: dict[str, tuple[Factory, Factory]] = {
    "none": (lambda c, m: nn.Identity(), lambda c, m: nn.Identity()),
    "BatchNorm": (lambda c, m: nn.BatchNorm1d(c, momentum=m), lambda c, m: nn.BatchNorm2d(c, momentum=m)),
    "BatchRenorm": (lambda c, m: BatchRenorm1d(c, momentum=m), lambda c, m: BatchRenorm2d(c, momentum=m)),
    "LayerNorm": (lambda c, m: nn.LayerNorm(c), lambda c, m: nn.GroupNorm(1, c)),  # over channels and positions
    "GroupNorm": (lambda c, m: nn.GroupNorm(GROUPS, c),) * 2,
    "POP-Norm": (lambda c, m: nk.POPNorm1d(c, momentum=m), lambda c, m: nk.POPNorm2d(c, momentum=m)),
}
METHODS |= {"BNP": METHODS["none"], "BNP+GroupNorm": METHODS["GroupNorm"]}
COLOURS = {
    "none": LIGHT, "BatchNorm": DARK, "BatchRenorm": MID, "LayerNorm": "#8a6d3b", "GroupNorm": "#3f8f4f",
    "POP-Norm": ORANGE, "BNP": BLUE, "BNP+GroupNorm": "#7ab8e6",
}  # fmt: skip
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Sizes:
    epochs: dict[int, int]  # by mini-batch
    tuning: dict[int, int]
    seeds: int
    learning_rates: tuple[float, ...] = LEARNING_RATES
    networks: tuple[str, ...] = (DENSE, CONVOLUTIONAL)
    images: int = 898  # for training


FULL = Sizes(epochs={1: 3, 2: 5, 6: 8, 60: 20}, tuning={1: 1, 2: 2, 6: 3, 60: 20}, seeds=3)
QUICK = Sizes(epochs={1: 1, 12: 2}, tuning={1: 1, 12: 1}, seeds=1, learning_rates=(0.01, 0.1), images=12)


@dataclass(frozen=True)
class Run:
    network: str
    method: str
    batch_size: int
    learning_rate: float
    seed: int
    epochs: int
    images: int

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch_size)


@dataclass(frozen=True)
class Epoch:
    network: str
    method: str
    batch_size: int
    learning_rate: float
    seed: int
    epoch: int
    train_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Trial:
    """One rate of the search; ``train_loss``: mean over all steps of its run, infinite where it was not finite."""

    network: str
    method: str
    batch_size: int
    learning_rate: float
    train_loss: float


@dataclass(frozen=True)
class Summary:
    """Last epoch over the seeds; ``error``: what the method raised at this mini-batch, with NaN elsewhere."""

    network: str
    method: str
    batch_size: int
    learning_rate: float
    seeds: int
    epochs: int
    train_loss: float
    accuracy: float
    accuracy_min: float
    accuracy_max: float
    error: str = ""


def build(network: str, method: str, momentum: float, seed: int) -> nn.Sequential:
    """Build a network (n, 1, 8, 8) -> (n, 10).

    Norms draw no random numbers: one seed gives the same weights whatever the method.
    """
    torch.manual_seed(seed)
    on_vectors, on_images = METHODS[method]
    convolutions, dense = WIDTHS[network]
    layers: list[nn.Module] = []
    channels, size = 1, 8
    for index, width in enumerate(convolutions):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), on_images(width, momentum)]
        channels = width
        if index < 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    layers.append(nn.Flatten())
    channels *= size**2
    for width in dense:
        layers += [nn.Linear(channels, width), nn.ReLU(), on_vectors(width, momentum)]
        channels = width
    layers.append(nn.Linear(channels, NUM_CLASSES))
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert layer.bias is not None
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@cache
def data(images: int) -> Split:
    split = digits_split()
    return replace(split, train_x=split.train_x[:images], train_y=split.train_y[:images])


def relax(model: nn.Module, epoch: int) -> None:
    """Set batch renormalization's limits: BatchNorm in the first epoch, Ioffe's 3 and 5 from the fourth on."""
    t = min(epoch / 3, 1)
    for module in model.modules():
        if isinstance(module, _BatchRenorm):
            module.r_max, module.d_max = 1 + 2 * t, 5 * t


def train(run: Run) -> Iterator[Epoch]:
    split = data(run.images)
    model = build(run.network, run.method, 0.1 if run.batch_size >= 60 else 0.01, run.seed)
    optimizer = torch.optim.SGD(model.parameters(), run.learning_rate, fused=True)
    if run.method.startswith("BNP"):
        nk.optim.BNP(model).attach(optimizer)
    loss, right = 0.0, 0.0
    for epoch in range(run.epochs):
        if isfinite(loss):  # else there is nothing left to train
            relax(model, epoch)
            with warnings.catch_warnings():  # a learning rate that is too large is no news here
                warnings.filterwarnings("ignore", "BNP: left gradients that are not finite")
                loss = train_epoch(model, optimizer, split, run.batch_size, run.seed, epoch)
            right = accuracy(model, split.test_x, split.test_y)
        yield Epoch(run.network, run.method, run.batch_size, run.learning_rate, run.seed, epoch + 1, loss, right)


def attempt(run: Run) -> list[Epoch] | str:
    """Return the epochs, or what the method raises at this mini-batch.

    It runs on one thread: more slow down such small tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(train(run))
    except ValueError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)


def execute(runs: Sequence[Run], pool: ProcessPoolExecutor | None, title: str) -> dict[Run, list[Epoch] | str]:
    """Attempt all runs, in this process if there is no pool.

    The longest run comes first, so that no process is left with a long one at the end.
    """
    results = {}
    runs = sorted(runs, key=lambda run: -run.steps)
    if pool is None:
        finished = ((run, attempt(run)) for run in runs)
    else:
        futures = {pool.submit(attempt, run): run for run in runs}
        finished = ((futures[future], future.result()) for future in as_completed(futures))
    with tqdm(total=sum(run.steps for run in runs), unit="step", desc=title) as bar:
        for run, result in finished:
            results[run] = result
            bar.set_postfix_str(f"{run.network}, {run.method}, mini-batch {run.batch_size}", refresh=False)
            bar.update(run.steps)
    return results


Cell = tuple[str, str, int]  # network, method, mini-batch


def search(sizes: Sizes, pool: ProcessPoolExecutor | None) -> tuple[list[Trial], dict[Cell, float], dict[Cell, str]]:
    """Return all trials, the best learning rates, and what was raised where a method cannot train."""
    cells = list(product(sizes.networks, METHODS, sizes.epochs))
    runs = {
        (cell, rate): Run(*cell, rate, seed=0, epochs=sizes.tuning[cell[2]], images=sizes.images)
        for cell in cells
        for rate in sizes.learning_rates
    }
    results = execute(list(runs.values()), pool, "learning rates")
    trials, rates, errors = [], {}, {}
    for cell in cells:
        mine = []
        for rate in sizes.learning_rates:
            result = results[runs[cell, rate]]
            if isinstance(result, str):
                errors[cell] = result
            else:
                loss = mean(epoch.train_loss for epoch in result)
                mine.append(Trial(*cell, rate, loss if isfinite(loss) else inf))
        if mine:
            rates[cell] = min(mine, key=lambda trial: trial.train_loss).learning_rate
        trials += mine
    return trials, rates, errors


def summarize(history: Sequence[Epoch], errors: dict[Cell, str], sizes: Sizes) -> list[Summary]:
    rows = []
    for cell in product(sizes.networks, METHODS, sizes.epochs):
        epochs = sizes.epochs[cell[2]]
        if cell in errors:
            rows.append(Summary(*cell, nan, sizes.seeds, epochs, nan, nan, nan, nan, errors[cell]))
            continue
        last = [e for e in history if (e.network, e.method, e.batch_size, e.epoch) == (*cell, epochs)]
        right = [e.test_accuracy for e in last]
        loss = mean(e.train_loss for e in last)
        rows.append(Summary(*cell, last[0].learning_rate, len(last), epochs, loss, mean(right), min(right), max(right)))
    return rows


def summary_table(rows: Sequence[Summary], network: str) -> str:
    """Return a table of the test accuracy in %, mean [range], and the learning rate."""
    mine = {(row.method, row.batch_size): row for row in rows if row.network == network}
    batches = list(dict.fromkeys(batch for _, batch in mine))

    def cell(row: Summary) -> str:
        if row.error:
            return "cannot train"
        low, high = 100 * row.accuracy_min, 100 * row.accuracy_max
        return f"{100 * row.accuracy:.1f} [{low:.1f}, {high:.1f}] at {row.learning_rate:g}"

    header = [network, *(f"mini-batch {batch}, {mine['none', batch].epochs} epochs" for batch in batches)]
    return table(header, [[method, *(cell(mine[method, batch]) for batch in batches)] for method in METHODS])


def draw(history: Sequence[Epoch], errors: dict[Cell, str], sizes: Sizes, losses: bool, path: Path) -> Path:
    """Draw a panel for each network and mini-batch: training loss or test error, mean over the seeds and range."""
    columns = list(sizes.epochs)
    figure, panels = plt.subplots(
        len(sizes.networks), len(columns), figsize=(3.6 * len(columns), 3.2 * len(sizes.networks) + 0.5),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for cell, axes in zip(product(sizes.networks, columns), panels.flat, strict=True):
        for method, colour in COLOURS.items():
            mine = [e for e in history if (e.network, e.batch_size, e.method) == (*cell, method)]
            by_epoch: dict[int, list[float]] = {}
            for e in mine:
                by_epoch.setdefault(e.epoch, []).append(e.train_loss if losses else 100 - 100 * e.test_accuracy)
            style = "-" if method.startswith("BNP") else "--"
            axes.plot(
                list(by_epoch), [mean(v) for v in by_epoch.values()], style, color=colour, linewidth=1.6, label=method
            )
            low, high = [min(v) for v in by_epoch.values()], [max(v) for v in by_epoch.values()]
            axes.fill_between(list(by_epoch), low, high, color=colour, alpha=0.15, linewidth=0)
        cannot = [method for network, method, batch in errors if (network, batch) == cell]
        axes.set_xlabel("epoch" + (f"\ncannot train: {', '.join(cannot)}" if cannot else ""), fontsize=9)
        axes.set_title(f"{cell[0]}, mini-batch {cell[1]}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_yscale("log")
    figure.suptitle("Training loss" if losses else "Test error, %", x=0.01, ha="left")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    return save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.small_batches", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: does it work, not a result")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument(
        "--out", type=Path, help="folder (default: bench/results/small_batches; with --quick out/small_batches)"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    out: Path = (options.out or ROOT / ("out" if options.quick else "bench/results") / "small_batches").resolve()
    if out.exists() and not out.is_dir():
        parser.error(f"--out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else FULL

    with ExitStack() as stack:
        pool = None
        if options.workers > 1:
            spawn = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
            pool = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=spawn))
        trials, rates, errors = search(sizes, pool)
        runs = [
            Run(*cell, rate, seed, sizes.epochs[cell[2]], sizes.images)
            for cell, rate in rates.items()
            for seed in range(sizes.seeds)
        ]
        results = execute(runs, pool, "training")
    history = [epoch for run in runs for epoch in results[run] if isinstance(epoch, Epoch)]
    rows = summarize(history, errors, sizes)

    write_csv(out / "learning_rates.csv", type(trials[0]), trials)
    write_csv(out / "curves.csv", type(history[0]), history)
    write_csv(out / "summary.csv", type(rows[0]), rows)
    with plt.rc_context(STYLE):
        draw(history, errors, sizes, False, out / "error.png")
        draw(history, errors, sizes, True, out / "loss.png")
    for network in sizes.networks:
        print(f"\n{summary_table(rows, network)}")
    print(
        f"\nTest accuracy in % after the last epoch: mean [range] of {sizes.seeds} seeds, at the learning rate found."
    )
    for (network, method, batch), error in errors.items():
        print(f"Cannot train: {method}, {network}, mini-batch {batch}: {error}")
    print(f"Files: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
