"""The cost of synchronized whitening on 8 to 1,024 ranks: a model, and measurements of gloo on this machine.

    python -m bench.experiments.sync_cost [--quick] [--link NAME:LATENCY_US:GB_PER_S ...] [--out DIR]

Measures all-reduces of gloo on 2 and 4 processes of one thread each, fits a latency and a bandwidth
(collectives.py), predicts with them the collectives of SyncIterNorm layers and of a training step of a small
ResNet, and measures those on 2 processes. Every layer is compared with one process that has the whole batch before it
is timed, and the bytes that it sends with the model. Then it extrapolates. Latency and bandwidth of GPU links are
assumptions: give your own with --link.

Writes all_reduce.csv, links.csv, layers.csv, model.csv and cost.png; prints the tables of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

import normkernels as nk
from bench.experiments.collectives import (
    ALL_REDUCES,
    NETWORKS,
    Cluster,
    Link,
    backward_bytes,
    batchnorm_seconds,
    fastest,
    fit,
    forward_bytes,
    gradient_seconds,
    ring,
    simulate,
    whitening_seconds,
)
from bench.measure.environment import ROOT, commit, device_name, versions
from bench.measure.results import write_csv
from bench.networks.resnet import resnet18
from bench.report.plots import BLUE, DARK, LIGHT, MID, ORANGE, STYLE, save
from bench.report.tables import number, table
from normkernels.primitives.iter_norm import sync

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUP_SIZES = (64, 16)
# Assumptions, in the order of published figures of one GPU's links: NVLink of a node, 400 Gb/s InfiniBand.
ASSUMED = ("NVLink:3:200", "InfiniBand:5:40")
MEASURED = "gloo, measured on 2 processes"
STEP = "ResNet-18, width 1/4"


@dataclass(frozen=True)
class Sizes:
    all_reduces: tuple[int, ...]  # bytes
    layers: tuple[tuple[int, int, tuple[int, ...]], ...]  # C, d, (N, *positions) of one rank
    batch: int  # samples of a rank, in the step
    rounds: int


FULL = Sizes(
    all_reduces=tuple(64 << k for k in range(0, 18)),
    layers=(
        (64, 64, (16, 32, 32)), (64, 16, (16, 32, 32)), (256, 64, (16, 16, 16)), (256, 16, (16, 16, 16)),
        (512, 64, (16, 8, 8)), (512, 512, (64, 8, 8)), (2048, 64, (16, 7, 7)),
    ),
    batch=32,
    rounds=40,
)  # fmt: skip
QUICK = Sizes(all_reduces=(64, 1 << 12, 1 << 18), layers=((16, 8, (4, 4, 4)),), batch=2, rounds=3)


@dataclass(frozen=True)
class Reduced:
    ranks: int
    bytes: int
    seconds: float  # median of the rounds, in each the slowest rank's
    fitted: float


@dataclass(frozen=True)
class Fitted:
    name: str
    latency_us: float
    gbytes_per_s: float
    worst_ratio: float  # between fitted and measured times
    device: str
    versions: str
    commit: str


@dataclass(frozen=True)
class Layer:
    """A layer on 2 processes, forward and backward: medians in ms. ``ratio``: median of the rounds' ratios.

    collectives_ms: with a barrier before each; with_waiting_ms: as they are, with the time for the slower rank.
    """

    layer: str
    shape: str
    bytes: int
    model_bytes: int
    predicted_ms: float
    collectives_ms: float
    predicted_ratio: float
    with_waiting_ms: float
    sync_ms: float
    plain_ms: float
    ratio: float


@dataclass(frozen=True)
class Cost:
    """A training step's collectives, in milliseconds. ``nodes_of_8``: simulated, with the first link inside nodes."""

    link: str
    network: str
    group_size: int
    ranks: int
    ring: float
    halving_doubling: float
    nodes_of_8: float
    sync_batchnorm: float
    gradients: float


def parse_link(text: str) -> tuple[str, Link]:
    try:
        name, latency, bandwidth = text.split(":")
        link = Link(float(latency) * 1e-6, float(bandwidth) * 1e9)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME:LATENCY_US:GB_PER_S, got {text!r}") from None
    if not (link.latency > 0 and link.bandwidth > 0):
        raise argparse.ArgumentTypeError(f"expected a latency and a bandwidth above 0, got {text!r}")
    return name, link


# This part runs on the ranks.


def timed(call: Callable[[], object]) -> float:
    """Return the seconds from when all ranks are there until this one is done."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def slowest(seconds: Sequence[Sequence[float]]) -> list[list[float]]:
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def all_reduces(sizes: Sizes, rank: int) -> list[float]:
    """Return the seconds of each size, called as in a layer: after a pass over activations, which empties the cache."""
    activations = torch.zeros(4 << 20)
    tensors = [torch.ones(size // 8, dtype=torch.float64) for size in sizes.all_reduces]
    calls = [partial(sync._all_reduce, t, dist.group.WORLD) for t in tensors]
    rounds = []
    for _ in range(sizes.rounds):
        times = []
        for call in calls:
            activations.add_(1)
            times.append(timed(call))
        rounds.append(times)
    return [median(times) for times in zip(*slowest(rounds[1:]), strict=True)]


@contextmanager
def watched(aligned: bool = False) -> Any:
    """Record the seconds and bytes of each collective of a layer.

    aligned: without the time that one rank waits for another.
    """
    found: list[tuple[float, int]] = []
    plain = sync._all_reduce

    def all_reduce(values: Tensor, process_group: Any) -> Tensor:
        if aligned:
            dist.barrier()
        start = time.perf_counter()
        result = plain(values, process_group)
        found.append((time.perf_counter() - start, values.numel() * values.element_size()))
        return result

    sync._all_reduce = all_reduce
    try:
        yield found
    finally:
        sync._all_reduce = plain


def compared(make: Callable[[], nn.Module], x: Tensor, sizes: Sizes, rank: int) -> dict[str, Any]:
    """Time synchronized layers against plain ones, interleaved, each rank on its own half of the batch."""
    half = x.chunk(2)[rank].clone().requires_grad_()
    plain, synchronized = make(), nk.SyncIterNorm.convert_sync_iternorm(make())
    dy = torch.randn_like(check(make(), synchronized, x, half, rank))

    def step(model: nn.Module) -> None:
        model(half).backward(dy)

    with watched() as found:
        step(synchronized)
    count, sent = len(found), sum(size for _, size in found)
    rounds = []
    for turn in range(sizes.rounds):
        times = {}
        with watched() as found:
            for model in (plain, synchronized) if turn % 2 else (synchronized, plain):
                times[model] = timed(partial(step, model))
                half.grad = None
                model.zero_grad()
        with watched(aligned=True) as alone:
            step(synchronized)
        assert len(found) == len(alone) == count
        waiting, sending = (sum(seconds for seconds, _ in calls) for calls in (found, alone))
        rounds.append([times[synchronized], times[plain], waiting, sending])
    rounds = slowest(rounds[1:])
    return {"rounds": rounds, "bytes": sent}


def check(alone: nn.Module, synchronized: nn.Module, x: Tensor, half: Tensor, rank: int) -> Tensor:
    """Return the synchronized result; raise if it is wrong, so that nothing wrong is timed."""
    with torch.no_grad():
        expected = alone(x).chunk(2)[rank]
        y = synchronized(half)
        error = (y - expected).abs().max() / expected.abs().max()
    if not error < 1e-3:  # for a whole network; tests/layers/test_sync.py has the bound of a layer
        raise RuntimeError(
            f"expected what one process computes with the whole batch, got a relative error of {error:.1e}"
        )
    return y


def network() -> nn.Module:
    """Build a small ResNet of IterNorm layers."""
    torch.manual_seed(0)
    model = resnet18("1/4")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nk.IterNorm2d(module.num_features))
    return model


def on_a_rank(rank: int, ranks: int, sizes: Sizes, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/start", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    torch.manual_seed(0)
    found: dict[Any, Any] = {"all-reduces": all_reduces(sizes, rank)}
    if ranks == 2:
        for c, d, (n, *positions) in sizes.layers:
            x = torch.randn(2 * n, c, *positions)
            found[c, d] = compared(partial(nk.IterNorm2d, c, d), x, sizes, rank)
        found[STEP] = compared(network, torch.randn(2 * sizes.batch, 3, 32, 32), sizes, rank)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


# This part runs in the process that was started.


def measure(ranks: int, sizes: Sizes) -> dict[Any, Any]:
    with TemporaryDirectory() as folder:
        # The processes are forked from one that has imported what takes long.
        multiprocessing.set_forkserver_preload(["normkernels", "bench.report.plots"])
        start_processes(on_a_rank, (ranks, sizes, folder), nprocs=ranks, start_method="forkserver")
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def layer_row(name: str, shape: str, channels: Sequence[tuple[int, int]], found: dict[str, Any], link: Link) -> Layer:
    """Return the row of a layer or network; channels: C and d of every layer."""
    sizes = [size for c, d in channels for size in (forward_bytes(c, d), backward_bytes(c, d))]
    predicted = sum(ring(size, 2, link) for size in sizes) * 1e3
    sync_ms, plain_ms, waiting, sending = (1e3 * median(times) for times in zip(*found["rounds"], strict=True))
    ratio = median(times[0] / times[1] for times in found["rounds"])
    return Layer(
        name, shape, found["bytes"], sum(sizes), predicted, sending, predicted / sending, waiting,
        sync_ms, plain_ms, ratio,
    )  # fmt: skip


def simulated_step(channels: Sequence[int], group_size: int, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of all layers' collectives with the faster algorithm, message by message."""
    seconds: dict[int, float] = {}
    total = 0.0
    for c in channels:
        for size in (forward_bytes(c, group_size), backward_bytes(c, group_size)):
            if size not in seconds:
                ends = [simulate(name, size, torch.zeros(ranks), cluster).max().item() for name in ALL_REDUCES]
                seconds[size] = min(ends)
            total += seconds[size]
    return total


def extrapolated(links: dict[str, Link], ranks: Sequence[int]) -> list[Cost]:
    rows = []
    inside = next(iter(links.values()))
    for link_name, link in links.items():
        for name, net in NETWORKS.items():
            for d in GROUP_SIZES:
                for n in ranks:
                    ways = [whitening_seconds(net, d, n, link, all_reduce) for all_reduce in ALL_REDUCES.values()]
                    cluster = Cluster(link if link_name == MEASURED else inside, link)
                    seconds = (
                        *ways,
                        simulated_step(net.channels, d, n, cluster),
                        batchnorm_seconds(net, n, link, fastest),
                        gradient_seconds(net, n, link, fastest),
                    )
                    rows.append(Cost(link_name, name, d, n, *(1e3 * t for t in seconds)))
    return rows


def tables(fits: Sequence[Fitted], layers: Sequence[Layer], costs: Sequence[Cost]) -> str:
    parts = [
        table(
            ["fitted", "latency, us", "bandwidth, GB/s", "worst ratio"],
            [[f.name, number(f.latency_us), number(f.gbytes_per_s), number(f.worst_ratio)] for f in fits],
        ),
        table(
            [
                "layer", "input of a rank", "bytes", "predicted, ms", "measured, ms", "ratio", "with waiting, ms",
                "sync / plain",
            ],
            [
                [row.layer, row.shape, f"{row.bytes:,}", number(row.predicted_ms), number(row.collectives_ms),
                 number(row.predicted_ratio), number(row.with_waiting_ms), number(row.ratio)]
                for row in layers
            ],
        ),
    ]  # fmt: skip
    for link in dict.fromkeys(row.link for row in costs):
        rows = [row for row in costs if row.link == link and row.ranks in (8, 64, 1024)]
        header = ["network, d", "ranks", "ring", "halving-doubling", "nodes of 8", "SyncBatchNorm", "gradients"]
        body = [
            [f"{row.network}, {row.group_size}", str(row.ranks), *map(number, (
                row.ring, row.halving_doubling, row.nodes_of_8, row.sync_batchnorm, row.gradients,
            ))]
            for row in rows
        ]  # fmt: skip
        parts.append(f"{link}, ms\n\n{table(header, body)}")
    return "\n\n".join(parts)


def plot(reduced: Sequence[Reduced], costs: Sequence[Cost], link: str, path: Path) -> Path:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for ranks, colour in ((2, BLUE), (4, ORANGE)):
            mine = [row for row in reduced if row.ranks == ranks]
            sizes = [row.bytes for row in mine]
            left.plot(sizes, [1e3 * row.seconds for row in mine], "o", color=colour, label=f"{ranks} processes")
            left.plot(sizes, [1e3 * row.fitted for row in mine], color=colour, label="fitted")
        left.set(xlabel="bytes", ylabel="ms", xscale="log", yscale="log", title="gloo's all-reduce")
        shown = [row for row in costs if (row.network, row.link) == ("ResNet-50", link)]
        ranks_axis = sorted({row.ranks for row in shown})
        for d, line in zip(GROUP_SIZES, ("-", "--"), strict=True):
            curve = [row for row in shown if row.group_size == d]
            for name, colour in (("ring", LIGHT), ("halving_doubling", BLUE)):
                times = [getattr(row, name) for row in curve]
                right.plot(ranks_axis, times, line, color=colour, label=f"d = {d}, {name.replace('_', '-')}")
        right.plot(ranks_axis, [row.sync_batchnorm for row in curve], color=DARK, label="SyncBatchNorm")
        right.plot(ranks_axis, [row.gradients for row in curve], ":", color=MID, label="gradients (overlapped)")
        right.set(xlabel="ranks", ylabel="ms for a step", yscale="log", title=f"ResNet-50, {link} (assumed)")
        right.set_xscale("log", base=2)
        right.set_xticks(ranks_axis, [str(n) for n in ranks_axis])
        for axes in (left, right):
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.legend(fontsize=8)
        return save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a try in seconds, not figures")
    parser.add_argument("--link", action="append", type=parse_link, help=f"the first inside nodes; else {ASSUMED}")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/distributed")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    found = {ranks: measure(ranks, sizes) for ranks in (2, 4)}
    reduced, fits, measured = [], [], {}
    for ranks, results in found.items():
        seconds = results["all-reduces"]
        measured[ranks] = link = fit(sizes.all_reduces, seconds, ranks)
        expected = [ring(size, ranks, link) for size in sizes.all_reduces]
        reduced += [Reduced(ranks, *row) for row in zip(sizes.all_reduces, seconds, expected, strict=True)]
        worst = max(max(a / b, b / a) for a, b in zip(seconds, expected, strict=True))
        device = torch.device("cpu")
        where = device_name(device), versions(device), commit()
        name = f"gloo, {ranks} processes"
        fits.append(Fitted(name, link.latency * 1e6, link.bandwidth / 1e9, worst, *where))

    two = found[2]
    layers = [
        layer_row(f"C = {c}, d = {d}", " x ".join(map(str, (n, c, *size))), [(c, d)], two[c, d], measured[2])
        for c, d, (n, *size) in sizes.layers
    ]
    norms = [(m.num_features, m.group_size) for m in network().modules() if isinstance(m, nk.IterNorm2d)]
    layers.append(
        layer_row(f"{STEP}, {len(norms)} layers", f"{sizes.batch} x 3 x 32 x 32", norms, two[STEP], measured[2])
    )
    for row in layers:
        if row.bytes != row.model_bytes:
            raise RuntimeError(f"{row.layer}: expected {row.model_bytes} bytes, got {row.bytes}")

    links = dict(options.link or map(parse_link, ASSUMED))
    assumed = list(links)
    links[MEASURED] = measured[2]
    costs = extrapolated(links, (8, 16) if options.quick else RANKS)
    files: dict[str, Sequence[Any]] = {"all_reduce": reduced, "links": fits, "layers": layers, "model": costs}
    for file, rows in files.items():
        write_csv(options.out / f"{file}.csv", type(rows[0]), rows)
    plot(reduced, costs, assumed[-1], options.out / "cost.png")
    print(fits[0].device, fits[0].versions, f"commit {fits[0].commit}", sep="; ")
    print(tables(fits, layers, costs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
