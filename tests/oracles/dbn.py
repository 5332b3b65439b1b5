"""DBN: equation 2 of the IterNorm paper, ZCA whitening."""

from __future__ import annotations

import torch
from torch import Tensor


def zca(sigma: Tensor) -> Tensor:
    """Return D Lambda^{-1/2} D^T of sigma (G, d, d), which holds eps already (eq. 2).

    Autograd's eigh divides by differences of eigenvalues: this is a reference for the gradient only where they
    are distinct.
    """
    values, vectors = torch.linalg.eigh(sigma)
    return vectors @ (values.rsqrt()[..., None] * vectors.mT)


def zca_by_inverses(sigma: Tensor, steps: int = 40) -> Tensor:
    """Return the same matrix by the Denman-Beavers iteration, whose autograd knows nothing of eigenvalues.

    Y -> (Y + Z^-1) / 2, Z -> (Z + Y^-1) / 2 from Y = sigma, Z = I: Z converges to sigma^{-1/2}. Equal eigenvalues
    are harmless here, so this is the reference for gradients there.
    """
    y, z = sigma, torch.eye(sigma.shape[-1], dtype=sigma.dtype).expand_as(sigma)
    for _ in range(steps):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return z
