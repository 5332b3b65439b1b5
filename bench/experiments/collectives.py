"""The bytes that synchronized layers send and the time this takes: formulas, and a simulation to check them against.

An all-reduce of S bytes over n ranks, with a latency per message and a bandwidth per link:

    ring                2 (n - 1) latency + 2 (n - 1) / n S / bandwidth
    halving-doubling    2 log2(n) latency + 2 (n - 1) / n S / bandwidth      (n a power of two)

Halving-doubling is Thakur et al., "Optimization of collective communication operations in MPICH" (2005), section 4.5;
the double binary tree of NCCL has the same two terms, its bytes being pipelined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import nnls
from torch import Tensor

FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds per message, ``bandwidth`` in bytes per second in each direction."""

    latency: float
    bandwidth: float


# Bytes that a layer of C channels in groups of d sends.


def forward_bytes(channels: int, group_size: int) -> int:
    """Return the bytes of count, means and lower triangles of second moments, in float64."""
    d = min(group_size, channels)
    return DOUBLE * (1 + channels + channels * (d + 1) // 2)


def backward_bytes(channels: int, group_size: int, itemsize: int = FLOAT) -> int:
    """Return the bytes of the sums of dy and the lower triangles of the covariance's gradient.

    Both are in the type of the statistics.
    """
    d = min(group_size, channels)
    return itemsize * (channels + channels * (d + 1) // 2)


# Seconds that a collective takes.

AllReduce = Callable[[float, int, Link], float]


def ring(size: float, ranks: int, link: Link) -> float:
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def halving_doubling(size: float, ranks: int, link: Link) -> float:
    return 2 * math.log2(ranks) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def ring_all_gather(size: float, ranks: int, link: Link) -> float:
    """Return the seconds until every rank has ``size`` bytes of every rank."""
    return (ranks - 1) * (link.latency + size / link.bandwidth)


ALL_REDUCES: dict[str, AllReduce] = {"ring": ring, "halving-doubling": halving_doubling}


def fastest(size: float, ranks: int, link: Link) -> float:
    """Return the seconds of a library that chooses the algorithm by size."""
    return min(all_reduce(size, ranks, link) for all_reduce in ALL_REDUCES.values())


# The same times from single messages.


@dataclass(frozen=True)
class Cluster:
    """Ranks 0 to per_node - 1 are one node, and so on; ``inside`` links ranks of a node, ``between`` others."""

    inside: Link
    between: Link
    per_node: int = 8

    def links(self, sender: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
        """Return latency and bandwidth between each pair."""
        same = (sender // self.per_node == receiver // self.per_node).long()
        latencies = torch.tensor([self.between.latency, self.inside.latency], dtype=torch.float64)
        bandwidths = torch.tensor([self.between.bandwidth, self.inside.bandwidth], dtype=torch.float64)
        return latencies[same], bandwidths[same]


def messages(algorithm: str, size: float, ranks: int) -> Iterator[tuple[Tensor, float]]:
    """Yield step by step which rank each rank receives from, and how many bytes."""
    me = torch.arange(ranks)
    if algorithm == "ring":
        for _ in range(2 * (ranks - 1)):
            yield (me - 1) % ranks, size / ranks
        return
    if ranks & (ranks - 1):
        raise ValueError(f"ranks: expected a power of two for halving-doubling, got {ranks}")
    distances = [ranks >> k for k in range(1, ranks.bit_length())]
    for distance in (*distances, *reversed(distances)):  # the further apart, the more bytes
        yield me ^ distance, size * distance / ranks


def simulate(algorithm: str, size: float, start: Tensor, cluster: Cluster) -> Tensor:
    """Return when each rank has the sum, if it begins at ``start`` (n,) seconds.

    A rank goes on to its next step when its message has come. Its messages follow each other: the next one leaves when
    the last one has left, even if that one has not arrived yet.
    """
    ready, me = start.double(), torch.arange(len(start))
    free = ready
    for sender, part in messages(algorithm, size, len(start)):
        latency, bandwidth = cluster.links(sender, me)
        left = torch.maximum(ready, free)[sender] + part / bandwidth
        free = torch.empty_like(free).scatter_(0, sender, left)
        ready = torch.maximum(ready, left + latency)
    return ready


def fit(sizes: Sequence[float], seconds: Sequence[float], ranks: int) -> Link:
    """Fit latency and bandwidth of a ring, none below 0.

    These are least squares of the relative errors, because the sizes span decades.
    """
    t, s = (torch.tensor(values, dtype=torch.float64) for values in (seconds, sizes))
    columns = torch.stack((torch.full_like(s, 2 * (ranks - 1)), 2 * (ranks - 1) / ranks * s), 1) / t[:, None]
    (latency, inverse), _ = nnls(columns.numpy(), [1.0] * len(t))
    return Link(float(latency), 1 / float(inverse) if inverse else math.inf)


# Networks (He et al., "Deep residual learning for image recognition", Table 1), 1,000 classes.


@dataclass(frozen=True)
class Network:
    """Channels of each normalization layer in order, and the number of parameters."""

    channels: tuple[int, ...]
    parameters: int


def resnet(blocks: Sequence[int], bottleneck: bool) -> Network:
    """Return the published form of a ResNet: its shortcuts are convolutions where the shape changes."""
    channels, weights, before = [64], 7 * 7 * 3 * 64, 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for _ in range(count):
            if bottleneck:
                channels += [width, width, out]
                weights += before * width + 9 * width * width + width * out
            else:
                channels += [width, width]
                weights += 9 * (before * width + width * width)
            if before != out:
                channels.append(out)
                weights += before * out
            before = out
    return Network(tuple(channels), weights + 2 * sum(channels) + 1000 * (before + 1))


NETWORKS = {"ResNet-18": resnet((2, 2, 2, 2), bottleneck=False), "ResNet-50": resnet((3, 4, 6, 3), bottleneck=True)}


def whitening_seconds(network: Network, group_size: int, ranks: int, link: Link, all_reduce: AllReduce) -> float:
    """Return the seconds of a step's collectives of synchronized whitening: two for each layer, one after the other."""
    return sum(
        all_reduce(forward_bytes(c, group_size), ranks, link) + all_reduce(backward_bytes(c, group_size), ranks, link)
        for c in network.channels
    )


def batchnorm_seconds(network: Network, ranks: int, link: Link, all_reduce: AllReduce) -> float:
    """Return the seconds of SyncBatchNorm's collectives in a step, in float32.

    Mean, 1 / std and count of every rank are gathered, then two sums are reduced.
    """
    return sum(
        ring_all_gather(FLOAT * (2 * c + 1), ranks, link) + all_reduce(FLOAT * 2 * c, ranks, link)
        for c in network.channels
    )


def gradient_seconds(network: Network, ranks: int, link: Link, all_reduce: AllReduce) -> float:
    """Return the seconds of DistributedDataParallel's float32 gradients, sent as one message."""
    return all_reduce(FLOAT * network.parameters, ranks, link)
