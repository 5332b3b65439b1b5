"""A run: what defines it, the network, its epochs on one or more processes, checkpoints."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import normkernels as nk
from bench.experiments.cifar.data import Images, augmented, batches, draws, share
from bench.networks.resnet import resnet18

# Families that convert.replace knows: on one process, and on several.
NORMS = {
    "batchnorm": None,
    "iternorm": ("IterNorm", "SyncIterNorm"),
    "dbn": ("DBN", "SyncDBN"),
    "popnorm": ("POPNorm", "POPNorm"),
}


@dataclass(frozen=True)
class Settings:
    """The arguments that define a run and must be the same when it is resumed; ``width``: as Fraction reads it."""

    norm: str = "iternorm"
    where: str = "all"
    decorrelate_features: bool = False
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "cosine"
    width: str = "1"
    seed: int = 0
    amp: bool = False
    compile: bool = False
    processes: int = 1


@dataclass(frozen=True)
class Epoch:
    """The record of an epoch; losses are means over the images, ``seconds`` those of training on rank 0."""

    norm: str
    where: str
    processes: int
    seed: int
    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Process:
    """One of ``ranks`` processes."""

    rank: int
    ranks: int
    device: torch.device

    def total(self, sums: Tensor) -> list[float]:
        """Return the sums over all processes."""
        if self.ranks > 1:
            dist.all_reduce(sums)
        return sums.tolist()


def join() -> Process:
    """Read torchrun's environment, if it is there, and join the other processes."""
    rank, ranks, local, here = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    cuda = torch.cuda.device_count() >= here  # nccl refuses two processes on one GPU
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Process(rank, ranks, device)


def build(settings: Settings) -> nn.Module:
    """Build the network: one seed gives the same convolutions whatever the norm, and on every process."""
    torch.manual_seed(settings.seed)
    model = resnet18(settings.width)
    families = NORMS[settings.norm]
    if families is None:
        return model
    family = families[settings.processes > 1]
    return nk.convert.replace(model, family, settings.where, decorrelate_features=settings.decorrelate_features)


def scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of the rate: cosine to zero, or a tenth after half and after three quarters of the epochs."""
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    milestones = [max(1, settings.epochs * quarters // 4) for quarters in (2, 3)]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)


class Training:
    """A run between two epochs: everything a checkpoint holds."""

    def __init__(self, settings: Settings, data: Images, process: Process) -> None:
        self.settings, self.data, self.process = settings, data, process
        self.model = build(settings).to(process.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
        self.scheduler = scheduler(self.optimizer, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)  # order and augmentation; nothing else is random
        self.history: list[Epoch] = []

    def save(self, path: Path) -> None:
        """Save a checkpoint whole or not at all: a process that is killed meanwhile leaves the checkpoint before."""
        state = {
            "arguments": asdict(self.settings),
            "mean": self.data.mean,
            "std": self.data.std,
            "epoch": len(self.history),
            "history": [asdict(epoch) for epoch in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Load a checkpoint, from which the run goes on.

        Raises:
            ValueError: the run of the checkpoint had other arguments or other images.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in asdict(self.settings).items():
            if state["arguments"][name] != value:
                raise ValueError(f"--resume: expected {name} {state['arguments'][name]} as in {path}, got {value}")
        for name, value in (("mean", self.data.mean), ("std", self.data.std)):
            if not torch.equal(state[name], value):
                raise ValueError(
                    f"--resume: expected the images of {path}, whose channels have the {name} "
                    f"{state[name].flatten().tolist()}, got {value.flatten().tolist()}"
                )
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])

    def run(self, until: int, checkpoint: Path) -> None:
        """Train to the end of epoch ``until``, with a checkpoint after each."""
        settings, data, first = self.settings, self.data, self.process.rank == 0
        # Not model.compile(), which leaves nn.Sequential itself out and compiles block by block (torch 2.13).
        model: Any = torch.compile(self.model) if settings.compile else self.model
        if self.process.ranks > 1:
            model = DistributedDataParallel(model)
        train, test = (-(-len(y) // settings.batch_size) for y in (data.train_y, data.test_y))
        epochs = range(len(self.history), until)
        with tqdm(total=len(epochs) * (train + test), unit="batch", desc=settings.norm, disable=not first) as bar:
            for epoch in epochs:
                rate = float(self.scheduler.get_last_lr()[0])
                started = time.perf_counter()
                train_loss, train_accuracy = self._epoch(model, bar, train=True)
                seconds = time.perf_counter() - started
                test_loss, test_accuracy = self._epoch(model, bar, train=False)
                self.scheduler.step()
                self.history.append(
                    Epoch(
                        settings.norm, settings.where, settings.processes, settings.seed, epoch + 1, rate,
                        train_loss, train_accuracy, test_loss, test_accuracy, seconds,
                    )
                )  # fmt: skip
                bar.set_postfix_str(f"epoch {epoch + 1}: loss {train_loss:.4f}, test {test_accuracy:.4f}")
                if first:
                    self.save(checkpoint)

    def _epoch(self, model: nn.Module, bar: tqdm, train: bool) -> tuple[float, float]:
        """Run an epoch and return mean loss and accuracy over the images, in training as they were before each step."""
        data, process, settings = self.data, self.process, self.settings
        pixels, labels = (data.train_x, data.train_y) if train else (data.test_x, data.test_y)
        model.train(train)
        sums = torch.zeros(2, dtype=torch.float64, device=process.device)
        for whole in batches(len(labels), settings.batch_size, self.generator if train else None):
            index = share(whole, process.rank, process.ranks).to(process.device)
            x, y = pixels[index], labels[index]
            if train:
                drawn = draws(len(whole), data.flip, self.generator)
                x = augmented(x, share(drawn, process.rank, process.ranks))
            x = data.standardized(x)
            # An empty share takes part as well: the others wait for its collectives.
            with torch.set_grad_enabled(train), torch.autocast(x.device.type, torch.bfloat16, enabled=settings.amp):
                logits = model(x)
            logits = logits.to(x.dtype)
            loss = F.cross_entropy(logits, y, reduction="sum")
            if train:
                self.optimizer.zero_grad()
                (loss * (process.ranks / len(whole))).backward()  # the mean over all: DDP divides by the ranks
                self.optimizer.step()
            sums += torch.stack([loss.detach(), (logits.argmax(1) == y).sum()])
            bar.update()
        total_loss, right = process.total(sums)
        return total_loss / len(labels), right / len(labels)
