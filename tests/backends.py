"""The backends, as parameters of the fixture ``backend``: on a CPU, where kernels run in a simulation, and on a GPU.

For a part of them: ``@pytest.mark.parametrize("backend", CUDA, indirect=True)``.
"""

from __future__ import annotations

import pytest

# The kernels leave float64, and the second derivatives' products in it, to another backend, and say so.
_handed_on = pytest.mark.filterwarnings("ignore:.*instead of the CUDA kernels")

SIMT = pytest.param("simt", marks=[pytest.mark.simt, _handed_on])
CUDA_ON_GPU = pytest.param("cuda-cuda", marks=[pytest.mark.gpu, _handed_on])
TRITON = ["triton", pytest.param("triton-cuda", marks=pytest.mark.gpu)]
CUDA = [CUDA_ON_GPU, SIMT]
ALL = ["eager", *TRITON, *CUDA]
