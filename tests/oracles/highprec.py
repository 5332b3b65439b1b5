"""Equations 14, 15, 17 and their gradient, equations 6 and 7, in multiple precision, as written in the paper.

200 digits leave room for the growth of rounding errors in eq. 17 (about two digits per iteration) up to T=20 and far
beyond. Too slow for anything but a judge of the float64 references at a few channels.
"""

from __future__ import annotations

import mpmath
import numpy as np
import torch
from torch import Tensor

DIGITS = 200


def _exact(a: Tensor) -> np.ndarray:
    """Convert float64 to multiple precision, without rounding."""
    return np.vectorize(mpmath.mpf, otypes=[object])(a.double().numpy())


def _rounded(a: np.ndarray) -> Tensor:
    return torch.from_numpy(np.vectorize(float, otypes=[np.float64])(a))


def inverse_sqrt(cov: Tensor, num_iterations: int, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return W and dL/dSigma (d, d), float64, for cov (d, d) and grad = dL/dW (d, d), with trace scaling."""
    with mpmath.workdps(DIGITS):
        d = len(cov)
        one = _exact(torch.eye(d))
        sigma = _exact(cov) + mpmath.mpf(eps) * one
        dw = _exact(grad)
        trace = np.trace(sigma)
        root = mpmath.sqrt(trace)
        s = sigma / trace  # eq. 14
        p = [one]
        for _ in range(num_iterations):  # eq. 17
            p.append((3 * p[-1] - p[-1] @ p[-1] @ p[-1] @ s) / 2)
        w = p[-1] / root  # eq. 15

        dp = dw / root
        ds = 0 * one
        for k in range(num_iterations, 0, -1):
            q = p[k - 1]
            ds = ds - (q @ q @ q).T @ dp / 2  # eq. 6, second line
            # eq. 7
            dp = 3 * dp / 2 - dp @ (q @ q @ s).T / 2 - (q @ q).T @ dp @ s.T / 2 - q.T @ dp @ (q @ s).T / 2
        # eq. 6, third line
        of_trace = np.trace(ds.T @ sigma) / trace**2 + np.trace(dw.T @ p[-1]) / (2 * root**3)
        dsigma = ds / trace - of_trace * one
        return _rounded(w), _rounded(dsigma)
