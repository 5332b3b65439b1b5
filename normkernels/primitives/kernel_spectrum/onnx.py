"""kernel_spectrum in operators that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkernels._checks import statistics_dtype
from normkernels.eager.devices import in_float64
from normkernels.primitives.kernel_spectrum import eager
from normkernels.primitives.spectral_filter.onnx import waves


def kernel_spectrum(weight: Tensor, size: Sequence[int], eps: float, dilation: Sequence[int]) -> Tensor:
    dtype, exact = statistics_dtype(weight.dtype), in_float64(weight)
    rows, columns = (
        waves(n, (1 - k, 1, 2 * k - 1), step, exact.device)
        for n, k, step in zip(size, weight.shape[2:], dilation, strict=True)
    )
    return eager.spectrum(exact, (rows, columns), eps).clamp(max=torch.finfo(dtype).max).to(dtype).to(weight.device)
