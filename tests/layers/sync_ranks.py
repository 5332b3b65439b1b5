"""Processes for the tests of synchronized layers: all cases of a file in one start, which takes longer than they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

import normkernels as nk
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient

Case = Callable[[int, str], Any]  # rank, device -> what the tests compare


def _on_a_rank(rank: int, cases: Mapping[str, Case], world: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/start", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        torch.save({name: case(rank, device) for name, case in cases.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_ranks(cases: Mapping[str, Case], world: int, folder: Path, backend: str = "gloo") -> list[dict[str, Any]]:
    """Run the cases on all ranks, and return by name what each rank's cases returned.

    A case that raises on one rank ends all of them.

    The processes are forked from one that has only imported this file: importing torch is most of what starting takes.
    """
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_on_a_rank, (cases, world, str(folder), backend), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", map_location="cpu", weights_only=False) for rank in range(world)]


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Record the bytes of each collective of a layer, in order; negative where objects are compared."""
    found: list[int] = []
    reduce, gather = collectives.all_reduce, dist.all_gather_object

    def counted_reduce(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(values.numel() * values.element_size())
        return reduce(values, *args, **kwargs)

    def counted_gather(*args: Any, **kwargs: Any) -> None:
        found.append(-1)
        gather(*args, **kwargs)

    collectives.all_reduce, dist.all_gather_object = counted_reduce, counted_gather
    try:
        yield found
    finally:
        collectives.all_reduce, dist.all_gather_object = reduce, gather


@dataclass(frozen=True)
class Problem:
    """A batch, how it is split, and the layer. ``splits``: samples of each rank, in units of ``unit``."""

    splits: tuple[int, ...] = (4, 4)
    unit: int = 1
    channels: int = 8
    positions: tuple[int, ...] = (5, 3)
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    dbn: bool = False
    group_size: int = 4
    scaling: str = "trace"
    affine: bool = True
    autocast: bool = False
    mean: float = 1.0

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return x and dL/dy of all ranks."""
        shape = (sum(self.splits) * self.unit, self.channels, *self.positions)
        x = inputs.gaussian(shape, dtype=self.dtype, group_size=self.group_size, mean=self.mean)
        x = x.contiguous(memory_format=self.layout)
        return x, incoming_gradient(x)

    def share(self, t: Tensor, rank: int) -> Tensor:
        return t.split([n * self.unit for n in self.splits])[rank].clone()

    @property
    def parameters_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.dtype

    def layer(self, synchronized: bool = True, **options: Any) -> Any:
        """Return a layer with weights of both signs, far from 1 and 0.

        Its running statistics are the last batch's unless told otherwise.
        """
        options = {"momentum": 1.0, "affine": self.affine, "dtype": self.parameters_dtype, **options}
        if not self.dbn:
            options["scaling"] = self.scaling
        one = {2: (nk.IterNorm1d, nk.DBN1d), 3: (nk.IterNorm1d, nk.DBN1d), 4: (nk.IterNorm2d, nk.DBN2d)}
        dimensions = 2 + len(self.positions)
        types = (nk.SyncIterNorm, nk.SyncDBN) if synchronized else one.get(dimensions, (nk.IterNorm3d, nk.DBN3d))
        return with_affine(types[self.dbn](self.channels, self.group_size, **options))

    def config(self) -> Config:
        layer = self.layer()
        method = "eigh" if self.dbn else "newton"
        return Config(layer.group_size, 0 if self.dbn else layer.num_iterations, layer.eps, self.scaling, method)

    def forward_bytes(self) -> int:
        """Return 8 (1 + C + C (d + 1) / 2), docs/distributed.md."""
        d = min(self.group_size, self.channels)
        return 8 * (1 + self.channels + self.channels * (d + 1) // 2)

    def backward_bytes(self) -> int:
        """Return 4 (C + C (d + 1) / 2), twice that for float64."""
        d = min(self.group_size, self.channels)
        return (8 if self.dtype == torch.float64 else 4) * (self.channels + self.channels * (d + 1) // 2)


def with_affine(layer: Any) -> Any:
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1.5, 2, layer.num_features))
            layer.bias.copy_(torch.linspace(3, -1, layer.num_features))
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor, autocast: bool = False) -> dict[str, Tensor | None]:
    """Run forward and backward, and return y, gradients and running statistics."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(dy)
    layer = getattr(layer, "_orig_mod", layer)  # the names of a compiled layer are others
    found = {"y": y.detach(), "dx": x.grad} | {f"d{k}": p.grad for k, p in layer.named_parameters()}
    layer.zero_grad()
    return found | {name: value.clone() for name, value in layer.named_buffers()}


def training_step(problem: Problem, rank: int, device: str) -> dict[str, Tensor | None]:
    x, dy = (problem.share(t, rank).to(device) for t in problem.whole())
    return step(problem.layer().to(device), x, dy, problem.autocast)


def training_steps(problems: Mapping[str, Problem]) -> dict[str, Case]:
    return {name: partial(training_step, problem) for name, problem in problems.items()}
