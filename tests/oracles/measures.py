"""The measures of the analysis toolkit, number by number from the papers' equations, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def snd(outputs: Sequence[Sequence[Tensor]]) -> float:
    """IterNorm, eq. 10, and its mean over samples: outputs[k][i] is the output (d,) of sample k in draw i."""
    total = 0.0
    for of_sample in outputs:
        mean = [sum(float(y[c]) for y in of_sample) / len(of_sample) for c in range(len(of_sample[0]))]
        norms = [math.sqrt(sum((float(y[c]) - mean[c]) ** 2 for c in range(len(mean)))) for y in of_sample]
        total += sum(norms) / len(of_sample)
    return total / len(outputs)


def rows_of_linear(h: Tensor) -> Tensor:
    """H of BNP's eq. 11: activations (N, n) are its rows already."""
    return h.double()


def rows_of_conv(
    h: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """H of BNP's Lemma 8 and Proposition 9: what every output position multiplies the kernel by, entry by entry.

    h (N, c, *plane) to (N * positions, c * taps), in the order of a flattened kernel.
    """
    h = h.double()
    plane = h.shape[2:]
    outputs = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(plane, kernel, stride, padding, dilation, strict=True)
    ]
    rows = []
    for sample in h:
        for position in itertools.product(*map(range, outputs)):
            row = []
            for channel in sample:
                for tap in itertools.product(*map(range, kernel)):
                    at = [
                        o * s + t * d - p
                        for o, s, t, d, p in zip(position, stride, tap, dilation, padding, strict=True)
                    ]
                    inside = all(0 <= a < n for a, n in zip(at, plane, strict=True))
                    row.append(channel[tuple(at)].item() if inside else 0.0)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def hessian(H: Tensor, second: Tensor, bias: bool = True) -> Tensor:
    """H^T S H of BNP's eq. 10 and 11, with L'' of every row; H^ = [e, H] for a layer with a bias."""
    H_hat = torch.cat([torch.ones(len(H), 1, dtype=torch.float64), H], 1) if bias else H
    return H_hat.mT @ torch.diag(second) @ H_hat


def preconditioned(H: Tensor, second: Tensor, mean: Tensor, variance: Tensor, bias: bool = True) -> Tensor:
    """G^T S G of BNP's Theorem 3: H centered and scaled first. mean and variance for every column of H."""
    G = (H - mean if bias else H) / variance.sqrt()
    return hessian(G, second, bias)


def condition(H: Tensor, rank: int) -> float:
    """Of a symmetric matrix whose rank is known (BNP, section 1: the smallest nonzero singular value)."""
    values = torch.linalg.svdvals(H)
    return (values[0] / values[rank - 1]).item()
