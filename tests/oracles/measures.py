"""The measures of the analysis toolkit, number by number from the papers' equations, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def snd(outputs: Sequence[Sequence[Tensor]]) -> float:
    """Return the mean over samples of SND, IterNorm's eq. 10.

    outputs[k][i] is the output (d,) of sample k in draw i.
    """
    total = 0.0
    for of_sample in outputs:
        mean = [sum(float(y[c]) for y in of_sample) / len(of_sample) for c in range(len(of_sample[0]))]
        norms = [math.sqrt(sum((float(y[c]) - mean[c]) ** 2 for c in range(len(mean)))) for y in of_sample]
        total += sum(norms) / len(of_sample)
    return total / len(outputs)


def rows_of_linear(h: Tensor) -> Tensor:
    """Return H of BNP's eq. 11: activations (N, n) are its rows already."""
    return h.double()


def rows_of_conv(
    h: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return H of BNP's Lemma 8 and Proposition 9, entry by entry.

    Its rows are what every output position multiplies the kernel by.

    h (N, c, *plane) becomes (N * positions, c * taps), in the order of a flattened kernel.
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
    """Return H^T S H of BNP's eq. 10 and 11, with L'' of every row; H^ = [e, H] for a layer with a bias."""
    H_hat = torch.cat([torch.ones(len(H), 1, dtype=torch.float64), H], 1) if bias else H
    return H_hat.mT @ torch.diag(second) @ H_hat


def preconditioned(H: Tensor, second: Tensor, mean: Tensor, variance: Tensor, bias: bool = True) -> Tensor:
    """Return G^T S G of BNP's Theorem 3, H centered and scaled first; mean and variance for every column of H."""
    G = (H - mean if bias else H) / variance.sqrt()
    return hessian(G, second, bias)


def condition(H: Tensor, rank: int) -> float:
    """Return the condition number of a symmetric matrix whose rank is known.

    It is by the smallest nonzero singular value (BNP, section 1).
    """
    values = torch.linalg.svdvals(H)
    return (values[0] / values[rank - 1]).item()
