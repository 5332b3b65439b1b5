"""Bounds of what normkernels.analysis measures.

kappa       An error E of a symmetric matrix moves its eigenvalues by |E|_2 at most (Weyl); the smallest nonzero
            one by the most for its size. E_ij is u (4 + sqrt(m)) of what the terms of H_ij add up to, which is
            at most a_i a_j with a_i = sqrt(H_ii); so |E|_2 <= u (4 + sqrt(m)) |a|^2. With P, P^T E P has
            |P|^T a for a. Eigenvalues are good to u sqrt(n) of the largest, which is no more than |a|^2. Of
            kappa: twice |E|_2 / lambda_min, for both eigenvalues, and the oracle has an error of its own.
kappa(x)    The same for singular values (Weyl): the decomposition errs by u (4 + sqrt(n)) of the largest, and
            the rounding of x, of its mean and of their difference by 2 u |mean| in each of n d entries. kappa is
            a square: twice the relative error of the smallest value.
SND         N = 3, B = 2, F = x - mean_B: a sample has two outputs, of which one comes with frequency p = 1/2 in
            s draws. Eq. 10 is 4 p (1 - p) = 1 - (2 p - 1)^2 of eq. 9, and 2 p - 1 has standard deviation s^-1/2:
            five of these are 25 / s.
BIM         Signs are exact; of a step x + alpha and a bound x + eps each is rounded once, u |x|, and a path that
            forms bounds as x + clip(x' - x) twice more.
samples     The mean of n numbers is within five of its standard deviations, std / sqrt(n).
gap         w . grad cancels to u sqrt(m) of its terms, which are at most a hundred times |w| |grad| here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.tolerances.common import assert_within, largest, unit

INVARIANCE_GAP = 1e-12


def condition_error(H: Tensor, P: Tensor, rank: int, terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Return the relative error of kappa(P^T H P).

    H has this rank, and each entry is a sum of so many terms in this type.
    """
    a = P.abs().mT @ H.diagonal().abs().sqrt()
    values = torch.linalg.svdvals(P.mT @ H @ P)
    return 4 * unit(dtype) * (4 + terms**0.5 + len(H) ** 0.5) * (a.square().sum() / values[rank - 1]).item()


def covariance_condition_error(values: Sequence[float], n: int, mean: float = 0.0) -> float:
    """Return the relative error of kappa for n samples with these singular values once centered."""
    entries = (n * len(values)) ** 0.5
    return 2 * unit(torch.float64) * ((4 + n**0.5) * max(values) + 2 * entries * mean) / min(values)


def snd_sampling(draws: int) -> float:
    return 25 / draws


def sampling(std: float, n: int) -> float:
    return 5 * std / n**0.5


def assert_bim(got: Tensor, expected: Tensor, steps: int) -> None:
    bound = 4 * steps * unit(got.dtype) * largest(expected.double())
    assert_within("attacked samples", got, expected.double(), None, bound, largest(expected.double()))
