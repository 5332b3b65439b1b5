"""BNP on several ranks: replicas stay equal, and as one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkernels.optim import BNP
from tests.tolerances import assert_agree

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

WHOLE = 8
# Samples of rank 0 in each step; rank 1 has the others.
SPLITS = {"even": [4, 4, 4], "uneven": [5, 3, 7], "one rank empty": [4, 8, 0]}
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in SPLITS} | {"even, not merged": {"process_group": False}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()


def batch(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(WHOLE, 3, 6, 6, dtype=torch.float64, generator=g) * (step + 1) + 0.5


def loss(model: nn.Module, x: Tensor, share: float) -> Tensor:
    """Return the mean over the whole batch; DDP divides by the number of ranks, which share undoes."""
    return model(x).sin().flatten(1).sum() / WHOLE * share


def results(model: nn.Module, bnp: BNP) -> list[Tensor]:
    statistics = [v for s in bnp.state_dict().values() for v in (s["mean"], s["variance"])]
    numbers = [torch.tensor([s["samples"], s["positions"]]) for s in bnp.state_dict().values()]
    return [*(p.detach() for p in model.parameters()), *statistics, *numbers]


# Inputs of ranks 0 and 1: their shares of the samples, of the pixels, and of the output positions are all different.
SHAPES = [(2, 3, 4, 11), (5, 3, 6, 5)]


class Tokens(nn.Module):
    """A convolution on images of any size, and a linear layer on its positions, which are a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.patches(x).tanh().flatten(2).mT)


def of_a_rank(rank: int) -> Tensor:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(SHAPES[rank], dtype=torch.float64, generator=g) * (rank + 1) + 3 * rank


def sequences(ranks: Sequence[int], reduce: Callable[[Tensor], object] | None = None) -> list[Tensor]:
    """Make one step with the inputs of these ranks, one after the other; reduce: adds up the ranks' gradients."""
    model = Tokens()
    bnp = BNP(model, rho=0.5)
    for rank in ranks:
        loss(model, of_a_rank(rank), share=1.0).backward()
    for parameter in model.parameters():
        if reduce is not None:
            reduce(parameter.grad)
    bnp.step()
    return [*(parameter.grad for parameter in model.parameters()), *results(model, bnp)]


def on_a_rank(rank: int, folder: str) -> None:
    """Run all cases, as starting a process takes longer than they do."""
    torch.set_num_threads(1)
    start = f"file://{folder}/start"
    dist.init_process_group("gloo", init_method=start, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    calls = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: (calls.append(1), gather(*args, **kwargs))
    outcome = {}
    for name, options in OPTIONS.items():
        calls.clear()
        model = network()
        bnp = BNP(model, rho=0.5, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bnp.attach(optimizer)
        replica = DistributedDataParallel(model)
        for step, first in enumerate(SPLITS[name.removesuffix(", not merged")]):
            x = batch(step)
            optimizer.zero_grad()
            loss(replica, x[:first] if rank == 0 else x[first:], share=2.0).backward()
            optimizer.step()
        outcome[name] = [results(model, bnp), len(calls)]
    with pytest.raises(RuntimeError, match="forward pass"):  # on every rank, rather than on one while the other waits
        BNP(network()).step()
    model = network()
    bnp = BNP(model)
    if rank == 0:
        loss(model, batch(0), share=1.0).backward()
    bnp.step()
    outcome["only rank 0 had a forward pass"] = results(network(), bnp)
    outcome["other sizes"] = sequences([rank], dist.all_reduce)
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SPLITS)
def test_ranks_are_one_process_with_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    (first, collectives), (second, _) = (rank[name] for rank in ranks)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert collectives == len(SPLITS[name])

    model = network()
    bnp, optimizer = BNP(model, rho=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(len(SPLITS[name])):
        optimizer.zero_grad()
        loss(model, batch(step), share=1.0).backward()
        bnp.step()
        optimizer.step()
    assert_agree(first, results(model, bnp))


def test_a_rank_without_a_forward_pass_takes_part(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["only rank 0 had a forward pass"] for rank in ranks)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first[-1][0] == WHOLE


def test_ranks_with_images_of_different_sizes(ranks: list[dict[str, Any]]) -> None:
    """Every pixel counts once, and so does every token, as in one process: a rank weighs as much as it has of them."""
    first, second = (rank["other sizes"] for rank in ranks)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert_agree(first, sequences([0, 1]))

    model = Tokens()
    pixels = torch.cat([of_a_rank(rank).transpose(0, 1).flatten(1) for rank in range(2)], 1)
    tokens = torch.cat([model.patches(of_a_rank(rank)).tanh().transpose(0, 1).flatten(1) for rank in range(2)], 1)
    statistics = [s for values in (pixels, tokens) for s in (values.mean(1) / 2, (values.var(1, correction=0) + 1) / 2)]
    assert_agree(first[8:12], statistics)  # averaged with 0 and 1, as rho = 1 / 2
    samples = sum(shape[0] for shape in SHAPES)
    assert all(torch.equal(each, torch.tensor([samples, tokens.shape[1] / samples])) for each in first[12:])


def test_without_merging(ranks: list[dict[str, Any]]) -> None:
    """With process_group=False there is no collective, and every rank has statistics of its own."""
    (first, collectives), (second, _) = (rank["even, not merged"] for rank in ranks)
    assert collectives == 0
    assert not torch.equal(first[4], second[4])


def test_one_rank_needs_no_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather_into_tensor", None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/start", rank=0, world_size=1)
    try:
        model = network()
        bnp = BNP(model)
        loss(model, batch(0), share=1.0).backward()
        bnp.step()
    finally:
        dist.destroy_process_group()
