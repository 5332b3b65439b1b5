"""normkernels: fast, exact normalization layers for PyTorch."""

from normkernels import ops
from normkernels._version import __version__
from normkernels.layers import DBN1d, DBN2d, DBN3d, IterNorm1d, IterNorm2d, IterNorm3d
from normkernels.ops._library import backend_of, use_backend

__all__ = [
    "DBN1d",
    "DBN2d",
    "DBN3d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "__version__",
    "backend_of",
    "ops",
    "use_backend",
]
