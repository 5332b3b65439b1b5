"""BNP: Algorithms 2 and 3 of "Batch Normalization Preconditioning for Neural Network Training", one layer at a time.

Letters: N samples, r s output positions, k^2 taps of a kernel, mu and sigma^2 per input channel, o an output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def statistics(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of h (N, C, *) over samples and positions.

    They are those of eq. 21 and 22 (13 for (N, C)).
    """
    rows = h.movedim(1, 0).flatten(1)
    mean = rows.sum(1) / rows.shape[1]
    return mean, (rows - mean[:, None]).square().sum(1) / rows.shape[1]


def positions(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Return r s, the output's spatial size, by the arithmetic of convolutions."""
    count = 1
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        count *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    return count


def scale(fan_in: int, samples: int, outputs: float) -> float:
    """Return q^2 = max(c k^2 / N, sqrt(r s)) of step 3; with r s = 1 it is that of Proposition 5."""
    return max(fan_in / samples, outputs**0.5)


def matrix(mean: Tensor, sigma: Tensor) -> Tensor:
    """Return P of eq. 15: the identity with -mu^T in the first row, times diag(1, 1 / sigma)."""
    one = torch.ones(1, dtype=mean.dtype)
    centring = torch.eye(1 + len(mean), dtype=mean.dtype)
    centring[0, 1:] = -mean
    return centring @ torch.diag(1 / torch.cat([one, sigma]))


def precondition(
    Gw: Tensor, Gb: Tensor | None, mean: Tensor, var: Tensor, q2: float, groups: int = 1,
    eps1: float = 1e-2, eps2: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return P P^T [Gb(o), Gw(o)] / q^2 (eq. 15, 23), with mu and sigma repeated for the taps of a channel.

    A group is a layer of its own. Without a bias there is no first row and column.
    """
    new_w, new_b = torch.empty_like(Gw), None if Gb is None else torch.empty_like(Gb)
    taps = Gw[0, 0].numel()
    for o in range(len(Gw)):
        group = slice(o * groups // len(Gw) * Gw.shape[1], (o * groups // len(Gw) + 1) * Gw.shape[1])
        smoothed = var[group] + eps1 * var[group].max() + eps2
        mu, sigma = (value.repeat_interleave(taps) for value in (mean[group], smoothed.sqrt()))
        if Gb is None or new_b is None:
            P = torch.diag(1 / sigma)
            new_w[o] = (P @ P.T @ Gw[o].flatten() / q2).view_as(Gw[o])
        else:
            P = matrix(mu, sigma)
            change = P @ P.T @ torch.cat([Gb[o : o + 1], Gw[o].flatten()]) / q2
            new_b[o], new_w[o] = change[0], change[1:].view_as(Gw[o])
    return new_w, new_b


class Running:
    """The running statistics of step 2, from mu = 0 and sigma = 1."""

    def __init__(self, channels: int, rho: float = 0.99) -> None:
        self.rho = rho
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)

    def update(self, h: Tensor) -> None:
        """Update with h (N, C, *) of a step; one row is compared with the running mean (section 3.3)."""
        mean, var = statistics(h)
        if h.numel() == h.shape[1]:
            var = (mean - self.mean).square()
        self.mean = self.rho * self.mean + (1 - self.rho) * mean
        self.var = self.rho * self.var + (1 - self.rho) * var
