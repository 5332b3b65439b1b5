"""The ranks of test_sync_training run these cases, each a function of the rank and its device."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkernels as nk
from tests.layers.sync_ranks import Problem, counted_collectives, step

WHOLE = 8
UNLIKE, ALIKE = (5, 3, 7, 8), (5, 5)  # samples of rank 0 in each step; rank 1 has the others
UNEVEN = Problem(splits=(6, 2))
PAGE = Path(__file__).parents[2] / "docs/distributed.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def network(convert: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 8, 3, stride=2),
        norm=nk.IterNorm2d(8, group_size=4),
        relu=nn.ReLU(),
        second=nn.Conv2d(8, 4, 1),
        whiten=nk.DBN2d(4),
        flatten=nn.Flatten(),
        linear=nn.Linear(16, 2),
    )
    model = nn.Sequential(layers).double()
    return nk.SyncIterNorm.convert_sync_iternorm(model) if convert else model


def batch(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(WHOLE, 3, 6, 6, dtype=torch.float64, generator=g) * (step + 1) + 0.5


def loss(model: nn.Module, x: Tensor, share: float = 1.0) -> Tensor:
    """Return the mean over the whole batch; DDP and FSDP divide by the number of ranks, which share undoes."""
    return model(x).sin().sum() / WHOLE * share


def results(model: nn.Module) -> list[Tensor]:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [*(p.detach() for p in whole), *model.buffers()]


def train(model: nn.Module, replica: nn.Module, rank: int | None, first: tuple[int, ...] = UNLIKE) -> list[Tensor]:
    """Train on a rank's share of every batch, or alone on all of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for k, n in enumerate(first):
        optimizer.zero_grad()
        if rank is None:
            loss(replica, batch(k)).backward()
        else:
            loss(replica, share(batch(k), n, rank), 2.0).backward()
        optimizer.step()
    return results(model)


def share(x: Tensor, first: int, rank: int) -> Tensor:
    return x[:first] if rank == 0 else x[first:]


def ddp(rank: int, device: str) -> list[Tensor]:
    model = network()
    return train(model, DistributedDataParallel(model), rank)


def compiled_ddp(rank: int, device: str) -> list[Tensor]:
    torch._dynamo.reset()
    model = network()
    return train(model, torch.compile(DistributedDataParallel(model), backend="aot_eager"), rank, ALIKE)


def fsdp(rank: int, device: str) -> list[Tensor]:
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.norm, model.linear):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, model, rank)


def accumulated(rank: int, device: str) -> list[Tensor]:
    """Add up the gradients of two batches, the first without DDP's collectives; the layer's own are as ever."""
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with replica.no_sync():
        loss(replica, share(batch(0), 5, rank), 2.0).backward()
    loss(replica, share(batch(1), 3, rank), 2.0).backward()
    optimizer.step()
    return results(model)


def compiled(rank: int, device: str) -> dict[str, Any]:
    """Run the same layer as it is and compiled: in training, where nothing needs a gradient, and in evaluation."""
    torch._dynamo.reset()
    warnings.filterwarnings("error", message=".*lru_cache")  # Dynamo warns of a cache that it walks past
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    found = {}
    for name, group in (("own group", dist.new_group([0, 1])), ("default group", None)):
        layers = [UNEVEN.layer(process_group=group) for _ in range(2)]
        layers[1] = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
        found[name] = [step(layer, x, dy) for layer in layers]
    with torch.no_grad():
        found["no_grad"] = [{"y": layer(x)} for layer in layers]
    found["evaluation"] = [step(layer.eval(), x, dy) for layer in layers]
    return found


def batch_sizes(rank: int, device: str) -> list[tuple[Tensor, Tensor, int]]:
    """Run one compiled layer for batches of several sizes; return results, and how often it was compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, other = UNEVEN.layer(), UNEVEN.layer()
    fast = torch.compile(other, fullgraph=True, backend=counter, dynamic=True)
    found = []
    for first in (6, 5, 4, 3):
        x = share(UNEVEN.whole()[0], first, rank)
        found.append((step(layer, x, x)["dx"], step(fast, x, x)["dx"], counter.frame_count))
    return found


def checkpointed(rank: int, device: str) -> tuple[list[Any], list[int]]:
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    layer, other = UNEVEN.layer(), UNEVEN.layer()
    found = [step(layer, x, dy)]
    other(x)  # the comparison of the ranks' layers
    other.reset_running_stats()
    with counted_collectives() as collectives:
        leaf = x.clone().requires_grad_()
        y = checkpoint(other, leaf, use_reentrant=False)
        y.backward(dy)
    found.append({"y": y.detach(), "dx": leaf.grad, "dweight": other.weight.grad, "dbias": other.bias.grad})
    return found, collectives


def copies(rank: int, device: str) -> list[Any]:
    """Copy layers by deepcopy and pickle, with a process group of their own and without.

    Return whether the copies have it, and the results of both.
    """
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    found: list[Any] = []
    for group in (None, dist.new_group([0, 1])):
        layer = UNEVEN.layer(process_group=group)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            found.append((twin.process_group is group, step(layer, x, dy), step(twin, x, dy)))
            layer = UNEVEN.layer(process_group=group)
    return found


def examples(rank: int, device: str) -> list[list[Tensor]]:
    """Run the code of docs/distributed.md in a process group that is there; return what each block ends with."""
    names: dict[str, Any] = {}
    found = []
    init, dist.init_process_group = dist.init_process_group, lambda: None
    try:
        for block in CODE.findall(PAGE.read_text(encoding="utf-8")):
            exec(compile(block, str(PAGE), "exec"), names)
            found.append(results(names["model"]))
    finally:
        dist.init_process_group = init
    return found


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def comparisons(rank: int, device: str) -> list[int]:
    """Count how often the ranks compare a layer that is called compiled and not, and moves to another group."""
    calls: list[None] = []
    gather = dist.all_gather_object
    layer = nk.SyncIterNorm(8, 4, eps=0.25)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    with patch.object(dist, "all_gather_object", lambda *args: (calls.append(None), gather(*args))):
        for call in (compiled, layer, compiled):
            call(torch.randn(3, 8, 2, 2))
            found.append(len(calls))
        layer.process_group = dist.new_group([0, 1])
        for call in (layer, compiled):
            call(torch.randn(3, 8, 2, 2))
            found.append(len(calls))
    return found


class Block(nn.Module):
    """A block that shares compiled code with blocks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nk.SyncIterNorm(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def blocks(rank: int, device: str) -> int:
    """Count the graphs of as many blocks as Dynamo would not compile apart."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(4, 8, 3, 3)
    for _ in range(2):
        for block in [Block() for _ in range(10)]:
            block.compile(backend=counter)
            x = block(x)
    return counter.frame_count


TYPES = (torch.float32, torch.float64)


def refusals(rank: int, device: str) -> dict[str, Any]:
    """Return what every rank is told. Afterwards the group still works: no rank waits for another."""
    x = torch.randn(4, 8 - 4 * rank, 3, 3)
    found: dict[str, Any] = {
        "channels": raised(lambda: nk.SyncIterNorm(8 - 4 * rank, group_size=4)(x)),
        "group size": raised(lambda: nk.SyncIterNorm(8, group_size=4 - 2 * rank)(torch.randn(4, 8, 3, 3))),
        "method": raised(lambda: (nk.SyncIterNorm if rank else nk.SyncDBN)(8, 4)(torch.randn(4, 8, 3, 3))),
        "type": raised(lambda: nk.SyncIterNorm(8, dtype=TYPES[rank])(torch.randn(4, 8, dtype=TYPES[rank]))),
        "gradient": raised(lambda: nk.SyncIterNorm(8)(torch.randn(4, 8, requires_grad=rank == 0))),
    }
    layer = UNEVEN.layer()
    leaf = torch.randn(3, 8, 2, 2, requires_grad=True)
    found["double backward"] = raised(lambda: torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True))
    ones = torch.ones(1)
    dist.all_reduce(ones)
    found["sum"] = ones.item()
    return found


CASES = {
    case.__name__: case
    for case in (
        ddp,
        compiled_ddp,
        fsdp,
        accumulated,
        compiled,
        batch_sizes,
        checkpointed,
        copies,
        comparisons,
        blocks,
        examples,
        refusals,
    )
}
