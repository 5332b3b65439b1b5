"""Float32 products on a CPU that torch's own mm and matmul do at half the speed.

torch hands every matrix product to its BLAS. On a CPU whose AVX-512 this BLAS does not recognise, it does 180 to 210
GFLOP/s (2 Zen 5 cores). There oneDNN, which torch uses for convolutions, does 280 to 430 on the shapes below
(bench/experiments/products.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

# torch has no public function for oneDNN's product of matrices with long rows. It must get dense rows: for any
# other operand oneDNN has nothing but its reference implementation, which is hundreds of times slower.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def fast(x: Tensor) -> bool:
    """Return whether oneDNN serves products of tensors like x."""
    return _linear is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T (m, n) of a (m, k) and b (n, k), both with dense rows. Only for tensors that are ``fast``."""
    result: Tensor = _linear(a, b, None, "none", [], "")
    return result


def times_columns(matrix: Tensor, planes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return matrix (d, k) times each of the planes (n, k, l), plus a bias for each row: (n, d, l).

    It is a convolution: planes are images of one channel, and the rows of the matrix are d kernels as high as the
    images. oneDNN then reorders only the output; for a 1x1 convolution it would reorder the k channels as well.
    """
    (d, k), positions = matrix.shape, planes.shape[2]
    return conv2d(planes.unsqueeze(1), matrix.reshape(d, 1, k, 1), bias).view(len(planes), d, positions)
