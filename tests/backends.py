"""The backends that the fixture ``backend`` can stand for, and which of them a test runs with.

On a CPU kernels run in a simulation: Triton's in its interpreter, CUDA's as C++ (tests/simt), in runs with --simt only.
A test runs with all backends, or with those that it names: ``@backends.only(*backends.CUDA)``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

TRITON = ("triton", "triton-cuda")
CUDA = ("cuda-cuda", "simt")
KERNELS = (*TRITON, *CUDA)
ALL = ("eager", *KERNELS)
SLOW = ("triton", "simt")  # kernels in a simulation
NONE = "none"  # stands for the backends of a test that can run with none here

# The kernels leave float64, and the second derivatives' products in it, to another backend, and say so.
_handed_on = pytest.mark.filterwarnings("ignore:.*instead of the CUDA kernels")
_MARKS = {
    "eager": (),
    "triton": (),
    "triton-cuda": (pytest.mark.gpu,),
    "cuda-cuda": (pytest.mark.gpu, _handed_on),
    "simt": (pytest.mark.simt, _handed_on),
}


def only(*names: str) -> pytest.MarkDecorator:
    """Return a mark: the test runs with these backends. The mark closest to a test counts."""
    return pytest.mark.backends(*names)


def parameters(test: pytest.Function, fixtures: list[str], simt: bool) -> list[Any]:
    """Return the backends that a test can run with here, as parameters of the fixture ``backend``.

    Where there is no such backend that is NONE, and the test is made once, to be left out. simt: whether the run is one
    with --simt.
    """
    mark = test.get_closest_marker("backends")
    asked = ALL if mark is None else mark.args
    found = [pytest.param(name, marks=_MARKS[name]) for name in asked if _runs(name, test, fixtures, simt)]
    return found or [NONE]


def _runs(name: str, test: pytest.Function, fixtures: list[str], simt: bool) -> bool:
    if (name == "simt") != simt:
        return False
    if "tiny_tiles" in fixtures and name != "eager":  # only eager has such tiles
        return False
    if name == "triton":  # on a CPU, in the interpreter
        return os.environ.get("TRITON_INTERPRET") == "1" and test.get_closest_marker("large") is None
    if name.endswith("-cuda"):
        return torch.cuda.is_available() and test.get_closest_marker("on_cpu") is None
    return True
