"""BatchNorm, IterNorm and DBN on scikit-learn's digits: 1797 real 8 x 8 grey images, no download.

For one seed the three networks start from the same convolution weights and see the same batches in the same
order; their epochs are interleaved in changing order, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from bench.measure.timing import order

NormFactory = Callable[[int], nn.Module]
NUM_CLASSES = 10
TEST_FRACTION = 0.5  # the task is easy: many test images resolve small differences
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) in float32, standardized by the training images' statistics; labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    train_index: Tensor
    test_index: Tensor


def digits_split(test_fraction: float = TEST_FRACTION, seed: int = SPLIT_SEED) -> Split:
    """Return the same stratified split at every call. Nothing of the test images enters the standardization."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=data.target
    )
    train_index, test_index = torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))
    mean, std = images[train_index].mean(), images[train_index].std()
    images = (images - mean) / std
    return Split(
        images[train_index],
        labels[train_index],
        images[test_index],
        labels[test_index],
        train_index,
        test_index,
    )


def build_network(norm: NormFactory, seed: int, widths: tuple[int, ...] = (16, 32, 32, 64)) -> nn.Sequential:
    """Build a network (n, 1, 8, 8) -> (n, 10): conv-norm-ReLU for each width, pooled in the middle and at the end.

    Norm layers draw no random numbers, so one seed gives the same weights whatever the norm.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)]
        if index == len(widths) // 2 - 1:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))


def batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield index batches of one epoch, the same for every norm.

    The last, smaller batch is left out: with few samples its statistics would be the noisiest of the epoch.
    """
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for start in range(0, count - batch_size + 1, batch_size):
        yield permutation[start : start + batch_size]


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch of one network."""

    norm: str
    seed: int
    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, batch_size: int, seed: int, epoch: int
) -> float:
    """Make one pass over the training images, and return the mean loss."""
    model.train()
    losses = []
    for index in batches(len(split.train_y), batch_size, seed, epoch):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(split.train_x[index]), split.train_y[index])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def train(
    norms: Mapping[str, NormFactory],
    seeds: int = 5,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 0.05,
) -> list[Epoch]:
    """Train every norm with every seed; SGD with momentum .9 and a cosine schedule, the same for all."""
    split = digits_split()
    history = []
    names = list(norms)
    with tqdm(total=seeds * epochs * len(names), unit="epoch", desc="digits") as bar:
        for seed in range(seeds):
            models = {name: build_network(norms[name], seed) for name in names}
            optimizers = {
                name: torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
                for name, model in models.items()
            }
            schedules = {
                name: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
                for name, optimizer in optimizers.items()
            }
            for epoch in range(epochs):
                for name in order(names, epoch):
                    started = time.perf_counter()
                    loss = train_epoch(models[name], optimizers[name], split, batch_size, seed, epoch)
                    seconds = time.perf_counter() - started
                    schedules[name].step()
                    right = accuracy(models[name], split.test_x, split.test_y)
                    history.append(Epoch(name, seed, epoch + 1, loss, right, seconds))
                    bar.set_postfix_str(f"seed {seed}, {name}: loss {loss:.4f}, test {right:.3f}", refresh=False)
                    bar.update()
    return history


@dataclass(frozen=True)
class Summary:
    """Last epoch over the seeds; the deviation is the sample standard deviation, NaN for a single seed."""

    norm: str
    final_loss: float
    accuracy: float
    accuracy_std: float
    seconds_per_epoch: float


def summarize(history: list[Epoch]) -> list[Summary]:
    last = max(e.epoch for e in history)
    result = []
    for norm in dict.fromkeys(e.norm for e in history):
        final = [e for e in history if e.norm == norm and e.epoch == last]
        scores = torch.tensor([e.test_accuracy for e in final], dtype=torch.float64)
        deviation = float(scores.std()) if len(final) > 1 else float("nan")
        loss = sum(e.train_loss for e in final) / len(final)
        # the first epoch of each network pays for memory and thread pools
        seconds = median(e.seconds for e in history if e.norm == norm and (e.epoch > 1 or last == 1))
        result.append(Summary(norm, loss, float(scores.mean()), deviation, seconds))
    return result
