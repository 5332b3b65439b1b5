"""Layers. They import ops and nothing else of the package."""

from normkernels.layers.conv_norm import ConvNorm1d, ConvNorm2d
from normkernels.layers.pop_norm import POPNorm1d, POPNorm2d, POPNorm3d
from normkernels.layers.sync import SyncDBN, SyncIterNorm
from normkernels.layers.whitening import DBN1d, DBN2d, DBN3d, IterNorm1d, IterNorm2d, IterNorm3d

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
]
