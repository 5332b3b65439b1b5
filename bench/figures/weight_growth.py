"""New Interpretations of Normalization, Figure 3: the length of the weights, with and without weight decay.

A convolutional network on scikit-learn's digits in place of ResNet-101 on CIFAR. It is trained with SGD without
momentum, for which Lemma 3 is an equation: |W_k|^2 = |W_0|^2 + sum eta^2 |grad|^2, drawn beside what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from bench.experiments.digits import NormFactory, Split, accuracy, batches, build_network, digits_split
from bench.measure.results import write_csv
from bench.report.plots import BLUE, MID, ORANGE, save
from normkernels.analysis import weight_norms

GROUPS = 8
NORMS: dict[str, NormFactory] = {
    "BN": nn.BatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(GROUPS, channels),
    "LN": lambda channels: nn.GroupNorm(1, channels),  # over channels and positions of a sample
    "WN": lambda channels: nn.Identity(),
}


@dataclass(frozen=True)
class Sizes:
    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.2
    weight_decay: float = 5e-4


FULL = Sizes(epochs=60)
QUICK = Sizes(epochs=2, batch_size=256)


@dataclass(frozen=True)
class Step:
    """One step of training.

    ``weight_norm``: the length of all convolutions' weights as one vector, for WN of the directions v. ``lemma_3``: the
    length that follows from the gradients so far, which holds without weight decay.
    """

    norm: str
    weight_decay: float
    step: int
    weight_norm: float
    lemma_3: float
    train_loss: float
    test_accuracy: float


def network(norm: str, seed: int = 0) -> nn.Sequential:
    """Build the network, with the same first weights for every norm, for weight normalization as directions v.

    Its lengths g start at sqrt(2), He's for ReLU: torch's first weights shrink what goes through them, and four layers
    without a normalization of the data did not start to learn within 15 epochs.
    """
    model = build_network(NORMS[norm], seed)
    if norm == "WN":
        for module in model:
            if isinstance(module, nn.Conv2d):
                weight_norm(module)
                nn.init.constant_(module.get_parameter("parametrizations.weight.original0"), 2**0.5)
    return model


def directions(model: nn.Sequential) -> dict[str, nn.Parameter]:
    """Return the weights whose length does not matter to the loss."""
    ours = {}
    for index, module in enumerate(model):
        if isinstance(module, nn.Conv2d):
            own = dict(module.named_parameters())
            name = "weight" if "weight" in own else "parametrizations.weight.original1"
            ours[f"{index}.{name}"] = own[name]
    return ours


def train(norm: str, weight_decay: float, split: Split, sizes: Sizes, bar: tqdm[Any], seed: int = 0) -> list[Step]:
    """Train and return all steps; accuracy is measured once an epoch, and a step has that of its epoch's end."""
    model = network(norm, seed)
    weights = directions(model)
    optimizer = torch.optim.SGD(model.parameters(), sizes.learning_rate, weight_decay=weight_decay)

    def square() -> float:
        norms = weight_norms(model)
        return sum(norms[name] ** 2 for name in weights)

    lemma = square()
    history: list[Step] = []
    for epoch in range(sizes.epochs):
        model.train()
        rows: list[tuple[int, float, float, float]] = []
        for index in batches(len(split.train_y), sizes.batch_size, seed, epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(split.train_x[index]), split.train_y[index])
            loss.backward()
            for weight in weights.values():
                assert weight.grad is not None
                lemma += sizes.learning_rate**2 * float(weight.grad.double().square().sum())
            optimizer.step()
            rows.append((len(history) + len(rows) + 1, square() ** 0.5, lemma**0.5, float(loss.detach())))
        right = accuracy(model, split.test_x, split.test_y)
        history += [Step(norm, weight_decay, *row, right) for row in rows]
        bar.set_postfix_str(f"{norm}, weight decay {weight_decay:g}: test {right:.3f}", refresh=False)
        bar.update()
    return history


def draw(history: Sequence[Step], path: Path) -> Path:
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.6), sharex=True, layout="constrained")
    for norm, axes in zip(NORMS, panels.flat, strict=True):
        mine = [s for s in history if s.norm == norm]
        without, decayed = [s for s in mine if not s.weight_decay], [s for s in mine if s.weight_decay]
        for steps, colour, label in (
            (without, BLUE, "without weight decay"),
            (decayed, ORANGE, f"weight decay {decayed[0].weight_decay:g}"),
        ):
            axes.plot([s.step for s in steps], [s.weight_norm for s in steps], color=colour, linewidth=2, label=label)
        xs = [s.step for s in without]
        axes.plot(xs, [s.lemma_3 for s in without], color=MID, linewidth=1.2, linestyle="--", label="Lemma 3")
        axes.set_title(f"$L_2$ norm of weights, {norm}")
        axes.grid(color="#e6e6e6", linewidth=0.8)
    for axes in panels[1]:
        axes.set_xlabel("training step")
    panels[0][0].legend(fontsize=9)
    return save(figure, path)


def figure_3(out: Path, sizes: Sizes) -> list[Path]:
    split = digits_split()
    history = []
    with tqdm(total=2 * len(NORMS) * sizes.epochs, unit="epoch", desc="New Interpretations, Figure 3") as bar:
        for norm in NORMS:
            for weight_decay in (0.0, sizes.weight_decay):
                history += train(norm, weight_decay, split, sizes, bar)
    table = out / "new_interpretations_figure_3.csv"
    write_csv(table, type(history[0]), history)
    return [table, draw(history, table.with_suffix(".png"))]
