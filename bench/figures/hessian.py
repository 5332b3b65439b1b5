"""BNP, Figure 8: training with BNP, and the condition number of the Hessian of one unit of the output layer.

The paper's network (two hidden layers of 100 ReLU, 10 outputs, mini-batches of 60, SGD, Glorot uniform, biases 0) on
scikit-learn's digits in place of CIFAR10, in float64. The paper tunes the learning rate of each method; here it is the
one of `LEARNING_RATES` with the smallest training loss over all steps of the first seed.

The Hessian of a mini-batch is that of the loss in [b, w] of the first output, 101 x 101. At most 60 samples make it, so
it is singular, and condition numbers are of nonzero eigenvalues, as everywhere in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

from bench.experiments.digits import Split, accuracy, batches, digits_split
from bench.measure.results import write_csv
from bench.report.plots import BLUE, DARK, MID, ORANGE, save
from normkernels.analysis import hessian_condition
from normkernels.optim import BNP

VANILLA, PRECONDITIONED = "vanilla", "BNP"
COLOURS = {VANILLA: DARK, PRECONDITIONED: BLUE}
LEARNING_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
OUTPUT = "5"  # the output layer's name in the network


@dataclass(frozen=True)
class Sizes:
    epochs: int
    seeds: int
    learning_rates: tuple[float, ...] = LEARNING_RATES
    batch_size: int = 60


FULL = Sizes(epochs=12, seeds=3)
QUICK = Sizes(epochs=1, seeds=1, learning_rates=(0.1,), batch_size=300)


@dataclass(frozen=True)
class Step:
    """Measurements before the step is taken; ``test_accuracy`` is from after it.

    ``hessian``: kappa(H). ``preconditioned``: kappa(P^T H P), P as BNP has it, with running statistics and epsilons;
    ``scaling``: kappa(D) of the same D. ``..._batch``: both from the mini-batch's own statistics without epsilons, eq.
    12 and 13, where a unit that is constant in the mini-batch keeps its scale. ``loss_part``: kappa(S) of Proposition
    2, the second derivatives p (1 - p) of the loss at the samples, which no preconditioner of the features changes.
    """

    method: str
    seed: int
    step: int
    learning_rate: float
    train_loss: float
    test_accuracy: float
    hessian: float
    preconditioned: float
    scaling: float
    preconditioned_batch: float
    scaling_batch: float
    loss_part: float


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((64, 100), (100, 100), (100, 10)):
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def in_float64(split: Split) -> Split:
    return replace(split, train_x=split.train_x.double(), test_x=split.test_x.double())


def running(bnp: BNP) -> tuple[Tensor, Tensor]:
    """Return mu and sigma~^2 = sigma^2 + eps1 max(sigma^2) + eps2 of the output layer's input."""
    statistics = bnp.state_dict()[OUTPUT]
    variance = statistics["variance"]
    return statistics["mean"], variance + bnp.eps1 * variance.max() + bnp.eps2


def conditions(model: nn.Sequential, loss: Callable[[], Tensor], hidden: Tensor, bnp: BNP | None) -> tuple[float, ...]:
    """Return the condition numbers of `Step` up to those of the mini-batch; NaN for those that need BNP, without it."""
    layer = model.get_submodule(OUTPUT)
    assert isinstance(layer, nn.Linear)
    if bnp is None:
        return hessian_condition(loss, layer).plain, nan, nan, nan, nan
    mean, variance = running(bnp)
    ours = hessian_condition(loss, layer, mean=mean, variance=variance)
    variance, mean = torch.var_mean(hidden, 0, correction=0)
    exact = hessian_condition(loss, layer, mean=mean, variance=torch.where(variance > 0, variance, 1.0))
    assert ours.preconditioned and ours.scaling and exact.preconditioned and exact.scaling
    return ours.plain, ours.preconditioned, ours.scaling, exact.preconditioned, exact.scaling


def train(method: str, learning_rate: float, seed: int, split: Split, sizes: Sizes, full: bool) -> Iterator[Step]:
    """Train and yield each step; ``full``: with test accuracy and condition numbers, which are NaN otherwise."""
    model = network(seed)
    bnp = BNP(model) if method == PRECONDITIONED else None
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    step = 0
    for epoch in range(sizes.epochs):
        for index in batches(len(split.train_y), sizes.batch_size, seed, epoch):
            x, y = split.train_x[index], split.train_y[index]
            model.train()
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, x, y)
            loss.backward()
            if bnp is not None:
                bnp.step()
            model.eval()  # BNP takes statistics in training mode only: measuring must not change them
            figures: tuple[float, ...] = (nan,) * 6
            if full:
                with torch.no_grad():
                    hidden = model[: int(OUTPUT)](x)
                    p = model(x).softmax(1)[:, 0]
                S = p * (1 - p)
                figures = (*conditions(model, partial(loss_of, model, x, y), hidden, bnp), float(S.max() / S.min()))
            optimizer.step()
            right = accuracy(model, split.test_x, split.test_y) if full else nan
            step += 1
            yield Step(method, seed, step, learning_rate, float(loss.detach()), right, *figures)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def best_learning_rate(method: str, split: Split, sizes: Sizes, bar: tqdm[Any]) -> float:
    """Return the rate with the smallest sum of the training losses of all steps, infinite for a run that diverges."""
    totals = {}
    for rate in sizes.learning_rates:
        total = sum(s.train_loss for s in train(method, rate, 0, split, sizes, full=False))
        totals[rate] = total if total == total else float("inf")
        bar.set_postfix_str(f"{method}, learning rate {rate:g}: sum of losses {total:.4g}")
        bar.update()
    return min(totals, key=lambda rate: totals[rate])


def band(axes: Axes, steps: Sequence[Step], value: Callable[[Step], float], colour: str, label: str, style: str = "-"):
    """Draw the median of the seeds, and a band over all of them."""
    by_step: dict[int, list[float]] = {}
    for s in steps:
        by_step.setdefault(s.step, []).append(value(s))
    xs = list(by_step)
    axes.plot(xs, [median(v) for v in by_step.values()], style, color=colour, linewidth=1.6, label=label)
    low, high = [min(v) for v in by_step.values()], [max(v) for v in by_step.values()]
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def draw(history: Sequence[Step], path: Path) -> Path:
    figure, (left, center, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    losses = left.twinx()
    losses.spines["right"].set_visible(True)
    for method, colour in COLOURS.items():
        mine = [s for s in history if s.method == method]
        rate = f"learning rate {mine[0].learning_rate:g}"
        band(left, mine, lambda s: 100 * s.test_accuracy, colour, f"{method}, {rate}")
        band(losses, mine, lambda s: s.train_loss, colour, method, "--")
    left.set_title("Test accuracy, % (solid), training loss (dashed)")
    losses.set_yscale("log")
    # the legend is on the axes that are on top
    losses.legend(*left.get_legend_handles_labels(), fontsize=9, loc="center right", frameon=True, edgecolor="white")
    ours = [s for s in history if s.method == PRECONDITIONED]
    plain = [s for s in history if s.method == VANILLA]
    band(center, plain, lambda s: s.hessian, DARK, "H, vanilla network")
    band(center, ours, lambda s: s.hessian, ORANGE, "H, network trained with BNP")
    band(center, ours, lambda s: s.preconditioned, BLUE, "preconditioned as BNP does")
    band(center, ours, lambda s: s.preconditioned_batch, BLUE, "preconditioned by eq. 12", ":")
    band(center, ours, lambda s: s.loss_part, MID, "S alone, the loss's part", "--")
    center.set_title("Condition number of the Hessian")
    band(right, ours, lambda s: s.scaling, BLUE, "as BNP scales")
    band(right, ours, lambda s: s.scaling_batch, BLUE, "eq. 12", ":")
    right.set_title("Condition number of D")
    for axes in (center, right):
        axes.set_yscale("log")
        axes.legend(fontsize=9)
    for axes in (left, center, right):
        axes.set_xlabel("iteration")
        axes.grid(color="#e6e6e6", linewidth=0.8)
    return save(figure, path)


def figure_8(out: Path, sizes: Sizes) -> list[Path]:
    split = in_float64(digits_split())
    with tqdm(total=len(COLOURS) * len(sizes.learning_rates), unit="run", desc="BNP, learning rates") as bar:
        rates = {method: best_learning_rate(method, split, sizes, bar) for method in COLOURS}
    history: list[Step] = []
    steps = sizes.epochs * (len(split.train_y) // sizes.batch_size)
    with tqdm(total=len(COLOURS) * sizes.seeds * steps, unit="step", desc="BNP, Figure 8") as bar:
        for method, rate in rates.items():
            for seed in range(sizes.seeds):
                for step in train(method, rate, seed, split, sizes, full=True):
                    history.append(step)
                    bar.set_postfix_str(f"{method}, seed {seed}: test {step.test_accuracy:.3f}", refresh=False)
                    bar.update()
    table = out / "bnp_figure_8.csv"
    write_csv(table, Step, history)
    return [table, draw(history, table.with_suffix(".png"))]
