"""normkernels: fast, exact normalization layers for PyTorch."""

from normkernels import analysis, convert, ops, optim, parametrizations, penalties
from normkernels._version import __version__
from normkernels.dispatch.choose import backend_of, use_backend
from normkernels.layers import (
    ConvNorm1d,
    ConvNorm2d,
    DBN1d,
    DBN2d,
    DBN3d,
    IterNorm1d,
    IterNorm2d,
    IterNorm3d,
    POPNorm1d,
    POPNorm2d,
    POPNorm3d,
    SyncDBN,
    SyncIterNorm,
)
from normkernels.triton.support import use_tf32

__all__ = [
    "ConvNorm1d",
    "ConvNorm2d",
    "DBN1d",
    "DBN2d",
    "DBN3d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "POPNorm1d",
    "POPNorm2d",
    "POPNorm3d",
    "SyncDBN",
    "SyncIterNorm",
    "__version__",
    "analysis",
    "backend_of",
    "convert",
    "ops",
    "optim",
    "parametrizations",
    "penalties",
    "use_backend",
    "use_tf32",
]
